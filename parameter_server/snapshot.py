"""The cut: all rows of a shard as they were at one moment, while pushes go on.

Copy-on-write by rows. From `Shard.mark` on, whoever changes a row of a block that is not taken yet first saves its
pre-image, once. Taking a block copies it as it is now and lays the pre-images over the copy.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from threading import RLock

import numpy as np

from . import failpoints
from .jit import jit
from .ledger import Ledger
from .memory import SlabMemory, reserve, split_block
from .tables import Slab, TableSpec
from .validation import readable

LEDGER = "ledger/"  # prefix of a block's ledger tensors

U64 = np.uint64


@jit
def save_rows(
    index: np.ndarray,
    rows_per_block: int,
    pending: np.ndarray,
    saved: np.ndarray,
    head: np.ndarray,
    chain: np.ndarray,
    pool: np.ndarray,
    pool_weights: np.ndarray,
    pool_state: np.ndarray,
    weights: np.ndarray,
    state: np.ndarray,
) -> None:
    """Saves the pre-images of those rows in `index` whose block is pending and that are not saved yet.

    saved: uint8 bitmap of slab rows; head: int64 [blocks], each block's latest entry or -1; chain: int64 [C, 2], the
    slab row of an entry and the next entry of its block; pool: int64 [3], first free entry or -1, entries ever used,
    entries in use.
    """
    for i in range(len(index)):
        row = np.int64(index[i])
        block = row // np.int64(rows_per_block)
        bit = np.uint8(1 << (row & 7))
        if not pending[block] or saved[row >> 3] & bit:
            continue
        saved[row >> 3] |= bit
        pool[2] += 1
        entry = pool[0]
        if entry >= 0:
            pool[0] = chain[entry, 1]
        else:
            entry = pool[1]
            pool[1] += 1
        chain[entry, 0] = row
        chain[entry, 1] = head[block]
        head[block] = entry
        for j in range(weights.shape[1]):
            pool_weights[entry, j] = weights[row, j]
        for j in range(state.shape[1]):
            pool_state[entry, j] = state[row, j]


@jit
def restore_rows(
    block: int,
    rows_per_block: int,
    head: np.ndarray,
    chain: np.ndarray,
    pool: np.ndarray,
    pool_weights: np.ndarray,
    pool_state: np.ndarray,
    weights: np.ndarray,
    state: np.ndarray,
) -> None:
    """Lays a block's pre-images over a copy of it (weights, state) and frees their entries."""
    entry = head[block]
    head[block] = -1
    while entry >= 0:
        row = chain[entry, 0] - np.int64(block) * np.int64(rows_per_block)
        for j in range(weights.shape[1]):
            weights[row, j] = pool_weights[entry, j]
        for j in range(state.shape[1]):
            state[row, j] = pool_state[entry, j]
        after = chain[entry, 1]
        pool[2] -= 1
        chain[entry, 1] = pool[0]
        pool[0] = entry
        entry = after


def bytes_per_row(slab: Slab) -> int:
    """Memory of one pre-image."""
    return 16 + 4 * (slab.width + slab.state_width)


class SlabCut:
    """The pre-images of one slab. Address space for every owned row, memory for those that changed."""

    def __init__(self, memory: SlabMemory, owned_blocks: int) -> None:
        slab = memory.slab
        self.memory = memory
        capacity = owned_blocks * slab.rows_per_block
        self._saved = np.frombuffer(reserve(slab.blocks * slab.rows_per_block // 8 + 1, "copy on write"), np.uint8)
        self._head = np.full(slab.blocks, -1, np.int64)
        self._pool = np.array([-1, 0, 0], np.int64)
        self._chain = np.frombuffer(reserve(16 * capacity, "copy on write"), np.int64, 2 * capacity).reshape(-1, 2)
        self._weights = _float_rows(capacity, slab.width)
        self._state = _float_rows(capacity, slab.state_width)

    @property
    def entries(self) -> int:
        """The most pre-images held at one time so far."""
        return int(self._pool[1])

    @property
    def bytes(self) -> int:
        """Memory of the pre-images held now."""
        return int(self._pool[2]) * bytes_per_row(self.memory.slab)

    def save(self, index: np.ndarray, pending: np.ndarray) -> None:
        """To be called before the rows `index` change. pending: bool [blocks]."""
        save_rows(
            index,
            self.memory.slab.rows_per_block,
            pending,
            self._saved,
            self._head,
            self._chain,
            self._pool,
            self._weights,
            self._state,
            self.memory.weights,
            self.memory.state,
        )

    def copy_block(self, block: int) -> tuple[np.ndarray, np.ndarray]:
        """The block at the cut: weights and state. Forgets its pre-images."""
        weights, state = (array.copy() for array in self.memory.block(block))
        restore_rows(
            block,
            self.memory.slab.rows_per_block,
            self._head,
            self._chain,
            self._pool,
            self._weights,
            self._state,
            weights,
            state,
        )
        return weights, state


def _float_rows(rows: int, width: int) -> np.ndarray:
    if width == 0:
        return np.empty((rows, 0), np.float32)
    space = reserve(4 * rows * width, "copy on write")
    return np.frombuffer(space, np.float32, rows * width).reshape(rows, width)


class Snapshot:
    """A shard's blocks at one moment. `take` each block once; `close` when done or given up."""

    def __init__(
        self,
        shard: int,
        slabs: Sequence[SlabMemory],
        held: np.ndarray,
        ledger: Ledger,
        lock: RLock,
        on_close: Callable[[], None],
    ) -> None:
        self.shard = shard
        self.closed = False
        self.blocks: list[int] = np.flatnonzero(held).tolist()
        self.tables: list[TableSpec] = [spec for memory in slabs for spec in memory.slab.tables]
        self._cuts = [SlabCut(memory, len(self.blocks)) for memory in slabs]
        self._pending = held.copy()
        self._ledger = ledger.copy()
        self._lock = lock
        self._on_close = on_close

    def save(self, slab: int, index: np.ndarray) -> None:
        """Called by the shard, which holds its lock, before it changes rows."""
        if slab < len(self._cuts) and not failpoints.active("cut"):  # a slab created after the cut is not in it
            self._cuts[slab].save(index, self._pending)

    @property
    def bytes(self) -> int:
        """Memory of the pre-images held now."""
        return sum(cut.bytes for cut in self._cuts)

    def is_pending(self, block: int) -> bool:
        """Whether a block is still to be taken."""
        return bool(self._pending[block])

    def take(self, block: int) -> dict[str, np.ndarray]:
        """One block at the cut, by table (see `split_block`), and its ledger under "ledger/...".

        Holds the shard's lock only while the block is copied.

        Raises:
            KeyError: the block is not part of the cut, or was taken before.
        """
        with self._lock:
            if not self._pending[block]:
                raise KeyError(f"block {block} is not in this cut of shard {self.shard}, or was taken before")
            copies = [cut.copy_block(block) for cut in self._cuts]
            self._pending[block] = False
        tensors = {LEDGER + name: value for name, value in self._ledger.export_block(block).items()}
        for cut, (weights, state) in zip(self._cuts, copies, strict=True):
            tensors |= split_block(cut.memory.slab, block, weights, state)
        return tensors

    def close(self) -> None:
        """Ends copy-on-write and frees what it took; blocks not taken are lost to this cut."""
        with self._lock:
            if not self.closed:
                self.closed = True
                self._pending[:] = False
                self._cuts = []
                self._on_close()

    def __enter__(self) -> Snapshot:
        return self

    def __exit__(self, *exc: object) -> None:
        self.close()


def warm_up(index_dtype: np.dtype[np.unsignedinteger]) -> None:
    """Compiles the kernels of a cut for indices of this dtype, or loads them from the cache."""
    cut = SlabCut(SlabMemory(Slab(0, (TableSpec(name="warm-up", rows=1, width=1),), 1)), 1)
    cut.save(readable(np.zeros(1, index_dtype)), np.ones(1, np.bool_))
    cut.copy_block(0)
