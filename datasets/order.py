"""The order of an epoch, who reads what, and the cursor. Pure; no I/O.

The order depends on (seed, epoch, row groups) alone: row groups are permuted and cut into windows of bounded bytes,
rows are permuted inside a window. Windows that are left are dealt out to the ranks in turn: with nothing read yet,
window i goes to rank i mod W.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

import numpy as np

from .kernels import mix, shuffle

# A data set is cut into at least this many windows where its row groups allow it, so that ranks end an epoch together.
MIN_WINDOWS = 64


class CursorError(ValueError):
    """A cursor that does not fit the data or the settings."""


@dataclass(frozen=True, slots=True)
class RowGroup:
    """`rows` rows of row group `group` in file number `file`; `bytes`: their size when decoded."""

    file: int
    group: int
    rows: int
    bytes: int


@dataclass(frozen=True, slots=True)
class Window:
    """Row groups whose rows are shuffled together. index: its place in the epoch."""

    index: int
    groups: tuple[RowGroup, ...]

    @property
    def rows(self) -> int:
        return sum(group.rows for group in self.groups)

    @property
    def bytes(self) -> int:
        return sum(group.bytes for group in self.groups)


def windows(
    seed: int, epoch: int, row_groups: Sequence[RowGroup], *, window_bytes: int, shuffled: bool = True
) -> list[Window]:
    """Cuts an epoch's row groups, permuted unless `shuffled` is false, into windows.

    A window holds at most min(window_bytes, 1/64 of all bytes), but at least one row group.
    """
    groups = [group for group in row_groups if group.rows]
    places = np.arange(len(groups))
    if shuffled:
        shuffle(places, _key(seed, epoch, 0))
    limit = min(window_bytes, sum(group.bytes for group in groups) // MIN_WINDOWS)
    cut: list[list[RowGroup]] = []
    size = 0
    for place in places:
        group = groups[place]
        if not cut or size + group.bytes > limit:
            cut.append([])
            size = 0
        cut[-1].append(group)
        size += group.bytes
    return [Window(index, tuple(members)) for index, members in enumerate(cut)]


def row_order(seed: int, epoch: int, window: Window, *, shuffled: bool = True) -> np.ndarray:
    """int32 [rows]: the window's rows, numbered through its groups, in the order in which they are read."""
    rows = np.arange(window.rows, dtype=np.int32)
    if shuffled:
        shuffle(rows, _key(seed, epoch, window.index + 1))
    return rows


def _key(seed: int, epoch: int, stream: int) -> np.uint64:
    mask = (1 << 64) - 1
    key = mix(np.uint64(seed & mask), np.uint64(0))
    for part in (epoch, stream):
        key = mix(np.uint64(part & mask), np.uint64(key))
    return np.uint64(key)


def plan_digest(seed: int, shuffled: bool, window_bytes: int, names: Sequence[str], groups: Iterable[RowGroup]) -> str:
    """A short name of everything that the order of every epoch depends on."""
    digest = hashlib.blake2b(repr((seed, shuffled, window_bytes, list(names))).encode(), digest_size=8)
    digest.update(np.array([(g.file, g.group, g.rows, g.bytes) for g in groups], np.int64).tobytes())
    return digest.hexdigest()


@dataclass(frozen=True, slots=True)
class Cursor:
    """Where an epoch stands: the windows read to their end, and the rows taken of those begun.

    workers: number of ranks that read. dealt: the windows that were already finished when what was left was dealt out
    to these ranks. One rank's cursor holds what it was given at the start and what it read itself; `merge` joins them.
    """

    plan: str
    epoch: int
    workers: int
    finished: frozenset[int] = frozenset()
    begun: Mapping[int, int] = field(default_factory=dict)
    dealt: frozenset[int] = frozenset()

    def to_dict(self) -> dict[str, Any]:
        """A form for JSON; window numbers as ranges [first, last]."""
        return {
            "plan": self.plan,
            "epoch": self.epoch,
            "workers": self.workers,
            "finished": _ranges(self.finished),
            "begun": [[window, taken] for window, taken in sorted(self.begun.items())],
            "dealt": _ranges(self.dealt),
        }

    @classmethod
    def from_dict(cls, state: Mapping[str, Any]) -> Cursor:
        """Raises CursorError where `state` is not what `to_dict` returned."""
        try:
            return cls(
                str(state["plan"]),
                int(state["epoch"]),
                int(state["workers"]),
                _members(state["finished"]),
                {int(window): int(taken) for window, taken in state["begun"]},
                _members(state["dealt"]),
            )
        except (KeyError, TypeError, ValueError) as error:
            raise CursorError(f"cursor: not in the form that a checkpoint holds ({error!r})") from error

    @staticmethod
    def merge(cursors: Sequence[Cursor]) -> Cursor:
        """Joins the cursors of all ranks at one step boundary.

        Raises:
            CursorError: none given, or they are not of one epoch and group.
        """
        if not cursors or len({(c.plan, c.epoch, c.workers, c.dealt) for c in cursors}) != 1:
            raise CursorError("cursor: ranks of one run and one epoch have cursors to merge, these differ")
        finished = frozenset[int]().union(*(c.finished for c in cursors))
        begun: dict[int, int] = {}
        for cursor in cursors:
            for window, taken in cursor.begun.items():
                if window not in finished:
                    begun[window] = max(taken, begun.get(window, 0))
        first = cursors[0]
        return Cursor(first.plan, first.epoch, first.workers, finished, begun, first.dealt)


def _ranges(members: Iterable[int]) -> list[list[int]]:
    ranges: list[list[int]] = []
    for member in sorted(members):
        if ranges and ranges[-1][1] == member - 1:
            ranges[-1][1] = member
        else:
            ranges.append([member, member])
    return ranges


def _members(ranges: Iterable[Sequence[int]]) -> frozenset[int]:
    return frozenset(member for first, last in ranges for member in range(int(first), int(last) + 1))


@dataclass(frozen=True)
class EpochPlan:
    """Who reads what from `start` on, for `batch_size` rows per step over all `workers` ranks.

    rows: of each window of the epoch. Every rank computes the same plan from row counts alone.
    """

    rows: Sequence[int]
    start: Cursor
    batch_size: int

    @classmethod
    def resume(cls, rows: Sequence[int], cursor: Cursor, workers: int, batch_size: int) -> EpochPlan:
        """Goes on from a merged cursor: the same ranks keep their windows, another number deals out what is left.

        Raises:
            CursorError: the cursor names windows or rows that do not exist.
        """
        known = range(len(rows))
        if any(w not in known for w in (*cursor.finished, *cursor.begun, *cursor.dealt)) or any(
            not 0 <= taken <= rows[w] for w, taken in cursor.begun.items()
        ):
            raise CursorError(f"cursor: it names windows or rows beyond the {len(rows)} windows of this epoch")
        dealt = cursor.dealt if cursor.workers == workers else cursor.finished
        start = Cursor(cursor.plan, cursor.epoch, workers, cursor.finished, dict(cursor.begun), dealt)
        return cls(rows, start, batch_size)

    def share(self, rank: int) -> int:
        """Rows that a rank takes per step while it has any."""
        return self.batch_size // self.start.workers + (rank < self.batch_size % self.start.workers)

    def queue(self, rank: int) -> list[tuple[int, int]]:
        """(window, rows already taken) still to be read by a rank, in order."""
        left = [window for window in range(len(self.rows)) if window not in self.start.dealt]
        mine = left[rank :: self.start.workers]
        return [(window, self.start.begun.get(window, 0)) for window in mine if window not in self.start.finished]

    @cached_property
    def _left(self) -> list[int]:
        ranks = range(self.start.workers)
        return [sum(self.rows[window] - taken for window, taken in self.queue(rank)) for rank in ranks]

    @cached_property
    def steps(self) -> int:
        """Steps to the end of the epoch, the same for all ranks; those without rows take part with empty batches."""
        return max(-(-left // self.share(rank)) if left else 0 for rank, left in enumerate(self._left))

    def step_rows(self, rank: int, step: int) -> int:
        """Rows that a rank takes in a step, counted from `start`."""
        share = self.share(rank)
        return max(0, min(share, self._left[rank] - step * share))

    def global_rows(self, step: int) -> int:
        """Rows of a step over all ranks."""
        return sum(self.step_rows(rank, step) for rank in range(self.start.workers))

    def after(self, rank: int, rows: int) -> Cursor:
        """The cursor of a rank that has taken `rows` rows since `start`."""
        finished, begun = set(self.start.finished), dict(self.start.begun)
        for window, taken in self.queue(rank):
            if rows <= 0:
                break
            step = min(rows, self.rows[window] - taken)
            rows -= step
            if taken + step == self.rows[window]:
                finished.add(window)
                begun.pop(window, None)
            else:
                begun[window] = taken + step
        start = self.start
        return Cursor(start.plan, start.epoch, start.workers, frozenset(finished), begun, start.dealt)
