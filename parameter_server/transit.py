"""Blocks on their way from one shard to another: what changed since it was copied, what is sealed, what has arrived.

A block is copied while it is served. From the moment the copy begins, the rows that change are noted; they are sent
after it, as they are then, as often as it pays. The block is sealed for the last of these rounds alone.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np

from .jit import jit
from .ledger import FIELDS, Ledger
from .memory import SlabMemory, reserve
from .snapshot import LEDGER
from .store import StoreError
from .tables import Slab, TableSpec
from .validation import readable

Part = tuple[np.ndarray | None, np.ndarray, np.ndarray]  # rows within the block (None: all), weights, state


@jit
def note_rows(index: np.ndarray, rows_per_block: int, leaving: np.ndarray, changed: np.ndarray) -> None:
    """Sets the bits of those rows in `index` whose block is leaving. changed: uint8 bitmap of slab rows."""
    for i in range(len(index)):
        row = np.int64(index[i])
        if leaving[row // np.int64(rows_per_block)]:
            changed[row >> 3] |= np.uint8(1 << (row & 7))


@jit
def take_rows(first: int, end: int, changed: np.ndarray, out: np.ndarray) -> int:
    """Clears the bits of rows [first, end) and writes the rows they stood for to `out` (int64); returns how many."""
    count = 0
    row = np.int64(first)
    while row < end:
        byte = changed[row >> 3]
        if byte == 0:
            row = ((row >> 3) + 1) << 3
            continue
        bit = np.uint8(1 << (row & 7))
        if byte & bit:
            changed[row >> 3] = byte & ~bit
            out[count] = row
            count += 1
        row += 1
    return count


class Transit:
    """The blocks of one shard that are on their way; its owner holds the shard's lock."""

    def __init__(self, blocks: int) -> None:
        self.leaving = np.zeros(blocks, np.bool_)
        self.sealed = np.zeros(blocks, np.bool_)
        self.arrived = np.zeros(blocks, np.bool_)
        self.move = ""  # which one of the coordinator's the blocks belong to
        self._changed: list[np.ndarray] = []

    @property
    def busy(self) -> bool:
        """Whether a sealed block waits for the end of its move."""
        return bool(self.sealed.any())

    def begin(self, memory: Sequence[SlabMemory], block: int, move: str) -> dict[str, np.ndarray]:
        """Notes from now on what changes in a block; returns views of its rows: read them without any lock.

        A row that changes while it is read is noted, and sent again with the changes.
        """
        self._belongs_to(move)
        if not self.leaving.any():
            self._changed = [_bitmap(slab.slab) for slab in memory]
        self.leaving[block] = True
        tensors = {}
        for slab in memory:
            tensors[f"{slab.slab.id}/weights"], tensors[f"{slab.slab.id}/state"] = slab.block(block)
        return tensors

    def note(self, slab: int, index: np.ndarray, rows_per_block: int) -> None:
        """To be called with the lock held when the rows `index` change."""
        if self.leaving.any():
            note_rows(index, rows_per_block, self.leaving, self._changed[slab])

    def changes(self, memory: Sequence[SlabMemory], ledger: Ledger, block: int) -> dict[str, np.ndarray]:
        """The rows of a leaving block that changed since the last time, as they are now, and the block's ledger."""
        tensors = {LEDGER + name: value for name, value in ledger.export_block(block).items()}
        for slab, changed in zip(memory, self._changed, strict=True):
            first = block * slab.slab.rows_per_block
            rows = np.empty(slab.slab.rows_per_block, np.int64)
            rows = rows[: take_rows(first, first + len(rows), changed, rows)]
            tensors[f"{slab.slab.id}/rows"] = rows - first
            tensors[f"{slab.slab.id}/weights"] = slab.weights[rows]
            tensors[f"{slab.slab.id}/state"] = slab.state[rows]
        return tensors

    def checked(
        self, memory: Sequence[SlabMemory], block: int, move: str, tensors: Mapping[str, np.ndarray]
    ) -> list[Part]:
        """What `begin` or `changes` of the other shard gave, by slab, fit to be written.

        Raises:
            StoreError: changes without the block, or tensors of other tables than this shard's.
        """
        parts = [_part(slab.slab, tensors) for slab in memory]
        whole = all(rows is None for rows, _, _ in parts)
        if not whole and not (self.arrived[block] and self.move == move):
            raise StoreError(f"block {block}: changes came before the block itself: begin its move again")
        return parts

    def receive(
        self,
        memory: Sequence[SlabMemory],
        ledger: Ledger,
        block: int,
        move: str,
        parts: Sequence[Part],
        tensors: Mapping[str, np.ndarray],
    ) -> None:
        """Writes what has been `checked`, and the ledger that came with it."""
        self._belongs_to(move)
        for slab, (rows, weights, state) in zip(memory, parts, strict=True):
            own_weights, own_state = slab.block(block)
            where = slice(None) if rows is None else rows
            own_weights[where], own_state[where] = weights, state
        if f"{LEDGER}client" in tensors:
            ledger.import_block(block, {name: tensors[LEDGER + name] for name in FIELDS})
        self.arrived[block] = True

    def _belongs_to(self, move: str) -> None:
        """With the first block of a move, every other one is over: its coordinator is gone, or has given it up."""
        if move != self.move:
            self.cancel()
            self.move = move

    def check_leaving(self, block: int, move: str) -> None:
        """Raises StoreError if the block is not on its way with this move: it has to begin again."""
        if not self.leaving[block] or self.move != move:
            raise StoreError(f"block {block} is not on its way to another shard: begin its move again")

    def cancel(self, blocks: np.ndarray | slice = slice(None)) -> None:
        """These blocks are on their way no longer; what arrived of them is forgotten."""
        self.leaving[blocks] = False
        self.sealed[blocks] = False
        self.arrived[blocks] = False
        if not self.leaving.any():
            self._changed = []


def _bitmap(slab: Slab) -> np.ndarray:
    return np.frombuffer(
        reserve(slab.blocks * slab.rows_per_block // 8 + 1, "rows that change during a move"), np.uint8
    )


def _part(slab: Slab, tensors: Mapping[str, np.ndarray]) -> Part:
    """One slab's rows within the block (None: all), weights and state, checked against this shard's slab."""
    try:
        weights, state = tensors[f"{slab.id}/weights"], tensors[f"{slab.id}/state"]
    except KeyError as error:
        raise StoreError(f"a block came without {error}: the shards do not have the same tables") from None
    rows = tensors.get(f"{slab.id}/rows")
    count = slab.rows_per_block if rows is None else len(rows)
    if weights.shape != (count, slab.width) or state.shape != (count, slab.state_width):
        raise StoreError(
            f"a block came with {list(weights.shape)} weights and {list(state.shape)} state for slab {slab.id}, which "
            f"has {slab.rows_per_block} x {slab.width} and {slab.state_width}: the shards do not have the same tables"
        )
    if rows is not None and len(rows) and not 0 <= int(rows.min()) <= int(rows.max()) < slab.rows_per_block:
        raise StoreError(f"a block came with a row beyond the {slab.rows_per_block} rows of slab {slab.id}")
    return rows, weights, state


def warm_up(index_dtype: np.dtype[np.unsignedinteger]) -> None:
    """Compiles the kernels of a move for indices of this dtype, or loads them from the cache."""
    memory = SlabMemory(Slab(0, (TableSpec(name="warm-up", rows=1, width=1),), 1))
    transit = Transit(1)
    transit.begin([memory], 0, "warm-up")
    transit.note(0, readable(np.zeros(1, index_dtype)), 1)
    transit.changes([memory], Ledger(1), 0)
