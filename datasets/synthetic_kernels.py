"""The planted model of a generated click log: rows from (seed, row) alone, logits from (model seed, ids) alone."""

from __future__ import annotations

import math
from typing import Any

import numpy as np

from .jit import jit
from .kernels import LOG1P_TABLE, mix

Array = np.ndarray[Any, Any]

_LOG1P = LOG1P_TABLE[:4096]  # part of what a seed means: beyond it the logarithm is not rounded to float32


@jit
def _unit(value: np.uint64, key: np.uint64) -> Any:
    """A uniform float64 in (0, 1)."""
    return (np.float64(mix(value, key) >> np.uint64(11)) + 0.5) / 9007199254740992.0


@jit
def _effect(value: np.int64, stream: int, key: np.uint64) -> Any:
    """Zero mean and unit variance over values: uniform on +-sqrt(3)."""
    return (2.0 * _unit(np.uint64(value), mix(np.uint64(stream), key)) - 1.0) * 1.7320508075688772


@jit
def zipf_scale(n: int, exponent: float) -> Any:
    """What `zipf_rank` needs of (n, exponent), computed once per column."""
    return math.log(n + 1.0) if exponent == 1.0 else math.pow(n + 1.0, 1.0 - exponent) - 1.0


@jit
def zipf_rank(u: float, n: int, exponent: float, scale: float) -> Any:
    """Rank in [0, n) of a uniform u: P(rank < k) is the integral of x^-exponent over [1, k + 1], by that to n + 1."""
    x = math.exp(u * scale) if exponent == 1.0 else math.exp(math.log(1.0 + u * scale) / (1.0 - exponent))
    return min(np.int64(x) - 1, n - 1)


@jit
def draw_offsets(first: int, columns: int, column: int, key: np.uint64, most: int, offsets: Array) -> None:
    """offsets int32 [B + 1] of one column's bags in rows first, first + 1, ...: 1 to `most` ids, all equally likely."""
    offsets[0] = 0
    for b in range(len(offsets) - 1):
        u = _unit(np.uint64((first + b) * columns + column), key)
        offsets[b + 1] = offsets[b] + 1 + np.int32(u * most)


@jit
def draw_ids(
    first: int,
    columns: int,
    column: int,
    key: np.uint64,
    cardinality: int,
    step: int,
    exponent: float,
    offsets: Array,
    ids: Array,
) -> None:
    """ids int64 of one column's bags, offsets int32 [B + 1]: Zipf ranks, as rank * step mod cardinality.

    columns: all columns of the log, so that each (row, column) draws its own numbers.
    """
    scale, drawn = zipf_scale(cardinality, exponent), np.empty(len(ids))
    for b in range(len(offsets) - 1):
        own = key
        for i in range(offsets[b], offsets[b + 1]):
            drawn[i] = _unit(np.uint64((first + b) * columns + column), own)
            own = mix(own, np.uint64(1))
    for i in range(len(ids)):
        ids[i] = zipf_rank(drawn[i], cardinality, exponent, scale) * step % cardinality


@jit
def draw_dense(first: int, columns: int, key: np.uint64, missing: Array, dense: Array, null: Array) -> None:
    """dense int32 [D, B]: exp(1.5 E) - 1 with E exponential, heavy-tailed; null bool [D, B] with shares missing [D]."""
    for k in range(len(dense)):
        for b in range(dense.shape[1]):
            u = _unit(np.uint64((first + b) * columns + columns - 1 - k), key)
            null[k, b] = u < missing[k]
            dense[k, b] = 0
            if not null[k, b]:
                tail = (1.0 - u) / (1.0 - missing[k])
                dense[k, b] = np.int32(math.exp(min(-1.5 * math.log(tail), 13.0)) - 1.0)


@jit
def add_effects(offsets: Array, ids: Array, stream: int, key: np.uint64, weight: float, out: Array) -> None:
    """Adds weight times the sum of the effects of each bag's ids to out float64 [B], bags as in `draw_ids`."""
    for b in range(len(out)):
        total = 0.0
        for i in range(offsets[b], offsets[b + 1]):
            total += _effect(ids[i], stream, key)
        out[b] += weight * total


@jit
def add_dense(dense: Array, weight: float, out: Array) -> None:
    """Adds weight * (ln(x + 1) - 1) of dense int32 [D, B] to out float64 [B], with alternating signs."""
    for k in range(len(dense)):
        signed = weight if k % 2 == 0 else -weight
        for b in range(len(out)):
            value = _LOG1P[dense[k, b]] if 0 <= dense[k, b] < len(_LOG1P) else math.log1p(dense[k, b])
            out[b] += signed * (value - 1.0)


@jit
def draw_labels(first: int, key: np.uint64, logits: Array, labels: Array) -> None:
    """labels int8 [B]: 1 with probability sigmoid(logit)."""
    for b in range(len(labels)):
        labels[b] = _unit(np.uint64(first + b), key) * (1.0 + math.exp(-logits[b])) < 1.0
