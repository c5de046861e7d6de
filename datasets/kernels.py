"""Mixing, shuffling, gathering from Arrow buffers, counting distinct ids: free functions over arrays.

A window's rows are named by *references*: int64, chunk << 32 | row within the chunk (a chunk is one decoded row group).
Arrow buffers come as addresses, so that one call serves every column and chunk of a batch; the caller keeps them alive.
"""

from __future__ import annotations

from typing import Any

import numba
import numpy as np
from numba.core import types
from numba.extending import intrinsic

from .jit import jit

Array = np.ndarray[Any, Any]

# Storage types that the gather kernels read; everything else is cast before.
INT8, INT32, INT64, FLOAT32, FLOAT64 = range(5)
LOG1P_TABLE = np.log1p(np.arange(4096, dtype=np.float64)).astype(np.float32)
_ROW = np.uint64(0xFFFFFFFF)


@intrinsic
def _load(typing_context: Any, address: Any, place: Any, kind: Any) -> Any:
    """The element of type `kind` at `place` of an array that begins at `address`."""

    def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        pointer = builder.inttoptr(arguments[0], context.get_value_type(kind.dtype).as_pointer())
        return builder.load(builder.gep(pointer, [arguments[1]]))

    return kind.dtype(types.uint64, types.uint64, kind), generate


@jit
def mix(value: np.uint64, seed: np.uint64) -> np.uint64:
    """splitmix64's finalizer (Steele, Lea, Flood 2014) of uint64 `value` offset by uint64 `seed`; returns uint64."""
    z = np.uint64(value) * np.uint64(0x9E3779B97F4A7C15) + np.uint64(seed)
    z = (z ^ (z >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    z = (z ^ (z >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return z ^ (z >> np.uint64(31))


@jit
def shuffle(items: Array, key: np.uint64) -> None:
    """Fisher-Yates in place, int64 [N], N < 2^32; uint64 `key` alone decides, on every machine and version."""
    for i in range(len(items) - 1, 0, -1):
        drawn = mix(np.uint64(i), np.uint64(key)) >> np.uint64(32)
        j = np.int64((drawn * np.uint64(i + 1)) >> np.uint64(32))
        items[i], items[j] = items[j], items[i]


@jit
def references(rows: Array) -> Array:
    """int64 [sum(rows)]: the references of all rows of chunks with `rows` int64 [C], in order."""
    out = np.empty(rows.sum(), np.int64)
    at = 0
    for chunk in range(len(rows)):
        for row in range(rows[chunk]):
            out[at] = (chunk << 32) | row
            at += 1
    return out


@jit
def _is_valid(bitmap: np.uint64, bit: np.uint64) -> Any:
    """Bit `bit` of the Arrow validity bitmap at an address; address 0 means that nothing is null."""
    return bitmap == 0 or (_load(bitmap, bit >> np.uint64(3), numba.uint8) >> (bit & np.uint64(7))) & 1 == 1


@jit
def _chunk_row(reference: np.int64) -> Any:
    """Unsigned, so that indexing needs no check for negative numbers."""
    return np.uint64(reference) >> np.uint64(32), np.uint64(reference) & _ROW


@jit
def gather_labels(rows: Array, data: Array, valid: Array, bit: Array, out: Array) -> int:
    """out float32 [N] = the labels of the references `rows` int64 [N]; int8 storage at uint64 [C] addresses.

    valid uint64 [C]: addresses of the bitmaps, 0 where nothing is null; bit uint64 [C]: offsets into them. Returns -1,
    or the place in `rows` of the first label that is not 0 or 1.
    """
    for i in range(len(rows)):
        chunk, row = _chunk_row(rows[i])
        label = _load(data[chunk], row, numba.int8)
        if (label != 0 and label != 1) or not _is_valid(valid[chunk], bit[chunk] + row):
            return i
        out[i] = label
    return -1


@jit
def _gather(rows: Array, kind: int, data: Array, out: Array) -> None:
    """One column, uint64 [C] addresses, into out [N] of any type."""
    if kind == INT64:
        for i in range(len(rows)):
            chunk, row = _chunk_row(rows[i])
            out[i] = _load(data[chunk], row, numba.int64)
    elif kind == INT32:
        for i in range(len(rows)):
            chunk, row = _chunk_row(rows[i])
            out[i] = _load(data[chunk], row, numba.int32)
    elif kind == FLOAT32:
        for i in range(len(rows)):
            chunk, row = _chunk_row(rows[i])
            out[i] = _load(data[chunk], row, numba.float32)
    else:
        for i in range(len(rows)):
            chunk, row = _chunk_row(rows[i])
            out[i] = _load(data[chunk], row, numba.float64)


@jit
def _fill_nulls(rows: Array, valid: Array, bit: Array, value: Any, out: Array) -> None:
    if valid.any():
        for i in range(len(rows)):
            chunk, row = _chunk_row(rows[i])
            out[i] = out[i] if _is_valid(valid[chunk], bit[chunk] + row) else value


@jit
def gather_ids(
    rows: Array, first: int, share: int, kinds: Array, data: Array, valid: Array, bit: Array, missing: int, out: Array
) -> None:
    """The ids of F features of the references `rows` int64 [N], nulls as `missing`, cut into batches.

    Batches end after `first` rows and then every `share` rows; batch by batch, out int64 [F * N] holds [F, rows of the
    batch]. A column is read for the whole window before the next, so that it stays in the cache.

    kinds int64 [F]: INT32 or INT64; data, valid, bit uint64 [F, C] as in `gather_labels`.
    """
    features = len(kinds)
    for f in range(features):
        begin, end = 0, min(first, len(rows))
        while begin < len(rows):
            at = features * begin + f * (end - begin)
            part = out[at : at + end - begin]
            _gather(rows[begin:end], kinds[f], data[f], part)
            _fill_nulls(rows[begin:end], valid[f], bit[f], missing, part)
            begin, end = end, min(end + share, len(rows))


@jit
def _log1p(value: np.float64, table: Array) -> Any:
    clipped = max(value, 0.0)
    whole = np.uint64(clipped)
    return table[whole] if whole < len(table) and whole == clipped else np.float32(np.log1p(clipped))


@jit
def gather_dense(
    rows: Array,
    kinds: Array,
    data: Array,
    valid: Array,
    bit: Array,
    log1p: bool,
    table: Array,
    out: Array,
) -> int:
    """out float32 [N, D] = dense values of the references `rows` int64 [N], nulls as 0.

    kinds int64 [D]; data, valid, bit uint64 [D, C] as in `gather_labels`; log1p: ln(max(x, 0) + 1) instead of x,
    through `table` (LOG1P_TABLE) for small integers. Returns -1, or place * D + column of a value that is NaN or
    infinite.
    """
    width, bad = len(kinds), -1
    column, columns = np.empty(len(rows), np.float64), np.empty((width, len(rows)), np.float32)
    for k in range(width):
        _gather(rows, kinds[k], data[k], column)
        _fill_nulls(rows, valid[k], bit[k], 0.0, column)
        for i in range(len(rows)):
            value = column[i]
            if not np.isfinite(value):
                bad, value = i * width + k, 0.0
            columns[k, i] = _log1p(value, table) if log1p else value
    for i in range(len(rows)):
        for k in range(width):
            out[i, k] = columns[k, i]
    return bad


@jit
def count_distinct(ids: Array, present: Array, precision: int, registers: Array) -> None:
    """HyperLogLog: ids int64 [F, B] where present bool [F, B] into registers uint8 [F, 2^precision]."""
    for f in range(len(registers)):
        for b in range(ids.shape[1]):
            if present[f, b]:
                hashed = mix(np.uint64(ids[f, b]), np.uint64(0x5851F42D4C957F2D))
                register = np.int64(hashed >> np.uint64(64 - precision))
                rest = hashed << np.uint64(precision)
                rank = 1
                while rank <= 64 - precision and (rest >> np.uint64(63)) == 0:
                    rest <<= np.uint64(1)
                    rank += 1
                if rank > registers[f, register]:
                    registers[f, register] = rank


def warm_up() -> None:
    """Compiles the kernels of the reader, or loads them from the cache, so that no batch waits for the compiler."""
    rows = references(np.ones(1, np.int64))
    shuffle(rows, np.uint64(mix(np.uint64(0), np.uint64(0))))
    value = np.zeros(1, np.int64)
    address, none = np.full((1, 1), value.ctypes.data, np.uint64), np.zeros((1, 1), np.uint64)
    kinds = np.full(1, INT64)
    gather_labels(rows, address[0], none[0], none[0], np.empty(1, np.float32))
    gather_dense(rows, kinds, address, none, none, True, LOG1P_TABLE, np.empty((1, 1), np.float32))
    gather_ids(rows, 1, 1, kinds, address, none, none, -1, np.empty(1, np.int64))
    count_distinct(value.reshape(1, 1), np.ones((1, 1), np.bool_), 1, np.zeros((1, 2), np.uint8))
