"""Where a row lives, and which rows a batch touches: mixing, the keyed bijection, distinct rows grouped by block.

The numbers that `mix64`, `permute` and the initial values give are part of the checkpoint format: they never change.
"""

from __future__ import annotations

import numpy as np

from .jit import jit

Halves = tuple[np.uint64, np.uint64]
RoundKeys = tuple[np.uint64, np.uint64, np.uint64, np.uint64]

U64 = np.uint64
GOLDEN = np.uint64(0x9E3779B97F4A7C15)
LOW = np.uint64(0xFFFFFFFF)


@jit
def mix64(value: np.uint64) -> np.uint64:
    """The finaliser of SplitMix64 (Steele, Lea, Flood 2014; Stafford's variant 13): a bijection of 64-bit words."""
    z = U64(value)
    z = (z ^ (z >> U64(30))) * U64(0xBF58476D1CE4E5B9)
    z = (z ^ (z >> U64(27))) * U64(0x94D049BB133111EB)
    return z ^ (z >> U64(31))


@jit
def round_keys(key: np.uint64) -> RoundKeys:
    """The 32-bit keys of the four Feistel rounds."""
    first = mix64(U64(key) + GOLDEN)
    second = mix64(U64(key) + U64(2) * GOLDEN)
    return first & LOW, first >> U64(32), second & LOW, second >> U64(32)


@jit
def half_bits(n: int) -> Halves:
    """(left, right) bits of the smallest power of two that is not below n; it is below 2n."""
    bits = 0
    while (np.int64(1) << bits) < n:
        bits += 1
    return U64(bits // 2), U64(bits - bits // 2)


@jit
def _scramble(half: np.uint64, key: np.uint64) -> np.uint64:
    """Two 32 x 32 -> 64 bit products: the widest multiplication that every vector unit has."""
    z = ((half ^ key) & LOW) * U64(0x9E3779B1)
    z = ((z ^ (z >> U64(32))) & LOW) * U64(0x85EBCA77)
    return z >> U64(20)


@jit
def feistel(x: np.uint64, halves: Halves, keys: RoundKeys) -> np.uint64:
    """A keyed bijection of [0, 2^bits), bits <= 48: an alternating Feistel network of four rounds."""
    left, right = halves
    left_mask = (U64(1) << left) - U64(1)
    right_mask = (U64(1) << right) - U64(1)
    high = x >> right
    low = x & right_mask
    high ^= _scramble(low, keys[0]) & left_mask
    low ^= _scramble(high, keys[1]) & right_mask
    high ^= _scramble(low, keys[2]) & left_mask
    low ^= _scramble(high, keys[3]) & right_mask
    return (high << right) | low


@jit
def unfeistel(x: np.uint64, halves: Halves, keys: RoundKeys) -> np.uint64:
    """The inverse of `feistel`."""
    left, right = halves
    left_mask = (U64(1) << left) - U64(1)
    right_mask = (U64(1) << right) - U64(1)
    high = x >> right
    low = x & right_mask
    low ^= _scramble(high, keys[3]) & right_mask
    high ^= _scramble(low, keys[2]) & left_mask
    low ^= _scramble(high, keys[1]) & right_mask
    high ^= _scramble(low, keys[0]) & left_mask
    return (high << right) | low


@jit
def permute(row: int, n: int, key: np.uint64) -> np.int64:
    """Position of `row` in a table of n rows: a bijection of [0, n) keyed by the table's key (cycle walking)."""
    halves = half_bits(n)
    keys = round_keys(key)
    x = feistel(U64(row), halves, keys)
    while x >= U64(n):
        x = feistel(x, halves, keys)
    return np.int64(x)


@jit
def unpermute(position: int, n: int, key: np.uint64) -> np.int64:
    """The row at `position`: the inverse of `permute`."""
    halves = half_bits(n)
    keys = round_keys(key)
    x = unfeistel(U64(position), halves, keys)
    while x >= U64(n):
        x = unfeistel(x, halves, keys)
    return np.int64(x)


@jit
def permute_all(x: np.ndarray, n: int, key: np.uint64, walking: np.ndarray) -> None:
    """`permute` of every uint64 in `x`, in place, without a branch per row. walking: int32, as long as x, scratch."""
    halves = half_bits(n)
    keys = round_keys(key)
    limit = U64(n)
    for i in range(len(x)):
        x[i] = feistel(x[i], halves, keys)
    left = 0
    for i in range(len(x)):
        walking[left] = i
        left += int(x[i] >= limit)
    while left > 0:
        still = 0
        for k in range(left):
            i = walking[k]
            x[i] = feistel(x[i], halves, keys)
            walking[still] = i
            still += int(x[i] >= limit)
        left = still


@jit
def block_offset(block: int, blocks: int, key: np.uint64) -> np.int64:
    """The position whose place is 0 in `block`. Tables are rotated by their key, so that small ones do not all begin
    in block 0."""
    return (np.int64(block) - np.int64(U64(key) % U64(blocks)) + np.int64(blocks)) % np.int64(blocks)


@jit
def share_rows(block: int, blocks: int, rows: int, key: np.uint64) -> np.int64:
    """How many rows of a table of `rows` rows lie in `block`; they are the places 0, 1, ... of its share."""
    offset = block_offset(block, blocks, key)
    if offset >= rows:
        return np.int64(0)
    return (np.int64(rows) - offset + np.int64(blocks) - np.int64(1)) // np.int64(blocks)


@jit
def rows_of_share(block: int, blocks: int, rows: int, key: np.uint64, out: np.ndarray) -> None:
    """Fills int64 [share_rows] with the table rows that lie in `block`, place by place."""
    halves = half_bits(rows)
    keys = round_keys(key)
    offset = block_offset(block, blocks, key)
    for place in range(len(out)):
        x = unfeistel(U64(place) * U64(blocks) + U64(offset), halves, keys)
        while x >= U64(rows):
            x = unfeistel(x, halves, keys)
        out[place] = np.int64(x)


@jit
def distinct_rows(
    tables: np.ndarray,
    order: np.ndarray,
    segments: np.ndarray,
    rows: np.ndarray,
    table_rows: np.ndarray,
    slots: np.ndarray,
    stamp: np.uint64,
    inverse: np.ndarray,
    unique: np.ndarray,
    unique_end: np.ndarray,
) -> tuple[np.int64, np.int64, np.uint64]:
    """Numbers the distinct (table, row) pairs in order of table, then of first occurrence.

    order: segments sorted by table; slots: uint64 [2^p, 2] open addressing of (row, stamp << 32 | number), at least
    twice the rows of any one table; a slot with another stamp is empty, so that no call clears it. Fills inverse [N],
    unique (row numbers) and unique_end [S] (how many unique rows there are after each segment of `order`).

    Returns:
        (number of unique rows, index of the first row out of range or -1, last stamp used).
    """
    mask = U64(len(slots) - 1)
    shift = U64(64)
    size = len(slots)
    while size > 1:
        size >>= 1
        shift -= U64(1)
    count = np.int64(0)
    for k in range(len(order)):
        segment = order[k]
        table = tables[segment]
        if k == 0 or tables[order[k - 1]] != table:
            stamp += U64(1)
        limit = U64(table_rows[table])
        for i in range(segments[segment], segments[segment + 1]):
            row = U64(rows[i])
            if row >= limit:  # a negative row is a very large one here
                return count, np.int64(i), stamp
            slot = (row * GOLDEN) >> shift
            while True:
                word = slots[slot, 1]
                if (word >> U64(32)) != stamp:
                    slots[slot, 0] = row
                    slots[slot, 1] = (stamp << U64(32)) | U64(count)
                    unique[count] = row
                    inverse[i] = np.int32(count)
                    count += 1
                    break
                if slots[slot, 0] == row:
                    inverse[i] = np.int32(word & U64(0xFFFFFFFF))
                    break
                slot = (slot + U64(1)) & mask
        unique_end[k] = count
    return count, np.int64(-1), stamp


@jit
def place_rows(
    tables: np.ndarray,
    order: np.ndarray,
    unique: np.ndarray,
    unique_end: np.ndarray,
    table_rows: np.ndarray,
    keys: np.ndarray,
    base: np.ndarray,
    rank_of: np.ndarray,
    walking: np.ndarray,
    slab_rows: np.ndarray,
) -> None:
    """Replaces each unique row by the rank of its block and writes its slab row (uint64)."""
    blocks = U64(len(rank_of))
    per_block = U64(base[len(base) - 1])
    inverse_blocks = 1.0 / float(len(rank_of))
    begin = np.int64(0)
    for k in range(len(order)):
        table = tables[order[k]]
        end = unique_end[k]
        permute_all(unique[begin:end], table_rows[table], keys[table], walking)
        rotation = keys[table] % blocks
        first = U64(base[table])
        for u in range(begin, end):
            x = unique[u]
            # x < 2^48, so the double is off by far less than 1, and one correction each way makes the quotient exact.
            place = U64(np.int64(float(np.int64(x)) * inverse_blocks))
            rest = np.int64(x) - np.int64(place * blocks)
            place = place - U64(rest < 0) + U64(rest >= np.int64(blocks))
            block = x - place * blocks + rotation
            block -= blocks * U64(block >= blocks)
            slab_rows[u] = block * per_block + first + place
            unique[u] = U64(rank_of[np.intp(block)])
        begin = end


@jit
def group_by_rank(
    count: int,
    rank: np.ndarray,
    slab_rows: np.ndarray,
    counts: np.ndarray,
    position: np.ndarray,
    index: np.ndarray,
    inverse: np.ndarray,
) -> None:
    """Stable counting sort of slab rows by rank; makes `inverse` point into `index`; fills counts, int64 [blocks]."""
    counts[:] = 0
    for u in range(count):
        counts[rank[u]] += 1
    start = np.empty(len(counts), np.int64)
    total = np.int64(0)
    for r in range(len(counts)):
        start[r] = total
        total += counts[r]
    for u in range(count):
        at = start[rank[u]]
        start[rank[u]] = at + 1
        position[u] = np.int32(at)
        index[at] = slab_rows[u]
    for i in range(len(inverse)):
        inverse[i] = position[inverse[i]]
