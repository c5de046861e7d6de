"""MLET and narrow alone, in place of torch.nn.EmbeddingBag."""

from __future__ import annotations

from typing import Any, Unpack

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from .base import EmbeddingError
from .gather import distinct_rows, read_rows
from .layers import Layer
from .layers_arguments import Common
from .projected import Projected
from .torch_rows import map_rows


class _ProjectedLayer(Layer):
    method: Projected

    def compose(self, ids: Tensor) -> Tensor:
        floats = self.method.projection.dtype in (torch.float32, torch.float64)
        if ids.device.type != "cpu" or not floats or torch.compiler.is_compiling():
            return super().compose(ids)
        # As on a store: the same row gives the same vector, so each is composed once.
        rows = map_rows(self.method.lookups[0].map, ids)
        (table,) = (p for name, p in self.named_parameters() if "." not in name)
        firsts, number = distinct_rows(rows.int().numpy(), len(table))
        return read_rows(self.method.compose([F.embedding(rows[torch.from_numpy(firsts)], table)]), number)

    def reset_parameters(self) -> None:
        super().reset_parameters()
        if self.stored is None and self.method.projection.device.type != "meta":
            self.method.reset_parameters()


class MLET(_ProjectedLayer):
    """Trained as num_embeddings x inner_dim (parameter `factor`) times a projection (`method.projection`).

    inner_dim (k) is embedding_dim or more; 4 times as much is a place to begin. See `workers.embeddings.mlet.MLET`.
    """

    def __init__(
        self, num_embeddings: int, embedding_dim: int, *bag: Any, inner_dim: int, **common: Unpack[Common]
    ) -> None:
        super().__init__("mlet", num_embeddings, embedding_dim, {"inner_dim": inner_dim}, *bag, **common)

    @torch.no_grad()
    def collapse(self) -> nn.EmbeddingBag:
        """The same vectors as one table of num_embeddings x embedding_dim, to serve with.

        Raises:
            EmbeddingError: the factor lives on a store, where it may be too large for this.
        """
        if self.stored is not None:
            raise EmbeddingError("collapse: not of a layer on a store; `embershard export` does it piece by piece")
        return nn.EmbeddingBag(
            self.num_embeddings,
            self.embedding_dim,
            mode=self.mode,
            _weight=self.method.compose([self.get_parameter("factor")]),
            include_last_offset=self.include_last_offset,
            padding_idx=self.padding_idx,
        )


class Narrow(_ProjectedLayer):
    """Parameter `narrow`, num_embeddings x w, times a projection to embedding_dim (`method.projection`).

    Takes inner_dim (w, below embedding_dim) or ratio; see `workers.embeddings.narrow.Narrow`.
    """

    def __init__(
        self,
        num_embeddings: int,
        embedding_dim: int,
        *bag: Any,
        inner_dim: int | None = None,
        ratio: float | None = None,
        **common: Unpack[Common],
    ) -> None:
        sizes = {"inner_dim": inner_dim, "ratio": ratio}
        super().__init__("narrow", num_embeddings, embedding_dim, sizes, *bag, **common)
