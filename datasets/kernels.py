"""Mixing, shuffling, gathering from Arrow buffers: free functions over arrays.

A window's rows are numbered through its chunks (a chunk is one decoded row group). Arrow buffers come as addresses; the
caller keeps them alive. A column is first *staged*: its chunks in one array, nulls filled, values transformed, in the
order of the file; then rows are taken from it in the order of the epoch: what is sequential is cheap, and what is
random touches one array that fits the cache.
"""

from __future__ import annotations

from typing import Any

import numba
import numpy as np
from llvmlite import ir
from numba.core import types
from numba.extending import intrinsic

from .jit import jit

Array = np.ndarray[Any, Any]

# Storage types that the gather kernels read; everything else is cast before.
INT8, INT32, INT64, FLOAT32, FLOAT64 = range(5)
LOG1P_TABLE = np.log1p(np.arange(1 << 16, dtype=np.float64)).astype(np.float32)
LOG1P, AFFINE = range(2)
TOO_WIDE = -2
_BLOCK = 512  # rows staged at a time, so that rows of dense values stay in the first-level cache
_AHEAD = 16  # rows between a prefetch and its use


@intrinsic
def _load(typing_context: Any, address: Any, place: Any, kind: Any) -> Any:
    """The element of type `kind` at `place` of an array that begins at `address`."""

    def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        pointer = builder.inttoptr(arguments[0], context.get_value_type(kind.dtype).as_pointer())
        loaded = builder.load(builder.gep(pointer, [arguments[1]]))
        loaded.align = 1  # Arrow aligns buffers, not the words of a string
        return loaded

    return kind.dtype(types.uint64, types.uint64, kind), generate


@intrinsic
def _prefetch(typing_context: Any, address: Any) -> Any:
    """Asks for the cache line of an address."""

    def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        pointer, word = builder.inttoptr(arguments[0], ir.IntType(8).as_pointer()), ir.IntType(32)
        kind = ir.FunctionType(ir.VoidType(), [pointer.type, word, word, word])
        hint = builder.module.declare_intrinsic("llvm.prefetch", (pointer.type,), kind)
        builder.call(hint, [pointer, word(0), word(3), word(1)])  # for reading, keep in all levels, data
        return context.get_dummy_value()

    return types.none(types.uint64), generate


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
def stage_ids(kind: int, data: np.uint64, valid: np.uint64, bit: np.uint64, missing: int, out: Array) -> int:
    """out int64 or int32 [N] = a chunk of a column, nulls as `missing`.

    kind: INT32 or INT64; data, valid uint64: addresses of the values and of the bitmap, 0 where nothing is null; bit
    uint64: offset into it. Returns -1, the first row whose id is negative and not `missing`, or TOO_WIDE when `out`
    cannot hold them all.
    """
    present = np.ones(_BLOCK, np.bool_)
    for begin in range(0, len(out), _BLOCK):
        first, size = np.uint64(begin), min(_BLOCK, len(out) - begin)
        part, own = out[begin : begin + size], present[:size]
        lowest, lost = 0, np.int64(0)
        if valid == 0:
            for i in range(size):
                value = _whole(kind, data, first + np.uint64(i))
                part[i] = value
                lost |= value ^ np.int64(part[i])
                lowest = min(lowest, 0 if value == missing else value)
        else:
            _unpack(valid, bit + first, own)
            for i in range(size):
                value = _whole(kind, data, first + np.uint64(i))  # always read: a branch would be mispredicted
                value = value if own[i] else missing
                part[i] = value
                lost |= value ^ np.int64(part[i])
                lowest = min(lowest, 0 if value == missing else value)
        if lost != 0:
            return TOO_WIDE
        if lowest < 0:
            for i in range(size):
                if part[i] < 0 and part[i] != missing:
                    return begin + i
    return -1


@jit
def take_ids(order: Array, first: int, share: int, f: int, features: int, staged: Array, out: Array) -> None:
    """Feature f's ids of the rows `order` int32 [N], cut into batches; staged int32 or int64 [rows].

    Batches end after `first` rows and then every `share` rows; batch by batch, out int64 [features * N] holds
    [features, rows of the batch].
    """
    begin, end = 0, min(first, len(order))
    while begin < len(order):
        at = features * begin + f * (end - begin)
        part, taken = out[at : at + end - begin], order[begin:end]
        for i in range(len(taken)):
            part[i] = staged[np.uint64(taken[i])]
        begin, end = end, min(end + share, len(order))


@jit
def stage_labels(data: np.uint64, valid: np.uint64, bit: np.uint64, out: Array) -> int:
    """out int8 [N] = a chunk of labels stored in as many; arguments as in `stage_ids`.

    Returns -1, or the first row whose label is not 0 or 1.
    """
    present = np.empty(len(out), np.bool_)
    _unpack(valid, bit, present)
    for i in range(len(out)):
        out[i] = label = _load(data, np.uint64(i), numba.int8)
        if (label != 0 and label != 1) or not present[i]:
            return i
    return -1


@jit
def take_labels(order: Array, staged: Array, out: Array) -> None:
    """out float32 [N] = the labels int8 of the rows `order` int32 [N]."""
    for i in range(len(order)):
        out[i] = staged[np.uint64(order[i])]


@jit
def _log1p(value: Any, table: Array) -> Any:
    clipped = max(value, 0.0)
    if clipped < len(table):
        whole = np.uint32(np.int32(clipped))
        if whole == clipped:
            return table[whole]
    return np.float32(np.log1p(clipped))


@jit
def _log1p_whole(
    kind: int, address: np.uint64, first: np.uint64, present: Array, table: Array, clipped: Array, out: Array
) -> None:
    """`_stage_numbers` of integers and LOG1P: loops without a branch where no value is beyond the table.

    clipped int64 [B]: scratch.
    """
    size, highest = len(out), 0
    for i in range(size):
        value = _whole(kind, address, first + np.uint64(i))
        clipped[i] = value = max(value, 0) if present[i] else 0
        highest = max(highest, value)
    if highest < len(table):
        for i in range(size):
            out[i] = table[np.uint64(clipped[i])]
    else:
        for i in range(size):
            value = clipped[i]
            out[i] = table[np.uint64(value)] if value < len(table) else np.float32(np.log1p(np.float64(value)))


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
    scratch: Array,
    out: Array,
) -> int:
    """out (strided) float32 [B] = values first, first + 1, ... of one chunk, transformed. -1, or the first not finite.

    present bool [B]: false where a value is null; scratch int64 [B].
    """
    if transform == LOG1P and (kind == INT32 or kind == INT64):  # noqa: SIM109 - numba
        _log1p_whole(kind, address, first, present, table, scratch, out)
    else:
        for i in range(len(out)):
            number = _number(kind, address, first + np.uint64(i)) if present[i] else mean
            if not np.isfinite(number):
                return i
            out[i] = _log1p(number, table) if transform == LOG1P else (number - mean) * scale
    return -1


@jit
def stage_dense(
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
    """out float32 [N, D] = a chunk of D columns, nulls as 0.

    kinds int64 [D]; data, valid, bit uint64 [D] as in `stage_ids`. transform LOG1P: ln(max(x, 0) + 1), through
    `table` (LOG1P_TABLE) for small integers; AFFINE: (x - mean) * scale, float64 [D] each. Returns -1, or row * D +
    column of a value that is NaN or infinite.
    """
    width, present, scratch = len(kinds), np.empty(_BLOCK, np.bool_), np.empty(_BLOCK, np.int64)
    for begin in range(0, len(out), _BLOCK):
        first, size = np.uint64(begin), min(_BLOCK, len(out) - begin)
        block, own = out[begin : begin + size], present[:size]
        for k in range(width):
            _unpack(valid[k], bit[k] + first, own)
            shift, column = (mean[k], scale[k]), block[:, k]
            bad = _stage_numbers(kinds[k], data[k], first, own, transform, table, *shift, scratch, column)
            if bad >= 0:
                return (begin + bad) * width + k
    return -1


@jit
def take_dense(order: Array, staged: Array, out: Array) -> None:
    """out float32 [N, D] = the rows `order` int32 [N] of float32 [rows, D]."""
    begin, size, last = np.uint64(staged.ctypes.data), np.uint64(4 * staged.shape[1]), len(order) - 1
    for i in range(len(order)):
        ahead = begin + np.uint64(order[min(i + _AHEAD, last)]) * size
        for line in range(0, size, 64):
            _prefetch(ahead + np.uint64(line))
        _prefetch(ahead + size - np.uint64(1))
        row = np.uint64(order[i])
        for k in range(staged.shape[1]):
            out[i, k] = staged[row, k]


def warm_up() -> None:
    """Compiles the kernels of the reader, or loads them from the cache, so that no batch waits for the compiler."""
    order, rows = np.arange(1, dtype=np.int32), np.ones(1, np.int64)
    shuffle(order, np.uint64(mix(np.uint64(0), np.uint64(0))))
    shuffle(rows, np.uint64(0))
    value, labels = np.zeros(1, np.int64), np.zeros(1, np.int8)
    address, none = np.full(1, value.ctypes.data, np.uint64), np.zeros(1, np.uint64)
    stage_labels(address[0], none[0], none[0], labels)
    take_labels(order, labels, np.empty(1, np.float32))
    dense, zero = np.empty((1, 1), np.float32), np.zeros(1)
    stage_dense(np.full(1, INT64), address, none, none, LOG1P, LOG1P_TABLE, zero, zero, dense)
    take_dense(order, dense, dense.copy())
    for staged in (np.empty(1, np.int32), np.empty(1, np.int64)):
        stage_ids(INT64, address[0], none[0], none[0], -1, staged)
        take_ids(order, 1, 1, 0, 1, staged, np.empty(1, np.int64))
