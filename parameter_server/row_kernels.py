"""What a shard does to rows: initial values, gather, fused updates, checks, and the ordered sum of several pushes.

Every kernel works on `index` (slab rows) of one slab, in place, row by row, in float32 arithmetic without fused
multiply-add, so that results do not depend on how rows are divided over shards.
"""

from __future__ import annotations

import math
from typing import Any

import numpy as np
from llvmlite import ir
from numba import types
from numba.core import cgutils
from numba.extending import intrinsic

from .jit import jit
from .placement_kernels import GOLDEN, block_offset, half_bits, mix64, round_keys, unfeistel

U64 = np.uint64
UNIFORM, NORMAL, CONSTANT = 0, 1, 2
AHEAD = 16  # rows between a prefetch and its use; 8 to 32 measured alike
LINE = 64  # bytes per cache line
LANES = 8


@intrinsic
def prefetch(typing_context: Any, array: Any, offset: Any) -> Any:
    """Asks for the cache line at byte `offset` of an array's data. A hint: it never faults."""

    def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        data = context.make_array(signature.args[0])(context, builder, arguments[0]).data
        pointer = builder.gep(builder.bitcast(data, ir.IntType(8).as_pointer()), [arguments[1]])
        word = ir.IntType(32)
        hint = builder.module.declare_intrinsic(
            "llvm.prefetch",
            (pointer.type,),
            ir.FunctionType(ir.VoidType(), [pointer.type, word, word, word]),
        )
        builder.call(hint, [pointer, word(0), word(3), word(1)])  # for reading, keep in all levels, data
        return context.get_dummy_value()

    return types.none(array, types.int64), generate


@jit
def prefetch_row(array: np.ndarray, row: np.int64) -> None:
    """Asks for all cache lines of one row of a C-contiguous 2-d array."""
    size = np.int64(array.shape[1] * array.itemsize)
    start = np.int64(row) * size
    for offset in range(0, size, LINE):
        prefetch(array, start + offset)


@jit
def _unit(word: np.uint64) -> float:
    """A double in (0, 1), never 0 or 1, from the top 53 bits."""
    return (float(np.int64(word >> U64(11))) + 0.5) * (1.0 / 9007199254740992.0)


@jit
def initialise(
    weights: np.ndarray,
    block: int,
    blocks: int,
    rows: int,
    key: np.uint64,
    seed: np.uint64,
    kind: int,
    scale: float,
) -> None:
    """Fills one block's share of one table, [share, width], with its initial values.

    Coordinate j of row r is drawn from the counter (seed, key, r, j) alone: uniform in (-scale, scale), normal with
    standard deviation `scale` (Box and Muller 1958, two counters each), or `scale` itself. A share's last place may lie
    beyond the table's end; it is NaN, so that it can never pass for a row.
    """
    halves = half_bits(rows)
    keys = round_keys(key)
    offset = block_offset(block, blocks, key)
    stream = mix64(mix64(U64(seed) + GOLDEN) ^ U64(key))
    share, width = weights.shape
    for place in range(share):
        x = U64(place) * U64(blocks) + U64(offset)
        if x >= U64(rows):
            weights[place, :] = np.float32(np.nan)
            continue
        x = unfeistel(x, halves, keys)
        while x >= U64(rows):
            x = unfeistel(x, halves, keys)
        counter = mix64(stream + x * GOLDEN)
        if kind == UNIFORM:
            for j in range(width):
                draw = _unit(mix64(counter + U64(j + 1) * GOLDEN))
                weights[place, j] = np.float32((2.0 * draw - 1.0) * scale)
        elif kind == NORMAL:
            for j in range(width):
                radius = _unit(mix64(counter + U64(2 * j + 1) * GOLDEN))
                angle = _unit(mix64(counter + U64(2 * j + 2) * GOLDEN))
                draw = math.sqrt(-2.0 * math.log(radius)) * math.cos(2.0 * math.pi * angle)
                weights[place, j] = np.float32(draw * scale)
        else:
            weights[place, :] = np.float32(scale)


@jit
def gather(weights: np.ndarray, index: np.ndarray, out: np.ndarray) -> None:
    """out[i] = weights[index[i]]; weights [R, width], out [U, width]."""
    count = len(index)
    width = weights.shape[1]
    for i in range(count):
        if i + AHEAD < count:
            prefetch_row(weights, np.int64(index[i + AHEAD]))
        row = np.intp(index[i])
        for j in range(width):
            out[i, j] = weights[row, j]


@jit
def update_sgd(weights: np.ndarray, index: np.ndarray, grads: np.ndarray, learning_rate: np.float32) -> None:
    """w -= lr * g."""
    count, width = grads.shape
    for i in range(count):
        if i + AHEAD < count:
            prefetch_row(weights, np.int64(index[i + AHEAD]))
        row = np.intp(index[i])
        for j in range(width):
            weights[row, j] -= learning_rate * grads[i, j]


@jit
def update_adagrad(
    weights: np.ndarray,
    state: np.ndarray,
    index: np.ndarray,
    grads: np.ndarray,
    learning_rate: np.float32,
    eps: np.float32,
) -> None:
    """s += g^2; w -= lr * g / (sqrt(s) + eps). Duchi, Hazan, Singer 2011; the same as torch.optim.Adagrad."""
    count, width = grads.shape
    for i in range(count):
        if i + AHEAD < count:
            prefetch_row(weights, np.int64(index[i + AHEAD]))
            prefetch_row(state, np.int64(index[i + AHEAD]))
        row = np.intp(index[i])
        for j in range(width):
            g = grads[i, j]
            total = state[row, j] + g * g
            state[row, j] = total
            weights[row, j] -= learning_rate * (g / (np.float32(math.sqrt(total)) + eps))


@intrinsic
def sum_squares(typing_context: Any, array: Any, start: Any, count: Any, first: Any) -> Any:
    """first + the sum of x^2 over `count` (a multiple of 8) float32 from element `start` on, in eight lanes.

    Written as vector instructions, because a compiler may not reorder a float sum by itself, and one that is allowed to
    gives other bits on every processor. Lanes are added as ((0+4)+(2+6)) + ((1+5)+(3+7)).
    """

    def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        lanes = ir.VectorType(ir.FloatType(), LANES)
        data = context.make_array(signature.args[0])(context, builder, arguments[0]).data
        sums = cgutils.alloca_once_value(builder, ir.Constant(lanes, [0.0] * LANES))
        zero, lane_count = ir.Constant(arguments[2].type, 0), ir.Constant(arguments[2].type, LANES)
        lane0 = ir.Constant(ir.IntType(32), 0)
        builder.store(builder.insert_element(builder.load(sums), arguments[3], lane0), sums)
        with cgutils.for_range_slice(builder, zero, arguments[2], lane_count) as (offset, _):
            pointer = builder.gep(data, [builder.add(arguments[1], offset)])
            values = builder.load(builder.bitcast(pointer, lanes.as_pointer()), align=4)
            builder.store(builder.fadd(builder.load(sums), builder.fmul(values, values)), sums)
        total, size = builder.load(sums), LANES
        while size > 1:
            size //= 2
            low, high = (
                ir.Constant(ir.VectorType(ir.IntType(32), size), list(range(begin, begin + size)))
                for begin in (0, size)
            )
            total = builder.fadd(builder.shuffle_vector(total, total, low), builder.shuffle_vector(total, total, high))
        return builder.extract_element(total, lane0)

    return types.float32(array, types.int64, types.int64, types.float32), generate


@jit
def mean_square(grads: np.ndarray, i: int) -> np.float32:
    """Mean of g^2 over row i, in an order that is the same on every machine."""
    width = grads.shape[1]
    whole = width - width % LANES
    tail = np.float32(0.0)
    for j in range(whole, width):
        tail += grads[i, j] * grads[i, j]
    total: np.float32 = sum_squares(grads, i * width, whole, tail)
    return total / np.float32(width)


@jit
def update_rowwise_adagrad(
    weights: np.ndarray,
    state: np.ndarray,
    index: np.ndarray,
    grads: np.ndarray,
    learning_rate: np.float32,
    eps: np.float32,
) -> None:
    """s += mean(g^2), one s per row; w -= lr / (sqrt(s) + eps) * g. facebookresearch/dlrm, `RWSAdagrad`."""
    count, width = grads.shape
    for i in range(count):
        if i + AHEAD < count:
            prefetch_row(weights, np.int64(index[i + AHEAD]))
            prefetch_row(state, np.int64(index[i + AHEAD]))
        row = np.intp(index[i])
        total = state[row, 0] + mean_square(grads, i)
        state[row, 0] = total
        factor = learning_rate / (np.float32(math.sqrt(total)) + eps)
        for j in range(width):
            weights[row, j] -= factor * grads[i, j]


@jit
def update_adam(
    weights: np.ndarray,
    state: np.ndarray,
    index: np.ndarray,
    grads: np.ndarray,
    learning_rate: np.float32,
    eps: np.float32,
    beta1: np.float32,
    beta2: np.float32,
) -> None:
    """Lazy Adam: only rows with a gradient move, and each row counts its own steps t for the bias correction.

    m = b1 m + (1 - b1) g; v = b2 v + (1 - b2) g^2; w -= lr/(1 - b1^t) * m / (sqrt(v) / sqrt(1 - b2^t) + eps).
    Kingma, Ba 2015; per row the same as torch.optim.Adam. State: m [width], v [width], t.
    """
    count, width = grads.shape
    one = np.float32(1.0)
    step, rate, root = np.float32(0.0), learning_rate, one
    for i in range(count):
        if i + AHEAD < count:
            prefetch_row(weights, np.int64(index[i + AHEAD]))
            prefetch_row(state, np.int64(index[i + AHEAD]))
        row = np.intp(index[i])
        # Arrays of their own: an index that could be negative keeps the loop from becoming vector instructions.
        first, second, steps = state[row, :width], state[row, width : 2 * width], state[row, 2 * width :]
        steps[0] += one
        if steps[0] != step:
            step = steps[0]
            # Only the bias correction is in double precision: 1 - b^t loses digits where b is close to 1.
            rate = np.float32(np.float64(learning_rate) / (1.0 - np.float64(beta1) ** np.float64(step)))
            root = np.float32(math.sqrt(1.0 - np.float64(beta2) ** np.float64(step)))
        for j in range(width):
            g = grads[i, j]
            m = beta1 * first[j] + (one - beta1) * g
            v = beta2 * second[j] + (one - beta2) * (g * g)
            first[j] = m
            second[j] = v
            weights[row, j] -= rate * (m / (np.float32(math.sqrt(v)) / root + eps))


@jit
def all_finite(words: np.ndarray) -> bool:
    """Whether no float32, seen as uint32 [N], is NaN or infinite."""
    exponent = np.uint32(0x7F800000)
    for begin in range(0, len(words), 4096):
        chunk = words[begin : begin + 4096]
        largest = np.uint32(0)
        for i in range(len(chunk)):
            largest = max(largest, chunk[i] & exponent)
        if largest == exponent:
            return False
    return True


FITS, NO_SUCH_BLOCK, BLOCK_TWICE, WRONG_COUNT, MISPLACED = 0, 1, 2, 3, 4


@jit
def check_rows(
    index: np.ndarray, blocks: np.ndarray, counts: np.ndarray, rows_per_block: int, block_count: int
) -> tuple[int, int | np.int64]:
    """Whether `index` is what blocks and counts [K] state: (FITS, -1), or what is wrong and at which of them.

    NO_SUCH_BLOCK and BLOCK_TWICE name an entry of `blocks`, WRONG_COUNT how many rows are stated, MISPLACED the first
    entry of `index` that does not lie in the block stated for it.
    """
    seen = np.zeros(block_count, np.bool_)
    stated = np.int64(0)
    for k in range(len(blocks)):
        if blocks[k] >= block_count:
            return NO_SUCH_BLOCK, k
        if seen[blocks[k]]:
            return BLOCK_TWICE, k
        seen[blocks[k]] = True
        stated += np.int64(counts[k])
    if stated != len(index):
        return WRONG_COUNT, stated
    at = np.int64(0)
    per_block = U64(rows_per_block)
    for k in range(len(blocks)):
        low = U64(blocks[k]) * per_block
        high = low + per_block
        end = at + np.int64(counts[k])
        bad = 0
        for i in range(at, end):
            bad |= int((U64(index[i]) < low) | (U64(index[i]) >= high))
        if bad:
            for i in range(at, end):
                if U64(index[i]) < low or U64(index[i]) >= high:
                    return MISPLACED, i
        at = end
    return FITS, -1


@jit
def add_rows(
    slots: np.ndarray,
    index: np.ndarray,
    grads: np.ndarray,
    merged: np.ndarray,
    sums: np.ndarray,
    count: int,
) -> int:
    """Adds (index, grads) to the `count` rows already in (merged, sums), in order; returns the new count.

    slots: int64 [2^p], at least twice the rows of all calls, -1 where empty: numbers into `merged`. A row's first
    gradient is copied and every later one added, so the sum of several ranks has one fixed order.
    """
    mask = U64(len(slots) - 1)
    width = grads.shape[1]
    for i in range(len(index)):
        row = index[i]
        slot = (U64(row) * GOLDEN) >> U64(20) & mask
        while slots[slot] >= 0 and merged[slots[slot]] != row:
            slot = (slot + U64(1)) & mask
        at = slots[slot]
        if at < 0:
            slots[slot] = count
            merged[count] = row
            for j in range(width):
                sums[count, j] = grads[i, j]
            count += 1
        else:
            for j in range(width):
                sums[at, j] += grads[i, j]
    return count
