"""A ranker over all items from what somebody liked, and the two losses that train it."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from .base import Model, mlp


class Ranker(Model):
    """All feature vectors and dense columns side by side, layers with ReLU, a score for every item; the last is linear.

    `vectors`: floats that the features' vectors amount to per sample, F * d or the width of a per-sample vector.
    """

    accepts = frozenset({"feature", "sample"})

    def __init__(self, dense: int, vectors: int, items: int, *, hidden: Sequence[int], seed: int = 0) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(seed)
        self.layers = mlp([dense + vectors, *hidden, items], generator, linear_last=True)

    def forward(self, dense: Tensor, vectors: Tensor) -> Tensor:
        """dense [B, D], vectors [B, F, d] or [B, m] -> scores [B, items]."""
        joined = vectors.flatten(1)
        scores: Tensor = self.layers(torch.cat([dense, joined], 1) if dense.shape[1] else joined)
        return scores


def pointwise_losses(scores: Tensor, rows: Tensor, items: Tensor) -> Tensor:
    """Cross-entropy of a softmax over all items, for each target t: item items[t] of row rows[t]; [T]."""
    return scores.logsumexp(1)[rows] - scores[rows, items]


def ranknet_losses(scores: Tensor, rows: Tensor, items: Tensor, others: Tensor) -> Tensor:
    """log(1 + exp(s_j - s_i)): target i = items[t] should be above j = others[t] (Burges et al. 2005); [T]."""
    losses: Tensor = torch.nn.functional.softplus(scores[rows, others] - scores[rows, items])
    return losses


def draw_others(known: Tensor, rows: Tensor, count: int, items: int) -> Tensor:
    """For each of `rows`, int64 [T], one of `items` drawn evenly from those that are not known; -1 where all are.

    known: row * items + item, int64, of all pairs of the `count` rows that must not be drawn, in any order. Drawn by
    torch's random state: the r-th free item is r plus the number of known items before it, so nothing is drawn twice.
    """
    pairs = torch.unique(known)
    begins = torch.searchsorted(pairs, torch.arange(count + 1) * items)
    taken = begins.diff()
    # Free items before the k-th known one of a row: its number minus k.
    before = pairs - (torch.arange(len(pairs)) - begins[:-1].repeat_interleave(taken))
    free = items - taken[rows]
    drawn = (torch.rand(len(rows), dtype=torch.float64) * free).long()
    passed = torch.searchsorted(before, rows * items + drawn, right=True) - begins[rows]
    return torch.where(free > 0, drawn + passed, -1)
