"""From the pulled rows of a batch to one vector per (sample, feature), and gradients back to those rows."""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from itertools import pairwise
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

from . import kernels


def _array(tensor: Tensor) -> np.ndarray:
    array: np.ndarray = tensor.detach().contiguous().numpy()
    return array


_SMALL_BYTES = 1 << 18  # below, waking another thread costs more than it saves
_MOST_THREADS = 8
_helpers = ThreadPoolExecutor(_MOST_THREADS - 1, thread_name_prefix="vectors")


def _in_parts(kernel: Callable[..., None], count: int, moved: int, *arrays: np.ndarray) -> None:
    """kernel(*arrays, begin, end) over [0, count), which moves `moved` bytes, on as many threads as torch may use."""
    parts = 1 if moved < _SMALL_BYTES else max(1, min(torch.get_num_threads(), _MOST_THREADS, count))
    ends = [count * (part + 1) // parts for part in range(parts)]
    others = [_helpers.submit(kernel, *arrays, *span) for span in pairwise(ends)]
    kernel(*arrays, 0, ends[0])
    for other in others:
        other.result()


class _Gather(torch.autograd.Function):
    """rows [U, d], inverse int32 [F * B] -> [B, F, d]; sums gradients per row in the order of the occurrences."""

    @staticmethod
    def forward(ctx: Any, rows: Tensor, inverse: np.ndarray, features: int, own_rows: bool) -> Tensor:
        ctx.inverse, ctx.rows, ctx.own_rows = inverse, len(rows), own_rows
        out = rows.new_empty(len(inverse) // features, features, rows.shape[1])
        _in_parts(kernels.gather_vectors, len(out), out.nbytes, _array(rows), inverse, out.numpy())
        return out

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        grad = grads[0]
        out = grad.new_zeros(ctx.rows, grad.shape[2])
        # Threads that add to the same row would need an order: features are divided only if none shares a row.
        moved = grad.nbytes if ctx.own_rows else 0
        _in_parts(kernels.scatter_vectors, grad.shape[1], moved, _array(grad), ctx.inverse, out.numpy())
        return out, None, None, None


class _Pool(torch.autograd.Function):
    """rows [U, d], inverse int32 [N], offsets int64 [F * B + 1] -> [B, F, d], sum or mean of each bag."""

    @staticmethod
    def forward(ctx: Any, rows: Tensor, inverse: np.ndarray, offsets: np.ndarray, features: int, mean: bool) -> Tensor:
        ctx.inverse, ctx.offsets, ctx.mean, ctx.rows = inverse, offsets, mean, len(rows)
        out = rows.new_empty((len(offsets) - 1) // features, features, rows.shape[1])
        kernels.pool_bags(_array(rows), inverse, offsets, mean, out.numpy())
        return out

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        grad = grads[0]
        out = grad.new_zeros(ctx.rows, grad.shape[2])
        kernels.spread_bags(_array(grad), ctx.inverse, ctx.offsets, ctx.mean, out.numpy())
        return out, None, None, None, None


class _SumSamples(torch.autograd.Function):
    """rows [U, w], inverse int32 [N], offsets int64 [L * B + 1] -> [B, w], the sum over a sample's lookups."""

    @staticmethod
    def forward(ctx: Any, rows: Tensor, inverse: np.ndarray, offsets: np.ndarray, lookups: int) -> Tensor:
        ctx.inverse, ctx.offsets, ctx.rows = inverse, offsets, len(rows)
        out = rows.new_empty((len(offsets) - 1) // lookups, rows.shape[1])
        kernels.sum_samples(_array(rows), inverse, offsets, out.numpy())
        return out

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        grad = grads[0]
        out = grad.new_zeros(ctx.rows, grad.shape[1])
        kernels.spread_samples(_array(grad), ctx.inverse, ctx.offsets, out.numpy())
        return out, None, None, None


def read_rows(rows: Tensor, inverse: np.ndarray) -> Tensor:
    """One row per id: rows [U, w] at inverse int32 [N] -> [N, w]."""
    return vectors(rows, inverse, 1).squeeze(1)


def distinct_rows(inverse: np.ndarray, rows: int) -> tuple[np.ndarray, np.ndarray]:
    """(firsts, number): `inverse` int32 [N], values below `rows`, equals inverse[firsts][number]; firsts ascend.

    So what is composed from inverse[firsts] depends on the batch alone, not on where rows live.
    """
    firsts, number = np.empty_like(inverse), np.empty_like(inverse)
    return firsts[: kernels.first_occurrences(inverse, rows, firsts, number)], number


def vectors(rows: Tensor, inverse: np.ndarray, features: int, *, own_rows: bool = False) -> Tensor:
    """One id per (sample, feature): rows [U, d], inverse int32 [F * B], feature-major -> [B, F, d].

    own_rows: no row belongs to two features.
    """
    if rows.device.type == "cpu":
        out: Tensor = _Gather.apply(rows, inverse, features, own_rows)  # type: ignore[no-untyped-call]
        return out
    index = torch.from_numpy(inverse).to(rows.device, non_blocking=True)
    return F.embedding(index.view(features, -1).t(), rows)


def pooled(rows: Tensor, inverse: np.ndarray, offsets: np.ndarray, features: int, pooling: str) -> Tensor:
    """Bags: rows [U, d], inverse int32 [N], offsets int64 [F * B + 1], feature-major -> [B, F, d]."""
    if rows.device.type == "cpu":
        out: Tensor = _Pool.apply(rows, inverse, offsets, features, pooling == "mean")  # type: ignore[no-untyped-call]
        return out
    index = torch.from_numpy(inverse.astype(np.int64)).to(rows.device, non_blocking=True)
    starts = torch.from_numpy(offsets).to(rows.device, non_blocking=True)
    bags = F.embedding_bag(index, rows, starts, mode=pooling, include_last_offset=True)
    return bags.view(features, -1, rows.shape[1]).transpose(0, 1)


def sample_sums(rows: Tensor, inverse: np.ndarray, offsets: np.ndarray, lookups: int) -> Tensor:
    """One vector per sample: rows [U, w], inverse int32 [N], offsets int64 [L * B + 1], lookup-major -> [B, w]."""
    if rows.device.type == "cpu":
        out: Tensor = _SumSamples.apply(rows, inverse, offsets, lookups)  # type: ignore[no-untyped-call]
        return out
    return pooled(rows, inverse, offsets, lookups, "sum").sum(1)
