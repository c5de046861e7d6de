"""Free functions over arrays: the hot loops of the parameter server behind one name.

`locate` turns the ids of a batch into the distinct rows of a slab; the rest are the kernels a shard runs over its rows.
Each has a numpy oracle in `tests/oracles/`.
"""

from __future__ import annotations

import threading

import numpy as np

from . import placement_kernels as _placement
from . import row_kernels as _rows
from .placement_kernels import mix64, permute, rows_of_share, share_rows, unpermute
from .requests import RowSet
from .row_kernels import (
    add_rows,
    all_finite,
    check_rows,
    gather,
    initialise,
    update_adagrad,
    update_adam,
    update_rowwise_adagrad,
    update_sgd,
)
from .tables import Initializer, Slab, TableError, TableSpec

__all__ = [
    "add_rows",
    "all_finite",
    "check_rows",
    "gather",
    "initialise",
    "locate",
    "mix64",
    "permute",
    "row_of",
    "rows_of_share",
    "share_rows",
    "unpermute",
    "update_adagrad",
    "update_adam",
    "update_rowwise_adagrad",
    "update_sgd",
    "warm_up",
]


class _Scratch(threading.local):
    """Arrays that `locate` reuses from call to call; grown, never shrunk, one set per thread."""

    def __init__(self) -> None:
        self.slots = np.zeros((1, 2), np.uint64)
        self.stamp = np.uint64(0)
        self.unique = np.empty(0, np.uint64)
        self.slab_rows = np.empty(0, np.uint64)
        self.position = np.empty(0, np.int32)

    def reserve(self, rows: int, rows_of_one_table: int, segments: int) -> np.ndarray:
        """Makes room; returns the part of the slots to use: few ids stay in few cache lines."""
        needed = 1 << max(4, (2 * rows_of_one_table - 1).bit_length())
        if needed > len(self.slots) or int(self.stamp) + segments >= 2**32:
            self.slots = np.zeros((max(needed, len(self.slots)), 2), np.uint64)
            self.stamp = np.uint64(0)
        if rows > len(self.unique):
            self.unique = np.empty(rows, np.uint64)
            self.slab_rows = np.empty(rows, np.uint64)
            self.position = np.empty(rows, np.int32)
        return self.slots[:needed]


_scratch = _Scratch()


def locate(
    slab: Slab, tables: np.ndarray, segments: np.ndarray, rows: np.ndarray, block_rank: np.ndarray
) -> tuple[RowSet, np.ndarray]:
    """The distinct slab rows behind the rows of a batch, and where each row of the batch is found among them.

    Args:
        slab: whose tables are meant.
        tables: int32 [S], the slab's table for each segment; a table may stand in several.
        segments: int64 [S + 1], where each segment of `rows` begins.
        rows: int64 [N], rows of those tables.
        block_rank: uint16 [blocks], the order of blocks (`BlockMap.rank`), so that a shard's blocks are neighbours.

    Returns:
        The distinct rows grouped by block in that order, and inverse, int32 [N]: rows[i] is entry inverse[i] of their
        index. Within a block: by table, then by first occurrence in `rows`.

    Raises:
        TableError: a row below 0 or beyond its table's end; names both.
    """
    tables = np.asarray(tables)
    order = np.argsort(tables, kind="stable")
    sizes = np.diff(segments)
    per_table = np.bincount(tables, weights=sizes, minlength=1) if len(tables) else np.zeros(1)
    slots = _scratch.reserve(len(rows), int(per_table.max()), len(tables))
    inverse = np.empty(len(rows), np.int32)
    unique_end = np.empty(len(tables), np.int64)
    count, wrong, stamp = _placement.distinct_rows(
        tables, order, segments, rows, slab.rows, slots, _scratch.stamp, inverse, _scratch.unique, unique_end
    )
    _scratch.stamp = np.uint64(stamp)
    if wrong >= 0:
        spec = slab.tables[tables[np.searchsorted(segments, wrong, side="right") - 1]]
        raise TableError(f"table {spec.name!r} has no row {rows[wrong]}: its rows are 0 to {spec.rows - 1}")
    _placement.place_rows(
        tables,
        order,
        _scratch.unique,
        unique_end,
        slab.rows,
        slab.keys,
        slab.base,
        block_rank,
        _scratch.position,
        _scratch.slab_rows,
    )
    index = np.empty(count, slab.index_dtype)
    counts = np.empty(slab.blocks, np.int64)
    _placement.group_by_rank(int(count), _scratch.unique, _scratch.slab_rows, counts, _scratch.position, index, inverse)
    ranks = np.flatnonzero(counts)
    blocks = np.argsort(block_rank, kind="stable")[ranks].astype(np.uint16)
    return RowSet(slab.id, index, blocks, counts[ranks].astype(np.uint32)), inverse


def row_of(slab: Slab, slab_row: int) -> tuple[TableSpec, int]:
    """The table and row behind a slab row, for messages. A padding place answers with row -1."""
    block, inside = divmod(int(slab_row), slab.rows_per_block)
    table = int(np.searchsorted(slab.base, inside, side="right")) - 1
    spec = slab.tables[table]
    place = inside - int(slab.base[table])
    position = place * slab.blocks + (block - spec.key) % slab.blocks
    return spec, int(unpermute(position, spec.rows, np.uint64(spec.key))) if position < spec.rows else -1


INITIALIZERS = {"uniform": _rows.UNIFORM, "normal": _rows.NORMAL, "constant": _rows.CONSTANT}


def initialise_share(weights: np.ndarray, spec: TableSpec, block: int, blocks: int, seed: int) -> None:
    """Fills `weights`, one block's share [share, width] of a table, with the table's initial values."""
    chosen: Initializer = spec.initializer
    initialise(
        weights,
        block,
        blocks,
        spec.rows,
        np.uint64(spec.key),
        np.uint64(seed % 2**64),
        INITIALIZERS[chosen.kind],
        float(chosen.scale),
    )


def warm_up(index_dtype: np.dtype[np.unsignedinteger] | None = None) -> None:
    """Compiles every kernel that a shard or its client calls, or loads it from the cache; uint32 rows by default.

    So nothing is compiled inside a served request. Cheap when it has been done before.
    """
    dtype = np.dtype(np.uint32) if index_dtype is None else index_dtype
    if dtype in _warm:
        return
    _warm.add(dtype)
    index = np.zeros(1, dtype)
    index.flags.writeable = False
    grads = np.zeros((1, 1), np.float32)
    grads.flags.writeable = False
    weights, rate = np.zeros((1, 1), np.float32), np.float32(0.0)
    blocks, counts = np.zeros(1, np.uint16), np.ones(1, np.uint32)
    blocks.flags.writeable = counts.flags.writeable = False
    initialise(weights, 0, 1, 1, np.uint64(0), np.uint64(0), _rows.CONSTANT, 0.0)
    gather(weights, index, np.empty_like(weights))
    update_sgd(weights, index, grads, rate)
    update_adagrad(weights, weights, index, grads, rate, rate)
    update_rowwise_adagrad(weights, weights, index, grads, rate, rate)
    update_adam(weights, np.zeros((1, 3), np.float32), index, grads, rate, np.float32(1), rate, rate)
    all_finite(grads.reshape(-1).view(np.uint32))
    check_rows(index, blocks, counts, 1, 1)
    add_rows(np.full(4, -1, np.int64), index, grads, np.empty(1, dtype), np.empty((1, 1), np.float32), 0)
    slab = Slab(0, (TableSpec(name="warm-up", rows=1, width=1),), 1)
    found, _ = locate(slab, np.zeros(1, np.int32), np.array([0, 1]), np.zeros(1, np.int64), np.zeros(1, np.uint16))
    row_of(slab, int(found.index[0]))
    rows_of_share(0, 1, 1, np.uint64(0), np.empty(share_rows(0, 1, 1, np.uint64(0)), np.int64))


_warm: set[np.dtype[np.unsignedinteger]] = set()
