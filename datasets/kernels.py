"""Mixing, shuffling, gathering from Arrow buffers, counting distinct ids: free functions over arrays.

A window's rows are named by *references*: int64, chunk << 32 | row within the chunk (a chunk is one decoded row group).
Arrow buffers come as addresses, so that one call serves every column and chunk of a batch; the caller keeps them alive.
"""

from __future__ import annotations

from typing import Any

import numba
import numpy as np
from numba.core import cgutils, types
from numba.extending import intrinsic

from .jit import jit

Array = np.ndarray[Any, Any]

# Storage types that the gather kernels read; everything else is cast before.
INT8, INT32, INT64, FLOAT32, FLOAT64 = range(5)
LOG1P_TABLE = np.log1p(np.arange(4096, dtype=np.float64)).astype(np.float32)
_HUGE = 1 << 48
_ROW = 0xFFFFFFFF


@intrinsic
def _pointer(typing_context: Any, address: Any) -> Any:
    def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        return builder.inttoptr(arguments[0], cgutils.voidptr_t)

    return types.voidptr(types.uint64), generate


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
def _is_valid(bitmap: int, bit: int) -> bool:
    """Bit `bit` of the Arrow validity bitmap at an address; address 0 means that nothing is null."""
    if bitmap == 0:
        return True
    byte = numba.carray(_pointer(bitmap), (_HUGE,), np.uint8)[bit >> 3]
    return bool((byte >> (bit & 7)) & 1)


@jit
def gather_labels(rows: Array, at: int, data: Array, valid: Array, bit: Array, out: Array) -> int:
    """out float32 [B] from `at` on = the labels of the references `rows`; int8 storage, per chunk uint64 [C] addresses.

    Returns -1, or the place in `rows` of the first label that is not 0 or 1.
    """
    for b in range(len(rows)):
        chunk, row = rows[b] >> 32, rows[b] & _ROW
        label = numba.carray(_pointer(data[chunk]), (_HUGE,), np.int8)[row]
        if (label != 0 and label != 1) or not _is_valid(valid[chunk], bit[chunk] + row):
            return b
        out[at + b] = label
    return -1


@jit
def gather_ids(
    rows: Array, at: int, kinds: Array, data: Array, valid: Array, bit: Array, missing: int, out: Array
) -> None:
    """out int64 [F, B] from column `at` on = ids of the references `rows`, nulls as `missing`.

    kinds: int64 [F], INT32 or INT64; data, valid uint64 [F, C] addresses; bit int64 [F, C] offsets into the bitmaps.
    """
    for f in range(len(kinds)):
        nulls = valid[f].any()
        if kinds[f] == INT64:
            for b in range(len(rows)):
                out[f, at + b] = numba.carray(_pointer(data[f, rows[b] >> 32]), (_HUGE,), np.int64)[rows[b] & _ROW]
        else:
            for b in range(len(rows)):
                out[f, at + b] = numba.carray(_pointer(data[f, rows[b] >> 32]), (_HUGE,), np.int32)[rows[b] & _ROW]
        if nulls:
            for b in range(len(rows)):
                chunk, row = rows[b] >> 32, rows[b] & _ROW
                if not _is_valid(valid[f, chunk], bit[f, chunk] + row):
                    out[f, at + b] = missing


@jit
def _log1p(value: np.float64, table: Array) -> Any:
    if value <= 0:
        return np.float32(0)
    if value < len(table) and value == np.int64(value):
        return table[np.int64(value)]
    return np.float32(np.log1p(value))


@jit
def gather_dense(
    rows: Array,
    at: int,
    kinds: Array,
    data: Array,
    valid: Array,
    bit: Array,
    log1p: bool,
    table: Array,
    out: Array,
) -> int:
    """out float32 [B, D] from row `at` on = dense values of the references `rows`, nulls as 0.

    kinds: int64 [D]; log1p: ln(max(x, 0) + 1) instead of x, through `table` (LOG1P_TABLE) for small integers. Returns
    -1, or place * D + column of a value that is NaN or infinite.
    """
    width, bad = len(kinds), -1
    for k in range(width):
        nulls = valid[k].any()
        for b in range(len(rows)):
            chunk, row = rows[b] >> 32, rows[b] & _ROW
            if nulls and not _is_valid(valid[k, chunk], bit[k, chunk] + row):
                out[at + b, k] = 0
                continue
            pointer = _pointer(data[k, chunk])
            if kinds[k] == INT32:
                value = np.float64(numba.carray(pointer, (_HUGE,), np.int32)[row])
            elif kinds[k] == INT64:
                value = np.float64(numba.carray(pointer, (_HUGE,), np.int64)[row])
            elif kinds[k] == FLOAT32:
                value = np.float64(numba.carray(pointer, (_HUGE,), np.float32)[row])
            else:
                value = numba.carray(pointer, (_HUGE,), np.float64)[row]
            if not np.isfinite(value):
                bad = b * width + k
            out[at + b, k] = _log1p(value, table) if log1p else value
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
    kinds, bit = np.full(1, INT64), np.zeros((1, 1), np.int64)
    gather_labels(rows, 0, address[0], none[0], bit[0], np.empty(1, np.float32))
    gather_dense(rows, 0, kinds, address, none, bit, True, LOG1P_TABLE, np.empty((1, 1), np.float32))
    gather_ids(rows, 0, kinds, address, none, bit, -1, np.empty((1, 1), np.int64))
    count_distinct(value.reshape(1, 1), np.ones((1, 1), np.bool_), 1, np.zeros((1, 2), np.uint8))
