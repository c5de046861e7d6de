"""DLRM (Naumov et al. 2019, arXiv 1906.00091) as facebookresearch/dlrm defines it."""

from __future__ import annotations

from collections.abc import Sequence
from functools import cache
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from .base import Model, mlp


class _LowerDots(torch.autograd.Function):
    """x [B, n, d] -> x x^T below the diagonal, row by row [B, n (n - 1) / 2].

    Autograd's own way multiplies twice on the way back and scatters; here the gradient is one symmetric matrix, read by
    index, and one product.
    """

    @staticmethod
    def forward(ctx: Any, x: Tensor, lower: Tensor, mirror: Tensor) -> Tensor:
        ctx.save_for_backward(x, mirror)
        return torch.bmm(x, x.transpose(1, 2)).flatten(1).index_select(1, lower)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        x, mirror = ctx.saved_tensors
        batch, n, _ = x.shape
        both = grad.index_select(1, mirror).view(batch, n, n)
        both.diagonal(dim1=1, dim2=2).zero_()
        return torch.bmm(both, x), None, None


@cache
def _pairs(vectors: int, device: torch.device) -> tuple[Tensor, Tensor]:
    """Flat positions of the pairs (i, j < i) in [n, n], and for every position the pair it belongs to."""
    row, column = torch.tril_indices(vectors, vectors, -1)
    place = torch.zeros(vectors, vectors, dtype=torch.int64)
    place[row, column] = place[column, row] = torch.arange(len(row))
    return (row * vectors + column).to(device), place.flatten().to(device)


def dot_interaction(x: Tensor) -> Tensor:
    """Dot products of all pairs of distinct vectors: [B, n, d] -> [B, n (n - 1) / 2], pair (i, j < i) in row order."""
    # The positions are no buffers of a module: DistributedDataParallel would broadcast them in every step.
    out: Tensor = _LowerDots.apply(x, *_pairs(x.shape[1], x.device))  # type: ignore[no-untyped-call]
    return out


class DLRM(Model):
    """Bottom MLP over the dense columns, dot interaction of its output with the feature vectors, top MLP to one logit.

    ReLU after every layer of the bottom, also its last; the top's last layer is linear. Without dense columns there is
    no bottom MLP and only the feature vectors interact; a single one, with nothing to interact with, goes into the top.

    per_sample: one vector of width dim stands for all features. Nothing interacts then: it is concatenated to the
    bottom's output, as MEM-REC's authors have it.
    """

    accepts = frozenset({"feature", "sample"})

    def __init__(
        self,
        dense: int,
        features: int,
        dim: int,
        *,
        bottom: Sequence[int],
        top: Sequence[int],
        seed: int = 0,
        per_sample: bool = False,
    ) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(seed)
        self.bottom = mlp([dense, *bottom, dim], generator, linear_last=False) if dense else None
        vectors = features + 1 if dense else features
        interaction = dim if per_sample or vectors == 1 else vectors * (vectors - 1) // 2
        _pairs(vectors, torch.device("cpu"))  # kept from here on: under torch.export's tracing they would be no numbers
        width = (dim if dense else 0) + interaction
        self.top = mlp([width, *top, 1], generator, linear_last=True)

    def forward(self, dense: Tensor, vectors: Tensor) -> Tensor:
        below = None if self.bottom is None else self.bottom(dense)
        if vectors.dim() == 2:
            inputs = vectors if below is None else torch.cat([below, vectors], 1)
        elif below is None:
            inputs = dot_interaction(vectors) if vectors.shape[1] > 1 else vectors.flatten(1)
        else:
            pairs = dot_interaction(torch.cat([below.unsqueeze(1), vectors], 1))
            inputs = torch.cat([below, pairs], 1)
        logits: Tensor = self.top(inputs)
        return logits.squeeze(1)
