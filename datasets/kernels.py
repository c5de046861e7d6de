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
TOO_WIDE = -2
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
def _unpack(bitmap: np.uint64, bit: np.uint64, out: Array) -> None:
    """out bool [N] = the bits from `bit` on of the Arrow validity bitmap at an address; address 0: nothing is null."""
    size, i = len(out), 0
    if bitmap == 0:
        out[:] = True
        i = size
    while i + 64 <= size:  # so that 8 bytes may be read; after the shift at least 32 bits of them are wanted
        at = bit + np.uint64(i)
        word = _load(bitmap + (at >> np.uint64(3)), np.uint64(0), numba.uint64) >> (at & np.uint64(7))
        for j in range(32):
            out[i + j] = (word >> np.uint64(j)) & np.uint64(1)
        i += 32
    while i < size:
        at = bit + np.uint64(i)
        byte = np.uint32(_load(bitmap, at >> np.uint64(3), numba.uint8))
        out[i] = (byte >> np.uint32(at & np.uint64(7))) & np.uint32(1)
        i += 1


@jit
def _whole(kind: int, address: np.uint64, place: np.uint64) -> Any:
    """One value of a column of integers as int64."""
    if kind == INT32:
        return np.int64(_load(address, place, numba.int32))
    return _load(address, place, numba.int64)


@jit
def _number(kind: int, address: np.uint64, place: np.uint64) -> Any:
    """One value of a column as float64."""
    if kind == FLOAT32:
        return np.float64(_load(address, place, numba.float32))
    if kind == FLOAT64:
        return _load(address, place, numba.float64)
    return np.float64(_whole(kind, address, place))


@jit
def stage_ids(kind: int, rows: Array, data: Array, valid: Array, bit: Array, missing: int, out: Array) -> int:
    """out int64 or int32 [N] = one column of chunks of `rows` int64 [C], nulls as `missing`.

    kind: INT32 or INT64; data uint64 [C]: addresses of the values; valid uint64 [C]: of the bitmaps, 0 where nothing is
    null; bit uint64 [C]: offsets into them. Returns -1, the first row whose id is negative and not `missing`, or
    TOO_WIDE when `out` cannot hold them all.
    """
    at, present = 0, np.empty(_BLOCK, np.bool_)
    for chunk in range(len(rows)):
        address = data[chunk]
        for begin in range(0, rows[chunk], _BLOCK):
            first, size = np.uint64(begin), min(_BLOCK, rows[chunk] - begin)
            part, own = out[at + begin : at + begin + size], present[:size]
            _unpack(valid[chunk], bit[chunk] + first, own)
            lowest, lost = 0, np.int64(0)
            for i in range(size):
                value = _whole(kind, address, first + np.uint64(i))  # always read: a branch would be mispredicted
                value = value if own[i] else missing
                part[i] = value
                lost |= value ^ np.int64(part[i])
                lowest = min(lowest, 0 if value == missing else value)
            if lost != 0:
                return TOO_WIDE
            if lowest < 0:
                for i in range(size):
                    if part[i] < 0 and part[i] != missing:
                        return at + begin + i
        at += rows[chunk]
    return -1


@jit
def _take(order: Array, first: int, share: int, f: int, features: int, staged: Array, out: Array) -> None:
    """Feature f's ids in the order and the batches of `gather_ids`."""
    begin, end = 0, min(first, len(order))
    while begin < len(order):
        at = features * begin + f * (end - begin)
        part, taken = out[at : at + end - begin], order[begin:end]
        for i in range(len(taken)):
            part[i] = staged[np.uint64(taken[i])]
        begin, end = end, min(end + share, len(order))


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
    negative id. Ids that fit 32 bits are staged in as many: half as much of the cache.
    """
    features = len(kinds)
    narrow, wide = np.empty(rows.sum(), np.int32), np.empty(rows.sum(), np.int64)
    for f in range(features):
        bad = stage_ids(kinds[f], rows, data[f], valid[f], bit[f], missing, narrow)
        if bad == TOO_WIDE:
            bad = stage_ids(kinds[f], rows, data[f], valid[f], bit[f], missing, wide)
            _take(order, first, share, f, features, wide, out)
        else:
            _take(order, first, share, f, features, narrow, out)
        if bad >= 0:
            return bad * features + f
    return -1


@jit
def gather_labels(order: Array, rows: Array, data: Array, valid: Array, bit: Array, out: Array) -> int:
    """out float32 [N] = the labels of the rows `order` int32 [N]; int8 storage, arguments as in `stage_ids`.

    Returns -1, or the first row whose label is not 0 or 1.
    """
    at, staged, present = 0, np.empty(rows.sum(), np.int8), np.empty(rows.max(), np.bool_)
    for chunk in range(len(rows)):
        _unpack(valid[chunk], bit[chunk], present[: rows[chunk]])
        for i in range(rows[chunk]):
            staged[at + i] = label = _load(data[chunk], np.uint64(i), numba.int8)
            if (label != 0 and label != 1) or not present[i]:
                return at + i
        at += rows[chunk]
    for i in range(len(order)):
        out[i] = staged[np.uint64(order[i])]
    return -1


@jit
def _log1p(value: Any, table: Array) -> Any:
    clipped = max(value, 0.0)
    if clipped < len(table):
        whole = np.uint32(np.int32(clipped))
        if whole == clipped:
            return table[whole]
    return np.float32(np.log1p(clipped))


@jit
def _log1p_whole(value: Any, table: Array) -> Any:
    clipped = max(value, 0)
    return table[np.uint64(clipped)] if clipped < len(table) else np.float32(np.log1p(np.float64(clipped)))


@jit
def _stage_numbers(
    kind: int,
    address: np.uint64,
    first: np.uint64,
    present: Array,
    transform: int,
    table: Array,
    mean: float,
    scale: float,
    out: Array,
) -> int:
    """out (strided) float32 [B] = values first, first + 1, ... of one chunk, transformed. -1, or the first not finite.

    present bool [B]: false where a value is null.
    """
    if transform == LOG1P and (kind == INT32 or kind == INT64):  # noqa: SIM109 - numba
        for i in range(len(out)):
            value = _whole(kind, address, first + np.uint64(i))
            out[i] = _log1p_whole(value if present[i] else 0, table)
    else:
        for i in range(len(out)):
            number = _number(kind, address, first + np.uint64(i)) if present[i] else mean
            if not np.isfinite(number):
                return i
            out[i] = _log1p(number, table) if transform == LOG1P else (number - mean) * scale
    return -1


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
    staged, present = np.empty((rows.sum(), width), np.float32), np.empty(_BLOCK, np.bool_)
    for chunk in range(len(rows)):
        for begin in range(0, rows[chunk], _BLOCK):
            first, size = np.uint64(begin), min(_BLOCK, rows[chunk] - begin)
            block, own = staged[at + begin : at + begin + size], present[:size]
            for k in range(width):
                _unpack(valid[k, chunk], bit[k, chunk] + first, own)
                address, column = data[k, chunk], block[:, k]
                bad = _stage_numbers(kinds[k], address, first, own, transform, table, mean[k], scale[k], column)
                if bad >= 0:
                    return (at + begin + bad) * width + k
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
