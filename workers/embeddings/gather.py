"""From the pulled rows of a batch to one vector per (sample, feature), and gradients back to those rows."""

from __future__ import annotations

from functools import partial
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

from ...parameter_server.parallel import in_parts
from . import kernels


def _array(tensor: Tensor) -> np.ndarray:
    array: np.ndarray = tensor.detach().contiguous().numpy()
    return array


def _flat(grad: Tensor) -> tuple[np.ndarray, int]:
    """The floats of [B, F, d] as one array, and how far apart samples are: part of a wider tensor is not copied."""
    batch, features, width = grad.shape
    if grad.stride()[1:] != (width, 1) or grad.stride(0) < features * width:
        grad = grad.contiguous()
    stride = grad.stride(0)
    size = (batch - 1) * stride + features * width if batch else 0
    return grad.detach().as_strided((size,), (1,), grad.storage_offset()).numpy(), stride


class _Gather(torch.autograd.Function):
    """rows [U, d], inverse int32 [F * B] -> [B, F, d]; sums gradients per row in the order of the occurrences."""

    @staticmethod
    def forward(ctx: Any, rows: Tensor, inverse: np.ndarray, features: int, own_rows: bool) -> Tensor:
        ctx.inverse, ctx.rows, ctx.own_rows = inverse, len(rows), own_rows
        out = rows.new_empty(len(inverse) // features, features, rows.shape[1])
        arrays = _array(rows), inverse, out.numpy()
        in_parts(partial(kernels.gather_vectors, *arrays), len(out), out.nbytes, torch.get_num_threads())
        return out

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        grad = grads[0]
        features = grad.shape[1]
        out = grad.new_zeros(ctx.rows, grad.shape[2])
        # Threads that add to the same row would need an order: features are divided only if none shares a row.
        moved = grad.nbytes if ctx.own_rows else 0
        arguments = *_flat(grad), features, ctx.inverse, out.numpy()
        in_parts(partial(kernels.scatter_vectors, *arguments), features, moved, torch.get_num_threads())
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
