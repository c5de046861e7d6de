"""Faults on order, for tests: named points in the code that do nothing unless they are armed.

Armed by the environment (`EMBERSHARD_FAILPOINTS="push.applied=kill:3,fence=skip"`) or, only where that variable is set
(it may be empty), by the control call `arm`. `name=action` fires at every pass, `name=action:N` at the N-th pass alone.

    kill    the process ends at once, as with SIGKILL        error   an OSError, as from a disk that fails
    stop    the process stops until it gets SIGCONT          skip    `active` is true: the guard, or network, is off
"""

from __future__ import annotations

import errno
import os
import signal
import threading
from dataclasses import dataclass

VARIABLE = "EMBERSHARD_FAILPOINTS"
ACTIONS = ("kill", "stop", "error", "skip")

GUARDS = frozenset({"ledger", "journal", "fence", "cut", "seal", "lease"})
"""What `skip` switches off: without the guard a scenario must report lost or doubled pushes."""

POINTS = GUARDS | {
    "push.checked",  # decided, not in the journal
    "push.journalled",  # in the journal, not applied
    "push.applied",  # applied, not acknowledged
    "journal.write",  # before a record is written
    "journal.segment",  # a new segment is there, the cut stands, nothing of the snapshot is written
    "snapshot.block",  # before each block of a local snapshot
    "snapshot.manifest",  # every block is written, the manifest is not
    "snapshot.clean",  # the snapshot is whole, what it replaces is still there
    "checkpoint.block",  # before each block of a checkpoint
    "checkpoint.dense",  # before the dense part
    "checkpoint.manifest",  # every file is written, the manifest is not
    "checkpoint.committed",  # the manifest is there, the caller has not heard of it
    "load.block",  # before each block that is loaded
    "network.cut",  # with `skip`: streams of rows and blocks break, and new ones are refused
    "network.answer",  # with `skip`: a call is carried out, and the stream breaks before its answer
    "move.begun",  # at the source: a block is about to be copied
    "move.received",  # at the target: a block or its changes are in the journal and in memory
    "move.sealed",  # at the source: the block is sealed, the last changes are not sent
    "move.owned",  # a new block map is in the journal and in force
    "move.commit",  # at the coordinator: everything is ready, the new block map is not written
    "move.committed",  # at the coordinator: it is written, nobody knows it
}
"""Every name there is: a point that nobody passes would make its test pass for nothing."""


@dataclass
class _Armed:
    action: str
    only: int | None
    passes: int = 0


_armed: dict[str, _Armed] = {}
_lock = threading.Lock()


def allowed() -> bool:
    """Whether this process may be armed from outside."""
    return VARIABLE in os.environ


def arm(points: str) -> None:
    """Arms exactly `points` ("name=action[:N],..."; empty: nothing is armed any more).

    Raises:
        ValueError: an unknown name or action, or a number that is none.
    """
    found = {}
    for item in filter(None, points.split(",")):
        name, _, what = item.partition("=")
        action, _, only = what.partition(":")
        if name not in POINTS or action not in ACTIONS or not (only == "" or only.isdecimal()):
            raise ValueError(
                f"{VARIABLE}: {item!r} is not NAME=ACTION[:N] with an action of {', '.join(ACTIONS)} "
                f"and a name of {', '.join(sorted(POINTS))}"
            )
        found[name] = _Armed(action, int(only) if only else None)
    with _lock:
        _armed.clear()
        _armed.update(found)


def hit(name: str) -> None:
    """Passes a point. Raises OSError if it is armed with `error`."""
    if _armed:
        _pass(name)


def active(name: str) -> bool:
    """Whether the guard of this name is switched off."""
    return bool(_armed) and _pass(name)


def _pass(name: str) -> bool:
    with _lock:
        point = _armed.get(name)
        if point is None:
            return False
        point.passes += 1
        if point.only not in (None, point.passes):
            return False
    if point.action == "error":
        raise OSError(errno.EIO, f"failpoint {name}")
    if point.action != "skip":
        os.kill(os.getpid(), signal.SIGKILL if point.action == "kill" else signal.SIGSTOP)
    return True


arm(os.environ.get(VARIABLE, ""))
