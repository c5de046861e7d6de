"""What `mlet` and `narrow` share: rows of one width, times a matrix of the feature, are vectors of another."""

from __future__ import annotations

import math
from collections.abc import Hashable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from ...parameter_server.tables import Initializer, Optimizer, TableSpec
from .base import Feature, Lookup, Method
from .full import full_row_map


class _Project(torch.autograd.Function):
    """rows [N, k] in segments, one matrix [k, d] each -> [N, d]: as many products, but one node and one result.

    Each product is the very one that `rows[begin:end] @ matrix` and its gradient would run, so the numbers are those
    of every feature composed alone.
    """

    @staticmethod
    def forward(ctx: Any, rows: Tensor, segments: Sequence[int], *matrices: Tensor) -> Tensor:
        ctx.save_for_backward(rows, *matrices)
        ctx.segments = segments
        out = rows.new_empty(len(rows), matrices[0].shape[1])
        for f, matrix in enumerate(matrices):
            own = slice(segments[f], segments[f + 1])
            torch.mm(rows[own], matrix, out=out[own])
        return out

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Any, ...]:
        rows, *matrices = ctx.saved_tensors
        grad = grads[0].contiguous()
        back = torch.empty_like(rows)
        of_matrices = []
        for f, matrix in enumerate(matrices):
            own = slice(ctx.segments[f], ctx.segments[f + 1])
            torch.mm(grad[own], matrix.t(), out=back[own])
            of_matrices.append(rows[own].t() @ grad[own])
        return back, None, *of_matrices


class Projected(Method):
    """`full_rows` x k on the store (ids to rows as `full` has them) and `projection`, k x d, with the dense part.

    Rows begin as U(+-sqrt(1/n)), as `full` would, and the projection as U(+-sqrt(3/k)), of variance 1/k: a vector's
    coordinates then have the variance of the single-layer table, 1/(3n). (Ours: the papers' abstracts name none.)
    """

    projection: nn.Parameter

    def __init__(self, feature: Feature, optimizer: Optimizer, role: str, inner_dim: int) -> None:
        initial = Initializer(kind="uniform", scale=math.sqrt(1 / feature.full_rows))
        table = TableSpec(
            name=f"{feature.name}.{role}",
            rows=feature.full_rows,
            width=inner_dim,
            initializer=initial,
            optimizer=optimizer,
        )
        super().__init__(feature, [table], [Lookup(0, full_row_map(feature))])
        self.projection = nn.Parameter(torch.empty(inner_dim, feature.dim))
        self.reset_parameters()

    @torch.no_grad()
    def reset_parameters(self) -> None:
        """Gives the projection its initial values: they depend on the feature's seed and name alone."""
        generator = torch.Generator().manual_seed(self.feature.key("projection"))
        bound = math.sqrt(3 / len(self.projection))
        self.projection.copy_(torch.empty(self.projection.shape).uniform_(-bound, bound, generator=generator))

    def compose(self, rows: Sequence[Tensor]) -> Tensor:
        """One lookup: [N, k] @ [k, d]."""
        return rows[0] @ self.projection

    def together(self) -> Hashable:
        return "projected"

    @classmethod
    def compose_all(cls, methods: Sequence[Method], rows: Sequence[Tensor], segments: Sequence[int]) -> Tensor:
        matrices = [method.projection for method in methods if isinstance(method, Projected)]
        out: Tensor = _Project.apply(rows[0], segments, *matrices)  # type: ignore[no-untyped-call]
        return out
