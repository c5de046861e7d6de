"""Which shard hears which rows of a call. Pure; no I/O."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from .requests import RowSet


@dataclass(slots=True)
class Share:
    """What one shard answers for of one part of a call.

    part: which part; rows: the share itself; where: its rows within the part's arrays, a slice where they stand in one
    piece (always, until blocks move between planning and sending), otherwise int64 positions.
    """

    part: int
    rows: RowSet
    where: slice | np.ndarray

    def select(self, keep: np.ndarray) -> Share:
        """The share of the blocks where `keep` (bool [K]) is true."""
        rows, mask = self.rows.select(keep)
        where = self.where
        positions = np.arange(where.start, where.stop) if isinstance(where, slice) else where
        return Share(self.part, rows, positions[mask])


def regroup(shares: Sequence[Share], owners: np.ndarray) -> dict[int, list[Share]]:
    """Shares divided among the owners (uint16 [blocks]) of their blocks."""
    by_owner: dict[int, list[Share]] = {}
    for share in shares:
        owner = owners[share.rows.blocks]
        for shard in np.unique(owner).tolist():
            by_owner.setdefault(shard, []).append(share.select(owner == shard))
    return by_owner


def split(parts: Sequence[RowSet], owners: np.ndarray) -> dict[int, list[Share]]:
    """Divides the parts of a call among the owners (uint16 [blocks]) of their blocks, in part order for each shard."""
    shares: dict[int, list[Share]] = {}
    for number, rows in enumerate(parts):
        if len(rows.blocks) == 0:
            continue
        owner = owners[rows.blocks]
        starts = [0, *((owner[1:] != owner[:-1]).nonzero()[0] + 1).tolist()]
        run_owner = owner[starts].tolist()
        if len(set(run_owner)) < len(run_owner):
            whole = Share(number, rows, slice(0, len(rows.index)))
            for shard in sorted(set(run_owner)):
                shares.setdefault(shard, []).append(whole.select(owner == shard))
            continue
        blocks = [*starts, len(owner)]
        first = [0, *np.cumsum(np.add.reduceat(rows.counts, starts, dtype=np.int64)).tolist()]
        for run, shard in enumerate(run_owner):
            where = slice(first[run], first[run + 1])
            these = slice(blocks[run], blocks[run + 1])
            share = RowSet(rows.slab, rows.index[where], rows.blocks[these], rows.counts[these])
            shares.setdefault(shard, []).append(Share(number, share, where))
    return shares
