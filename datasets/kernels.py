"""Mixing, shuffling, gathering from Arrow buffers: free functions over arrays.

A window's rows are numbered through its chunks (a chunk is one decoded row group). Arrow buffers come as addresses, so
that one call serves every column and chunk of a window; the caller keeps them alive. A column is first *staged*: its
chunks in one array, nulls filled, values transformed, in the order of the file; then rows are taken from it in the
order of the epoch: what is sequential is cheap, and what is random touches one array that fits the cache.
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
LOG1P, AFFINE = range(2)
_BLOCK = 512  # rows staged at a time, so that rows of dense values stay in the first-level cache


@intrinsic
def _load(typing_context: Any, address: Any, place: Any, kind: Any) -> Any:
    """The element of type `kind` at `place` of an array that begins at `address`."""

    def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        pointer = builder.inttoptr(arguments[0], context.get_value_type(kind.dtype).as_pointer())
        loaded = builder.load(builder.gep(pointer, [arguments[1]]))
        loaded.align = 1  # Arrow aligns buffers, not the words of a string
        return loaded

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
def _is_valid(bitmap: np.uint64, bit: np.uint64) -> Any:
    """Bit `bit` of the Arrow validity bitmap at an address; address 0 means that nothing is null."""
    return bitmap == 0 or _bit(bitmap, bit)


@jit
def _bit(bitmap: np.uint64, bit: np.uint64) -> Any:
    byte = np.uint32(_load(bitmap, bit >> np.uint64(3), numba.uint8))
    return (byte >> np.uint32(bit & np.uint64(7))) & np.uint32(1) != np.uint32(0)


@jit
def stage_ids(kind: int, rows: Array, data: Array, valid: Array, bit: Array, missing: int, out: Array) -> int:
    """out int64 [N] = one column of chunks of `rows` int64 [C], nulls as `missing`.

    kind: INT32 or INT64; data uint64 [C]: addresses of the values; valid uint64 [C]: of the bitmaps, 0 where nothing is
    null; bit uint64 [C]: offsets into them. Returns -1, or the first row whose id is negative and not `missing`.
    """
    at = 0
    for chunk in range(len(rows)):
        part = out[at : at + rows[chunk]]
        address, bitmap, shift, lowest = data[chunk], valid[chunk], bit[chunk], np.int64(0)
        if kind == INT32:
            for i in range(len(part)):
                part[i] = _load(address, np.uint64(i), numba.int32)
        else:
            for i in range(len(part)):
                part[i] = _load(address, np.uint64(i), numba.int64)
        if bitmap != 0:
            for i in range(len(part)):
                part[i] = part[i] if _bit(bitmap, shift + np.uint64(i)) else missing
        for i in range(len(part)):
            lowest = min(lowest, part[i])
        if lowest < 0:
            for i in range(len(part)):
                if part[i] < 0 and part[i] != missing:
                    return at + i
        at += rows[chunk]
    return -1


@jit
def gather_ids(
    order: Array,
    rows: Array,
    first: int,
    share: int,
    kinds: Array,
    data: Array,
    valid: Array,
    bit: Array,
    missing: int,
    out: Array,
) -> int:
    """The ids of F features of the rows `order` int32 [N], cut into batches.

    Batches end after `first` rows and then every `share` rows; batch by batch, out int64 [F * N] holds [F, rows of the
    batch]. kinds int64 [F]; data, valid, bit uint64 [F, C] as in `stage_ids`. Returns -1, or row * F + feature of a
    negative id.
    """
    features, staged = len(kinds), np.empty(rows.sum(), np.int64)
    for f in range(features):
        bad = stage_ids(kinds[f], rows, data[f], valid[f], bit[f], missing, staged)
        if bad >= 0:
            return bad * features + f
        begin, end = 0, min(first, len(order))
        while begin < len(order):
            at = features * begin + f * (end - begin)
            part, taken = out[at : at + end - begin], order[begin:end]
            for i in range(len(taken)):
                part[i] = staged[np.uint64(taken[i])]
            begin, end = end, min(end + share, len(order))
    return -1


@jit
def gather_labels(order: Array, rows: Array, data: Array, valid: Array, bit: Array, out: Array) -> int:
    """out float32 [N] = the labels of the rows `order` int32 [N]; int8 storage, arguments as in `stage_ids`.

    Returns -1, or the first row whose label is not 0 or 1.
    """
    at, staged = 0, np.empty(rows.sum(), np.int8)
    for chunk in range(len(rows)):
        for i in range(rows[chunk]):
            label = _load(data[chunk], np.uint64(i), numba.int8)
            if (label != 0 and label != 1) or not _is_valid(valid[chunk], bit[chunk] + np.uint64(i)):
                return at + i
            staged[at + i] = label
        at += rows[chunk]
    for i in range(len(order)):
        out[i] = staged[np.uint64(order[i])]
    return -1


@jit
def _log1p(value: np.float64, table: Array) -> Any:
    clipped = max(value, 0.0)
    if clipped < len(table):
        whole = np.uint32(np.int32(clipped))
        if whole == clipped:
            return table[whole]
    return np.float32(np.log1p(clipped))


@jit
def _stage_numbers(
    kind: int, begin: int, address: np.uint64, bitmap: np.uint64, shift: np.uint64, null: float, out: Array
) -> int:
    """out float64 [B] = values begin, begin + 1, ... of one chunk, nulls as `null`. -1, or the first not finite."""
    first = np.uint64(begin)
    if kind == INT32:
        for i in range(len(out)):
            out[i] = _load(address, first + np.uint64(i), numba.int32)
    elif kind == INT64:
        for i in range(len(out)):
            out[i] = _load(address, first + np.uint64(i), numba.int64)
    elif kind == FLOAT32:
        for i in range(len(out)):
            out[i] = _load(address, first + np.uint64(i), numba.float32)
    else:
        for i in range(len(out)):
            out[i] = _load(address, first + np.uint64(i), numba.float64)
    if bitmap != 0:
        for i in range(len(out)):
            out[i] = out[i] if _bit(bitmap, shift + first + np.uint64(i)) else null
    if kind >= FLOAT32:
        for i in range(len(out)):
            if not np.isfinite(out[i]):
                return i
    return -1


@jit
def _transform(numbers: Array, transform: int, table: Array, mean: float, scale: float, out: Array) -> None:
    """out [B] (strided) float32 of numbers float64 [B]."""
    if transform == LOG1P:
        for i in range(len(out)):
            out[i] = _log1p(numbers[i], table)
    else:
        for i in range(len(out)):
            out[i] = (numbers[i] - mean) * scale


@jit
def gather_dense(
    order: Array,
    rows: Array,
    kinds: Array,
    data: Array,
    valid: Array,
    bit: Array,
    transform: int,
    table: Array,
    mean: Array,
    scale: Array,
    out: Array,
) -> int:
    """out float32 [N, D] = dense values of the rows `order` int32 [N], nulls as 0.

    kinds int64 [D]; data, valid, bit uint64 [D, C] as in `stage_ids`. transform LOG1P: ln(max(x, 0) + 1), through
    `table` (LOG1P_TABLE) for small integers; AFFINE: (x - mean) * scale, float64 [D] each. Returns -1, or row * D +
    column of a value that is NaN or infinite.
    """
    width, at = len(kinds), 0
    staged, numbers = np.empty((rows.sum(), width), np.float32), np.empty(_BLOCK)
    for chunk in range(len(rows)):
        for begin in range(0, rows[chunk], _BLOCK):
            end = min(begin + _BLOCK, rows[chunk])
            block = numbers[: end - begin]
            for k in range(width):
                bad = _stage_numbers(kinds[k], begin, data[k, chunk], valid[k, chunk], bit[k, chunk], mean[k], block)
                if bad >= 0:
                    return (at + begin + bad) * width + k
                _transform(block, transform, table, mean[k], scale[k], staged[at + begin : at + end, k])
        at += rows[chunk]
    for i in range(len(order)):
        row = np.uint64(order[i])
        for k in range(width):
            out[i, k] = staged[row, k]
    return -1


def warm_up() -> None:
    """Compiles the kernels of the reader, or loads them from the cache, so that no batch waits for the compiler."""
    order, rows = np.arange(1, dtype=np.int32), np.ones(1, np.int64)
    shuffle(order, np.uint64(mix(np.uint64(0), np.uint64(0))))
    shuffle(rows, np.uint64(0))
    value = np.zeros(1, np.int64)
    address, none = np.full((1, 1), value.ctypes.data, np.uint64), np.zeros((1, 1), np.uint64)
    kinds, zero = np.full(1, INT64), np.zeros(1)
    gather_labels(order, rows, address[0], none[0], none[0], np.empty(1, np.float32))
    dense = np.empty((1, 1), np.float32)
    gather_dense(order, rows, kinds, address, none, none, LOG1P, LOG1P_TABLE, zero, zero, dense)
    gather_ids(order, rows, 1, 1, kinds, address, none, none, -1, np.empty(1, np.int64))
