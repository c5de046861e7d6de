"""What is counted of a column's ids in bounded memory: a free function over arrays."""

from __future__ import annotations

from typing import Any

import numpy as np

from .jit import jit
from .kernels import mix

Array = np.ndarray[Any, Any]

_SEED = np.uint64(0x5851F42D4C957F2D)


@jit
def count_ids(ids: Array, precision: int, registers: Array, keys: Array, counts: Array, used: Array) -> None:
    """Counts ids int64 [N] of one column: how many differ, and how often the most frequent ones come.

    registers uint8 [2^precision]: HyperLogLog. keys, counts int64 [S], S a power of two: a hash table with linear
    probing, a count of 0 marks an empty slot; when three quarters are used, the median of the counts is taken from all
    of them, and what falls to 0 leaves (Anderson et al. 2017, arXiv 1705.07001, section 2). used int64 [1]: slots used.
    No count is too high.
    """
    last = len(keys) - 1
    for i in range(len(ids)):
        hashed = mix(np.uint64(ids[i]), _SEED)
        register = np.int64(hashed >> np.uint64(64 - precision))
        rest, rank = hashed << np.uint64(precision), np.uint64(registers[register])
        if rank == 0 or rest >> (np.uint64(64) - rank) == 0:  # as many zeros as were seen there, or more: seldom
            rank = np.uint64(1)
            while rank <= 64 - precision and (rest >> (np.uint64(64) - rank)) == 0:
                rank += np.uint64(1)
            registers[register] = rank
        slot = np.int64(hashed & np.uint64(last))
        while counts[slot] > 0 and keys[slot] != ids[i]:
            slot = (slot + 1) & last
        if counts[slot] == 0:
            keys[slot] = ids[i]
            used[0] += 1
        counts[slot] += 1
        if 4 * used[0] > 3 * len(keys):
            _reduce(keys, counts, used)


@jit
def _reduce(keys: Array, counts: Array, used: Array) -> None:
    """Takes the median of the counts from each."""
    there = counts > 0
    old_keys, old_counts = keys[there], counts[there]
    taken = np.sort(old_counts)[len(old_counts) // 2]
    counts[:] = 0
    used[0] = 0
    for i in range(len(old_keys)):
        if old_counts[i] > taken:
            slot = np.int64(mix(np.uint64(old_keys[i]), _SEED) & np.uint64(len(keys) - 1))
            while counts[slot] > 0:
                slot = (slot + 1) & (len(keys) - 1)
            keys[slot], counts[slot] = old_keys[i], old_counts[i] - taken
            used[0] += 1
