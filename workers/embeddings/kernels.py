"""Free functions over arrays: ids to rows, rows to vectors and back. Each has a numpy oracle in the tests.

The numbers that `map_ids` gives are part of the checkpoint format: they never change.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from llvmlite import ir
from numba import types
from numba.core import cgutils
from numba.extending import intrinsic

from ...parameter_server.jit import jit
from ...parameter_server.placement_kernels import mix64
from ...parameter_server.row_kernels import LANES, LINE

INDEX = 0
HASH = 1
BLOCK = 64  # columns that `sum_rows` adds at once: eight registers of eight lanes

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
def scatter_vectors(
    grad: np.ndarray, stride: int, features: int, inverse: np.ndarray, out: np.ndarray, begin: int, end: int
) -> None:
    """The transpose of `gather_vectors`: out [U, d] (zeros) += grad, samples in order, features begin to end.

    grad: flat; sample b's [F, d] begins at b * stride. The order is that of the occurrences in the batch, never that of
    the rows: the sums do not depend on the layout.
    """
    width = out.shape[1]
    batch = len(inverse) // features
    for b in range(batch):
        for f in range(begin, end):
            source = b * stride + f * width
            # As arrays of their own: an index that could be negative keeps the loop from becoming vector instructions.
            total, added = out[inverse[f * batch + b]], grad[source : source + width]
            for j in range(width):
                total[j] += added[j]


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


@intrinsic
def sum_rows(
    typing_context: Any, table: Any, rows: Any, begin: Any, count: Any, column: Any, out: Any, sample: Any
) -> Any:
    """out[sample, column : column + BLOCK] <- the sum of table[rows[begin : begin + count]] there, first row first.

    Asks for rows[begin + count : begin + 2 count], those of the next sample, meanwhile. table and out float32
    [., width], rows int64, all C-contiguous; nothing is checked.
    """

    def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        table, rows, out = (context.make_array(signature.args[k])(context, builder, arguments[k]) for k in (0, 1, 5))
        _, _, begin, count, column, _, sample = arguments
        width = builder.extract_value(out.shape, 1)
        lanes, byte, word = ir.VectorType(ir.FloatType(), LANES), ir.IntType(8).as_pointer(), ir.IntType(32)
        prefetch = builder.module.declare_intrinsic(
            "llvm.prefetch", (byte,), ir.FunctionType(ir.VoidType(), [byte, word, word, word])
        )

        def at(data: Any, row: Any) -> Any:
            return builder.gep(data, [builder.add(builder.mul(row, width), column)])

        def lane(pointer: Any, k: int) -> Any:
            return builder.bitcast(builder.gep(pointer, [ir.Constant(begin.type, k * LANES)]), lanes.as_pointer())

        nothing = ir.Constant(lanes, [0.0] * LANES)
        sums = [cgutils.alloca_once_value(builder, nothing) for _ in range(BLOCK // LANES)]
        for total in sums:
            builder.store(nothing, total)  # the slot is set up once per function, not once per call
        zero, one = (ir.Constant(begin.type, k) for k in (0, 1))
        with cgutils.for_range_slice(builder, zero, count, one) as (i, _):
            place = builder.add(begin, i)
            here = at(table.data, builder.load(builder.gep(rows.data, [place])))
            ahead = at(table.data, builder.load(builder.gep(rows.data, [builder.add(place, count)])))
            for offset in range(0, BLOCK * 4, LINE):
                line = builder.gep(builder.bitcast(ahead, byte), [ir.Constant(begin.type, offset)])
                builder.call(prefetch, [line, word(0), word(3), word(1)])  # for reading, keep in all levels, data
            for k, total in enumerate(sums):
                builder.store(builder.fadd(builder.load(total), builder.load(lane(here, k), align=4)), total)
        target = at(out.data, sample)
        for k, total in enumerate(sums):
            builder.store(builder.load(total), lane(target, k), align=4)
        return context.get_dummy_value()

    return types.none(table, rows, types.int64, types.int64, types.int64, out, types.int64), generate


@jit
def hash_samples(ids: np.ndarray, seeds: np.ndarray, modulus: int, rows: np.ndarray) -> None:
    """rows int64 [B * F * K or more] <- the rows below `modulus` of ids int64 [B, F], seeds uint64 [F * K].

    Samples in order, features within them, repetitions within those. The inner loop is the one over the features: over
    the repetitions, of which there is mostly one, it takes twice as long.
    """
    batch, features = ids.shape
    repeats = len(seeds) // features
    for b in range(batch):
        for k in range(repeats):
            for f in range(features):
                word = mix64(mix64(_U64(ids[b, f])) ^ seeds[f * repeats + k])
                rows[(b * features + f) * repeats + k] = np.int64(multiply_high(word, _U64(modulus)))


@jit
def look_up_samples(
    ids: np.ndarray,
    token_seeds: np.ndarray,
    weight_seeds: np.ndarray,
    token: np.ndarray,
    weight: np.ndarray,
    out: np.ndarray,
) -> None:
    """out [B, d] <- MEM-REC's vectors of ids int64 [B, F]; the rows of a sample are asked for during the one before it.

    token_seeds uint64 [F * K], weight_seeds [F * K_w] (K_w may be 0), feature by feature; token [D, d], weight
    [D_w, 1]. The sums are those of `sum_samples`, in its order.
    """
    batch, width = out.shape
    count, weights = len(token_seeds), len(weight_seeds)
    rows = np.empty((batch + 1) * max(count, weights), np.int64)
    alpha = np.ones(batch, np.float32)
    if weights:
        # Before the sums, not between them: the small table of weights stays in the nearer cache meanwhile.
        hash_samples(ids, weight_seeds, len(weight), rows)
        for b in range(batch):
            alpha[b] = 0
            for i in range(b * weights, (b + 1) * weights):
                alpha[b] += weight[rows[i], 0]
    hash_samples(ids, token_seeds, len(token), rows)
    rows[batch * count : (batch + 1) * count] = 0  # asked for behind the last sample
    whole = width - width % BLOCK
    for b in range(batch):
        begin = b * count
        for column in range(0, whole, BLOCK):
            sum_rows(token, rows, begin, count, column, out, b)
        for j in range(whole, width):
            out[b, j] = 0
        for i in range(begin, begin + count):
            for j in range(whole, width):
                out[b, j] += token[rows[i], j]
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
    scatter_vectors(vectors.reshape(-1), 2, 1, inverse, rows, 0, 1)
    pool_bags(rows, inverse, segments, False, vectors)
    spread_bags(vectors, inverse, segments, False, rows)
    first_occurrences(inverse, 1, inverse.copy(), inverse.copy())
    sum_samples(rows, inverse, segments, np.empty((1, 2), np.float32))
    spread_samples(rows, inverse, segments, np.zeros((1, 2), np.float32))
    seeds = np.zeros(1, np.uint64)
    look_up_samples(one.reshape(1, 1), seeds, seeds, rows, rows[:, :1].copy(), np.empty((1, 2), np.float32))
