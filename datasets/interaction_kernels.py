"""Sampling items that a user did not choose: free functions over arrays."""

from __future__ import annotations

import numpy as np

from .jit import jit
from .kernels import Array, mix

_HASHES = 4
_DRAWS = 32


@jit
def _places(user: int, item: int, size: int, number: int) -> tuple[np.int64, np.uint8]:
    """(byte, bit) of one of a pair's hashes in a filter of `size` bytes."""
    hashed = mix(np.uint64(user), mix(np.uint64(item), np.uint64(number)))
    place = hashed % np.uint64(8 * size)
    return np.int64(place >> np.uint64(3)), np.uint8(1 << (place & np.uint64(7)))


@jit
def add_pairs(users: Array, items: Array, pairs: Array) -> None:
    """Adds users and items, int64 [N], to a Bloom filter, uint8 [M]."""
    for i in range(len(users)):
        for number in range(_HASHES):
            byte, bit = _places(users[i], items[i], len(pairs), number)
            pairs[byte] |= bit


@jit
def _chosen(user: int, item: int, pairs: Array) -> bool:
    for number in range(_HASHES):
        byte, bit = _places(user, item, len(pairs), number)
        if not pairs[byte] & bit:
            return False
    return True


@jit
def sample_negatives(
    users: Array, items: Array, labels: Array, pairs: Array, known: Array, negatives: int, key: np.uint64, first: int
) -> tuple[Array, Array, Array]:
    """The rows (users, items int64 [N], labels int8 [N]), each of label 1 followed by `negatives` rows of label 0.

    pairs: Bloom filter of all pairs; known int64 [K]: the items to draw from; first: number of the first row, which
    together with `key` decides what is drawn. Returns (users, items, labels).
    """
    size = len(users) + negatives * (labels == 1).sum()
    out_users, out_items, out_labels = np.empty(size, np.int64), np.empty(size, np.int64), np.zeros(size, np.int8)
    at = 0
    for i in range(len(users)):
        out_users[at], out_items[at], out_labels[at] = users[i], items[i], labels[i]
        at += 1
        for n in range(negatives if labels[i] == 1 else 0):
            base = mix(np.uint64(first + i), mix(np.uint64(n), key))
            for draw in range(_DRAWS):
                drawn = mix(np.uint64(draw), base) >> np.uint64(32)
                item = known[np.int64(drawn * np.uint64(len(known)) >> np.uint64(32))]
                if not _chosen(users[i], item, pairs):
                    break
            out_users[at], out_items[at] = users[i], item
            at += 1
    return out_users, out_items, out_labels
