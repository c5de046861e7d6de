"""`embershard train` in a process of its own, whose processes a test kills; at the end its tables are compared.

One worker in `bounded`, and two in `sync`, are reproducible, so that one push lost or applied twice would show.
"""

from __future__ import annotations

import itertools
import json
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import psutil
import pytest
from embershard.cluster.run_folder import read_metrics
from embershard.parameter_server.checkpoint import read_block, read_manifest

ROWS, BATCH, EPOCHS = 4000, 64, 30
STEPS = EPOCHS * -(-ROWS // BATCH)
FAULT_AFTER, CHECKPOINT_EVERY = 500, 200  # steps
SETTINGS = {
    "data": {"batch_size": BATCH},
    "model": {"bottom": [8], "top": [8]},
    "embedding": {"dim": 4},
    "train": {"log_every": 10, "threads": 1, "epochs": EPOCHS},
    "store": {"blocks": 32, "timeout": 60},
    "checkpoint": {"every": CHECKPOINT_EVERY},
    "cluster": {"driver_timeout": 60, "start_timeout": 120},
}
# One worker of a step that lasts: nothing of it depends on who comes first.
ONE, TWO = ["train.consistency=bounded"], ["train.consistency=sync", "cluster.workers=2"]


class Run:
    """`embershard train` in a process of its own, on the tests' cluster. started: all that there are."""

    started: ClassVar[list[Run]] = []

    def __init__(self, home: Path, name: str, *settings: str) -> None:
        self.started.append(self)
        self.folder = home / name
        self.process = subprocess.Popen(
            [sys.executable, "-m", "embershard", "train", "run.yaml", f"run.dir={name}", *settings, "--json"],
            cwd=home,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )

    def wait_until(self, condition: Callable[[], Any], what: str, timeout: float = 300.0) -> None:
        deadline = time.monotonic() + timeout
        while not condition():
            if self.process.poll() is not None:
                pytest.fail(f"ended before {what}: {self.process.stderr.read()}")  # type: ignore[union-attr]
            assert time.monotonic() < deadline, f"not within {timeout:g} s: {what}"
            time.sleep(0.05)

    def steps(self) -> list[dict[str, Any]]:
        return [record for record in read_metrics(self.folder) if "loss" in record]

    def finish(self) -> dict[str, Any]:
        out, err = self.process.communicate(timeout=400)
        assert self.process.returncode == 0, err
        print(err, file=sys.stderr)
        self.notes = err
        summary: dict[str, Any] = json.loads(out.splitlines()[-1])
        return summary

    def fault(
        self,
        *names: str,
        every: bool = False,
        number: signal.Signals = signal.SIGKILL,
        before: Callable[[], object] = lambda: None,
        back_after: float | None = None,
    ) -> float:
        """Sends a signal after FAULT_AFTER steps; returns the longest time without a step, to 10 steps exact.

        names: of actors' classes. every: to all their processes, and not just to one. before: is called just before.
        back_after: seconds after which the one gets SIGCONT.
        """
        self.wait_until(lambda: self.steps() and self.steps()[-1]["step"] >= FAULT_AFTER, "the fault")
        victims = [process for name in names for process in processes(name)]
        seen = len(self.steps())
        before()
        killed = time.time()
        for victim in victims if every else victims[:1]:
            victim.send_signal(number)
        if back_after is not None:
            time.sleep(back_after)  # what this is about: for so long the process does not exist for anybody
            victims[0].send_signal(signal.SIGCONT)
        # What was on its way when the process died is no step after the fault.
        self.wait_until(lambda: len(self.steps()) > seen + 3, "the next steps")
        gaps = [record["time"] for record in self.steps()[seen - 1 :]]
        return max(b - max(a, killed) for a, b in itertools.pairwise(gaps))


def processes(name: str, raylet: int | None = None) -> list[psutil.Process]:
    """The processes of this Ray cluster's actors of the class `name`; of one node, where its raylet's pid is given."""
    found = []
    for process in psutil.Process(raylet).children(recursive=True):
        try:
            if process.cmdline() and process.cmdline()[0].startswith(f"ray::{name}"):
                found.append(process)
        except psutil.NoSuchProcess:
            continue
    return found


def tables(checkpoint: str) -> dict[str, np.ndarray]:
    """Every row and its optimizer state; not the ledger, which holds the random numbers of clients."""
    found = {}
    for entry in read_manifest(checkpoint).files:
        for name, tensor in read_block(checkpoint, entry).items():
            if not name.startswith("ledger/"):
                found[f"{entry.block}/{name}"] = tensor
    return found


def assert_nothing_lost_or_doubled(summary: dict[str, Any], expected: dict[str, Any]) -> None:
    assert (summary["steps"], summary["samples"]) == (STEPS, EPOCHS * ROWS)
    mine, theirs = tables(summary["checkpoint"]), tables(expected["checkpoint"])
    assert mine.keys() == theirs.keys()
    for name, tensor in theirs.items():
        np.testing.assert_array_equal(mine[name], tensor, err_msg=name)
    assert summary["eval"] == expected["eval"]


def note_of(name: str, seconds: float, summary: dict[str, Any]) -> None:
    print(f"\n{name}: {seconds:.1f} s to the next step, {summary['steps_redone']} steps redone", file=sys.stderr)
