"""Ids that are strings, and bags of ids: free functions over arrays. Addresses as in kernels.py."""

from __future__ import annotations

from typing import Any

import numba
import numpy as np

from . import kernels
from .jit import jit
from .kernels import Array, _load, _unpack

_P1, _P2, _P3 = np.uint64(0x9E3779B185EBCA87), np.uint64(0xC2B2AE3D27D4EB4F), np.uint64(0x165667B19E3779F9)
_P4, _P5 = np.uint64(0x85EBCA77C2B2AE63), np.uint64(0x27D4EB2F165667C5)
_SIGN = np.uint64(0x7FFFFFFFFFFFFFFF)


@jit
def _rotate(value: np.uint64, bits: int) -> np.uint64:
    return (value << np.uint64(bits)) | (value >> np.uint64(64 - bits))


@jit
def _round(lane: np.uint64, word: np.uint64) -> np.uint64:
    return _rotate(lane + word * _P2, 31) * _P1


@jit
def xxhash64(address: np.uint64, size: np.uint64) -> Any:
    """XXH64 with seed 0 (Collet, doc/xxhash_spec.md) of `size` bytes at an address; uint64."""
    at, zero = np.uint64(0), np.uint64(0)
    if size >= np.uint64(32):
        a, b, c, d = _P1 + _P2, _P2, zero, zero - _P1
        while at + np.uint64(32) <= size:
            a = _round(a, _load(address + at, zero, numba.uint64))
            b = _round(b, _load(address + at + np.uint64(8), zero, numba.uint64))
            c = _round(c, _load(address + at + np.uint64(16), zero, numba.uint64))
            d = _round(d, _load(address + at + np.uint64(24), zero, numba.uint64))
            at += np.uint64(32)
        total = _rotate(a, 1) + _rotate(b, 7) + _rotate(c, 12) + _rotate(d, 18)
        for lane in (a, b, c, d):
            total = (total ^ _round(zero, lane)) * _P1 + _P4
    else:
        total = _P5
    total += size
    while at + np.uint64(8) <= size:
        total = _rotate(total ^ _round(zero, _load(address + at, zero, numba.uint64)), 27) * _P1 + _P4
        at += np.uint64(8)
    if at + np.uint64(4) <= size:
        total = _rotate(total ^ np.uint64(_load(address + at, zero, numba.uint32)) * _P1, 23) * _P2 + _P3
        at += np.uint64(4)
    while at < size:
        total = _rotate(total ^ np.uint64(_load(address + at, zero, numba.uint8)) * _P5, 11) * _P1
        at += np.uint64(1)
    total = (total ^ (total >> np.uint64(33))) * _P2
    total = (total ^ (total >> np.uint64(29))) * _P3
    return total ^ (total >> np.uint64(32))


@jit
def hash_strings(data: np.uint64, offsets: Array, out: Array) -> None:
    """out int64 [N] = XXH64 without its top bit, so that an id is never negative, of the bytes of N strings.

    data: address of the bytes; offsets int64 [N + 1] into them.
    """
    for i in range(len(out)):
        size = np.uint64(offsets[i + 1] - offsets[i])
        out[i] = np.int64(xxhash64(data + np.uint64(offsets[i]), size) & _SIGN)


@jit
def stage_weights(data: np.uint64, valid: np.uint64, bit: np.uint64, out: Array) -> int:
    """out float32 [N] = a chunk of float32 values. Returns -1, or the first null or not finite."""
    present = np.empty(len(out), np.bool_)
    _unpack(valid, bit, present)
    for i in range(len(out)):
        out[i] = _load(data, np.uint64(i), numba.float32)
        if not np.isfinite(out[i]) or not present[i]:
            return i
    return -1


@jit
def _cell(i: int, first: int, share: int, total: int, f: int, features: int) -> int:
    """Where (feature f, i-th row of a window) stands among the cells, batch by batch and then feature by feature."""
    begin = 0 if i < first else first + (i - first) // share * share
    end = min(first if i < first else begin + share, total)
    return features * begin + f * (end - begin) + i - begin


@jit
def bag_sizes(order: Array, first: int, share: int, f: int, features: int, sizes: Array, offsets: Array) -> None:
    """offsets[1 + cell] = the size of feature f's bag for each row of `order` int32 [N]; sizes int64 [rows]."""
    for i in range(len(order)):
        offsets[1 + _cell(i, first, share, len(order), f, features)] = sizes[order[i]]


@jit
def fill_bags(
    order: Array,
    first: int,
    share: int,
    f: int,
    features: int,
    begins: Array,
    values: Array,
    weights: Array,
    offsets: Array,
    out: Array,
    out_weights: Array,
) -> None:
    """Feature f's bags of the rows `order` int32 [N] into out int64, out_weights float32 at offsets int64 [F * N + 1].

    begins int64 [rows]: where each row's bag begins in values int64. weights: one per value, or empty: every value
    weighs 1. out_weights: empty where no feature has weights.
    """
    for i in range(len(order)):
        cell = _cell(i, first, share, len(order), f, features)
        at, size, begin = offsets[cell], offsets[cell + 1] - offsets[cell], begins[order[i]]
        for j in range(size):
            out[at + j] = values[begin + j]
        if len(out_weights):
            for j in range(size):
                out_weights[at + j] = weights[begin + j] if len(weights) else 1.0


def warm_up() -> None:
    """Compiles the kernels of bags and strings, or loads them from the cache."""
    text, order, one = np.zeros(1, np.uint8), np.zeros(1, np.int32), np.ones(1, np.int64)
    edges, weight = np.array([0, 1]), np.ones(1, np.float32)
    hash_strings(np.uint64(text.ctypes.data), edges, np.empty(1, np.int64))
    zero = np.uint64(0)
    stage_weights(np.uint64(weight.ctypes.data), zero, zero, weight.copy())
    kernels.stage_ids(kernels.INT64, np.uint64(edges.ctypes.data), zero, zero, -1, one.copy())
    bag_sizes(order, 1, 1, 0, 1, one, edges.copy())
    fill_bags(order, 1, 1, 0, 1, np.zeros(1, np.int64), one, weight, edges, one.copy(), weight.copy())
