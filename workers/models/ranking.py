"""Rankers over all items from the vector of a history, and the losses that train them."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from .base import mlp


class Ranker(nn.Module):
    """Pooled vector of what somebody liked [B, d] -> a score for every item [B, items]; the last layer is linear."""

    def __init__(self, dim: int, items: int, *, hidden: Sequence[int], seed: int = 0) -> None:
        super().__init__()
        self.layers = mlp([dim, *hidden, items], torch.Generator().manual_seed(seed), linear_last=True)

    def forward(self, history: Tensor) -> Tensor:
        scores: Tensor = self.layers(history)
        return scores


def pointwise_loss(scores: Tensor, rows: Tensor, items: Tensor) -> Tensor:
    """Mean cross-entropy of a softmax over all items; target t is item items[t] of history rows[t]."""
    return F.nll_loss(scores.log_softmax(1)[rows], items)


def ranknet_loss(scores: Tensor, rows: Tensor, items: Tensor, others: Tensor) -> Tensor:
    """Mean of log(1 + exp(s_j - s_i)): target i = items[t] should be above j = others[t] (Burges et al. 2005)."""
    return F.softplus(scores[rows, others] - scores[rows, items]).mean()
