"""MLET and narrow alone, in place of torch.nn.EmbeddingBag."""

from __future__ import annotations

from typing import Unpack

import torch
from torch import nn

from .layers import Common, Layer
from .projected import Projected


class _ProjectedLayer(Layer):
    method: Projected

    def reset_parameters(self) -> None:
        super().reset_parameters()
        if self.method.projection.device.type != "meta":
            self.method.reset_parameters()


class MLET(_ProjectedLayer):
    """Trained as num_embeddings x inner_dim (parameter `factor`) times a projection (`method.projection`).

    inner_dim (k) is embedding_dim or more; 4 times as much is a place to begin. See `workers.embeddings.mlet.MLET`.
    """

    def __init__(self, num_embeddings: int, embedding_dim: int, *, inner_dim: int, **common: Unpack[Common]) -> None:
        super().__init__("mlet", num_embeddings, embedding_dim, {"inner_dim": inner_dim}, **common)

    @torch.no_grad()
    def collapse(self) -> nn.EmbeddingBag:
        """The same vectors as one table of num_embeddings x embedding_dim, to serve with."""
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
        *,
        inner_dim: int | None = None,
        ratio: float | None = None,
        **common: Unpack[Common],
    ) -> None:
        sizes = {"inner_dim": inner_dim, "ratio": ratio}
        super().__init__("narrow", num_embeddings, embedding_dim, sizes, **common)
