"""The planted model of a generated click log: rows from (seed, row) alone, logits from (model seed, ids) alone."""

from __future__ import annotations

import math
from typing import Any

import numpy as np

from .jit import jit
from .kernels import LOG1P_TABLE, mix

Array = np.ndarray[Any, Any]

_FIRST_OF_PAIR, _SECOND_OF_PAIR = 1 << 20, 1 << 21


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
def draw_ids(
    first: int, columns: int, key: np.uint64, cardinalities: Array, steps: Array, exponent: float, ids: Array
) -> None:
    """ids int64 [F, B] of rows first, first + 1, ...: Zipf ranks, as rank * step mod cardinality (int64 [F]).

    columns: all columns of the log, so that each (row, column) draws its own number.
    """
    for f in range(len(ids)):
        scale = zipf_scale(cardinalities[f], exponent)
        for b in range(ids.shape[1]):
            u = _unit(np.uint64((first + b) * columns + f), key)
            ids[f, b] = zipf_rank(u, cardinalities[f], exponent, scale) * steps[f] % cardinalities[f]


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
def planted_logits(
    ids: Array, dense: Array, key: np.uint64, per_id: float, per_pair: float, per_dense: float, out: Array
) -> None:
    """out float64 [B]: a sum of effects of ids [F, B], of pairs of neighbouring features' ids and of ln(dense + 1)."""
    out[:] = 0.0
    for f in range(len(ids)):
        for b in range(len(out)):
            out[b] += per_id * _effect(ids[f, b], f, key)
    for f in range(0, len(ids) - 1, 2):
        for b in range(len(out)):
            first = _effect(ids[f, b], f + _FIRST_OF_PAIR, key)
            out[b] += per_pair * first * _effect(ids[f + 1, b], f + _SECOND_OF_PAIR, key)
    for k in range(len(dense)):
        sign = 1.0 if k % 2 == 0 else -1.0
        for b in range(len(out)):
            value = LOG1P_TABLE[dense[k, b]] if 0 <= dense[k, b] < len(LOG1P_TABLE) else math.log1p(dense[k, b])
            out[b] += per_dense * sign * (value - 1.0)


@jit
def draw_labels(first: int, key: np.uint64, logits: Array, labels: Array) -> None:
    """labels int8 [B]: 1 with probability sigmoid(logit)."""
    for b in range(len(labels)):
        labels[b] = _unit(np.uint64(first + b), key) * (1.0 + math.exp(-logits[b])) < 1.0
