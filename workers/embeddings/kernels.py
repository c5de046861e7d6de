"""Free functions over arrays: ids to rows, rows to vectors and back. Each has a numpy oracle in the tests.

The numbers that `map_ids` gives are part of the checkpoint format: they never change.
"""

from __future__ import annotations

import numpy as np

from ...parameter_server.jit import jit
from ...parameter_server.placement_kernels import mix64
from ...parameter_server.row_kernels import AHEAD, prefetch_row

INDEX = 0
HASH = 1

_U64 = np.uint64


@jit
def multiply_high(a: np.uint64, b: np.uint64) -> np.uint64:
    """The upper 64 bits of the 128-bit product a * b."""
    a_high, a_low = a >> _U64(32), a & _U64(0xFFFFFFFF)
    b_high, b_low = b >> _U64(32), b & _U64(0xFFFFFFFF)
    middle = a_high * b_low + ((a_low * b_low) >> _U64(32))
    other = a_low * b_high + (middle & _U64(0xFFFFFFFF))
    return a_high * b_high + (middle >> _U64(32)) + (other >> _U64(32))


@jit
def map_ids(
    values: np.ndarray,
    begins: np.ndarray,
    ends: np.ndarray,
    kinds: np.ndarray,
    seeds: np.ndarray,
    divisors: np.ndarray,
    moduli: np.ndarray,
    limits: np.ndarray,
    segments: np.ndarray,
    rows: np.ndarray,
) -> np.int64:
    """Fills `rows` int64 [N] with the rows of all lookups of one slab, one lookup after another.

    Lookup l reads values[begins[l] : ends[l]] (int64 ids) and writes from segments[l] (int64 [L + 1]) on. kinds uint8,
    the rest int64 except seeds uint64, all [L]; see `RowMap` for the arithmetic, `RowMap.bound` for the limits. Returns
    the first position of `rows` whose id lies outside [0, limit) where a limit is set, otherwise -1.
    """
    for lookup in range(len(kinds)):
        out = segments[lookup]
        modulus = moduli[lookup]
        limit = limits[lookup]
        if kinds[lookup] == HASH:
            seed = seeds[lookup]
            for i in range(begins[lookup], ends[lookup]):
                value = values[i]
                if limit > 0 and (value < 0 or value >= limit):
                    return np.int64(out)
                if limit < 0:
                    value %= -limit
                # Mixed, keyed and mixed again: two seeds give unrelated functions, not permuted copies of one.
                word = mix64(mix64(_U64(value)) ^ seed)
                rows[out] = np.int64(multiply_high(word, _U64(modulus)))
                out += 1
            continue
        divisor = divisors[lookup]
        for i in range(begins[lookup], ends[lookup]):
            value = values[i]
            if limit > 0 and (value < 0 or value >= limit):
                return np.int64(out)
            if limit < 0:
                value %= -limit
            rows[out] = value if limit == modulus and divisor == 1 else (value // divisor) % modulus
            out += 1
    return np.int64(-1)


@jit
def gather_vectors(rows: np.ndarray, inverse: np.ndarray, out: np.ndarray, begin: int, end: int) -> None:
    """out [B, F, d] <- rows [U, d] at inverse [F * B], feature-major as ids stand in a batch; samples begin to end."""
    batch, features, width = out.shape
    for b in range(begin, end):
        for f in range(features):
            source = inverse[f * batch + b]
            for j in range(width):
                out[b, f, j] = rows[source, j]


@jit
def scatter_vectors(grad: np.ndarray, inverse: np.ndarray, out: np.ndarray, begin: int, end: int) -> None:
    """The transpose of `gather_vectors`: out [U, d] (zeros) += grad [B, F, d], samples in order, features begin to end.

    The order is that of the occurrences in the batch, never that of the rows: the sums do not depend on the layout.
    """
    batch, _, width = grad.shape
    for b in range(batch):
        for f in range(begin, end):
            target = inverse[f * batch + b]
            for j in range(width):
                out[target, j] += grad[b, f, j]


@jit
def pool_bags(rows: np.ndarray, inverse: np.ndarray, offsets: np.ndarray, mean: bool, out: np.ndarray) -> None:
    """out [B, F, d] <- sum or mean over each bag; bag f * B + b is inverse[offsets[f * B + b] : offsets[... + 1]].

    An empty bag gives zeros, as torch.nn.EmbeddingBag does.
    """
    batch, features, width = out.shape
    for b in range(batch):
        for f in range(features):
            begin, end = offsets[f * batch + b], offsets[f * batch + b + 1]
            for j in range(width):
                out[b, f, j] = 0
            for i in range(begin, end):
                source = inverse[i]
                for j in range(width):
                    out[b, f, j] += rows[source, j]
            if mean and end - begin > 1:
                size = np.float32(end - begin)
                for j in range(width):
                    out[b, f, j] /= size


@jit
def spread_bags(grad: np.ndarray, inverse: np.ndarray, offsets: np.ndarray, mean: bool, out: np.ndarray) -> None:
    """The transpose of `pool_bags`: out [U, d] (zeros) += grad [B, F, d], in the order of the occurrences."""
    batch, features, width = grad.shape
    for b in range(batch):
        for f in range(features):
            begin, end = offsets[f * batch + b], offsets[f * batch + b + 1]
            size = np.float32(end - begin) if mean else np.float32(1)
            for i in range(begin, end):
                target = inverse[i]
                for j in range(width):
                    out[target, j] += grad[b, f, j] / size


@jit
def first_occurrences(inverse: np.ndarray, rows: int, firsts: np.ndarray, number: np.ndarray) -> int:
    """Numbers what stands in `inverse` int32 [N], values below `rows`, in the order in which it first occurs.

    number int32 [N] <- each entry's number; firsts int32 [N] <- where each number first occurs. Returns how many.
    """
    seen = np.full(rows, -1, np.int32)
    count = 0
    for i in range(len(inverse)):
        value = inverse[i]
        if seen[value] < 0:
            seen[value] = count
            firsts[count] = i
            count += 1
        number[i] = seen[value]
    return count


@jit
def sum_samples(rows: np.ndarray, inverse: np.ndarray, offsets: np.ndarray, out: np.ndarray) -> None:
    """out [B, w] <- for each sample the sum of rows [U, w] over all its lookups, first lookup first.

    Lookup l of sample b reads inverse[offsets[l * B + b] : offsets[l * B + b + 1]]; offsets int64 [L * B + 1].
    """
    batch, width = out.shape
    lookups = (len(offsets) - 1) // max(1, batch)
    for b in range(batch):
        for j in range(width):
            out[b, j] = 0
        for lookup in range(lookups):
            cell = lookup * batch + b
            for i in range(offsets[cell], offsets[cell + 1]):
                source = inverse[i]
                for j in range(width):
                    out[b, j] += rows[source, j]


@jit
def spread_samples(grad: np.ndarray, inverse: np.ndarray, offsets: np.ndarray, out: np.ndarray) -> None:
    """The transpose of `sum_samples`: out [U, w] (zeros) += grad [B, w], in the order of the occurrences."""
    batch, width = grad.shape
    lookups = (len(offsets) - 1) // max(1, batch)
    for b in range(batch):
        for lookup in range(lookups):
            cell = lookup * batch + b
            for i in range(offsets[cell], offsets[cell + 1]):
                target = inverse[i]
                for j in range(width):
                    out[target, j] += grad[b, j]


@jit
def look_up_samples(
    ids: np.ndarray,
    token_seeds: np.ndarray,
    weight_seeds: np.ndarray,
    token: np.ndarray,
    weight: np.ndarray,
    out: np.ndarray,
) -> None:
    """out [B, d] <- MEM-REC's vectors of ids int64 [B, F], rows asked for ahead of their use.

    token_seeds uint64 [F * K], weight_seeds [F * K_w] (K_w may be 0), feature by feature; token [D, d], weight
    [D_w, 1]. The sums are those of `sum_samples`, in its order.
    """
    batch, features = ids.shape
    width = out.shape[1]
    per_token, per_weight = len(token_seeds) // features, len(weight_seeds) // features
    rows = np.empty(batch * len(token_seeds), np.int64)
    alpha = np.empty(batch, np.float32)
    place = 0
    for b in range(batch):
        alpha[b] = 0 if per_weight else 1
        for f in range(features):
            mixed = mix64(_U64(ids[b, f]))
            for k in range(per_token):
                word = mix64(mixed ^ token_seeds[f * per_token + k])
                rows[place] = np.int64(multiply_high(word, _U64(len(token))))
                place += 1
            for k in range(per_weight):
                word = mix64(mixed ^ weight_seeds[f * per_weight + k])
                alpha[b] += weight[np.int64(multiply_high(word, _U64(len(weight)))), 0]
    place, last = 0, len(rows) - 1
    for b in range(batch):
        for j in range(width):
            out[b, j] = 0
        end = place + len(token_seeds)
        while place + 4 <= end:  # four rows between two visits to `out`, added in the same order
            for k in range(4):
                prefetch_row(token, rows[min(place + AHEAD + k, last)])
            first, second, third, fourth = rows[place], rows[place + 1], rows[place + 2], rows[place + 3]
            for j in range(width):
                out[b, j] = out[b, j] + token[first, j] + token[second, j] + token[third, j] + token[fourth, j]
            place += 4
        for i in range(place, end):
            for j in range(width):
                out[b, j] += token[rows[i], j]
        place = end
        for j in range(width):
            out[b, j] *= alpha[b]


def warm_up() -> None:
    """Compiles every kernel for the types that training uses, so that no timed step does."""
    one = np.ones(1, np.int64)
    zero = np.zeros(1, np.int64)
    segments = np.array([0, 1])
    map_ids(
        one, zero, one, np.zeros(1, np.uint8), np.zeros(1, np.uint64), one, one, zero, segments, np.empty(1, np.int64)
    )
    rows, vectors, inverse = np.ones((1, 2), np.float32), np.ones((1, 1, 2), np.float32), np.zeros(1, np.int32)
    gather_vectors(rows, inverse, vectors, 0, 1)
    scatter_vectors(vectors, inverse, rows, 0, 1)
    pool_bags(rows, inverse, segments, False, vectors)
    spread_bags(vectors, inverse, segments, False, rows)
    first_occurrences(inverse, 1, inverse.copy(), inverse.copy())
    sum_samples(rows, inverse, segments, np.empty((1, 2), np.float32))
    spread_samples(rows, inverse, segments, np.zeros((1, 2), np.float32))
    seeds = np.zeros(1, np.uint64)
    look_up_samples(one.reshape(1, 1), seeds, seeds, rows, rows[:, :1].copy(), np.empty((1, 2), np.float32))
