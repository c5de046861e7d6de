"""DCN-v2 (Wang et al. 2021, arXiv 2008.13535): explicit feature crosses, then a deep network ("stacked")."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor, nn

from .base import Model, mlp


class CrossLayer(nn.Module):
    """x0 * (W x + b) + x, all [B, n] (equation 1); with a rank, W = U V^T, U and V [n, rank] (equation 2).

    Weights are drawn from N(0, 2 / (inputs + outputs)), biases are zero.
    """

    def __init__(self, width: int, rank: int | None, generator: torch.Generator) -> None:
        super().__init__()
        shapes = [(width, width)] if rank is None else [(rank, width), (width, rank)]
        self.factors = nn.ParameterList(
            torch.empty(shape).normal_(0.0, math.sqrt(2 / sum(shape)), generator=generator) for shape in shapes
        )
        self.bias = nn.Parameter(torch.zeros(width))

    def forward(self, x0: Tensor, x: Tensor) -> Tensor:
        projected = x
        for factor in self.factors:
            projected = projected @ factor.t()
        return x0 * (projected + self.bias) + x


class DCNv2(Model):
    """Bottom MLP over the dense columns, beside it all feature vectors; cross layers; top MLP to one logit.

    The form that MLPerf trains as DLRM-DCNv2. `vectors`: floats that the features' vectors amount to per sample, F * d
    or the width of a per-sample vector; `dim`: the width of the bottom's output. `rank` None: full matrices.
    """

    accepts = frozenset({"feature", "sample"})

    def __init__(
        self,
        dense: int,
        vectors: int,
        dim: int,
        *,
        bottom: Sequence[int],
        top: Sequence[int],
        layers: int,
        rank: int | None,
        seed: int = 0,
    ) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(seed)
        self.bottom = mlp([dense, *bottom, dim], generator, linear_last=False) if dense else None
        width = vectors + (dim if dense else 0)
        self.cross = nn.ModuleList(CrossLayer(width, rank, generator) for _ in range(layers))
        self.top = mlp([width, *top, 1], generator, linear_last=True)

    def forward(self, dense: Tensor, vectors: Tensor) -> Tensor:
        x0 = vectors.flatten(1)
        if self.bottom is not None:
            x0 = torch.cat([self.bottom(dense), x0], 1)
        x = x0
        for layer in self.cross:
            x = layer(x0, x)
        logits: Tensor = self.top(x)
        return logits.squeeze(1)
