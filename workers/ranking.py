"""Ranking items for people from the bag of what they liked: the task that MEmCom's authors compress the input of.

Only the input embedding is on the store and compressed; the output layer is part of the dense model.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Literal

import numpy as np
import torch
from pydantic import BaseModel, ConfigDict, Field
from torch import Tensor, nn

from ..datasets.schema import Ids
from ..parameter_server.store import Store
from .embeddings.base import Feature
from .embeddings.collection import EmbeddingBagCollection
from .metrics import ndcg_at_k
from .models.ranking import Ranker, pointwise_loss, ranknet_loss
from .optimizers import DenseConfig, OptimizerConfig, SparseConfig, dense_optimizer


class RankingConfig(BaseModel):
    """How a ranker is trained. The defaults are a starting point, not tuned."""

    model_config = ConfigDict(extra="forbid")
    loss: Literal["pointwise", "ranknet"] = "pointwise"
    hidden: list[int] = Field(default=[256])
    epochs: int = Field(default=10, ge=1)
    batch_size: int = Field(default=128, gt=0)
    optimizer: OptimizerConfig = Field(
        default=OptimizerConfig(
            sparse=SparseConfig(kind="adam", learning_rate=1e-3), dense=DenseConfig(kind="adam", learning_rate=1e-3)
        )
    )


@dataclass(frozen=True)
class Bags:
    """Items of person u: values[offsets[u] : offsets[u + 1]]; int64 [N] and [people + 1]."""

    values: np.ndarray
    offsets: np.ndarray

    def __len__(self) -> int:
        return len(self.offsets) - 1

    @classmethod
    def of_pairs(cls, people: np.ndarray, items: np.ndarray, count: int) -> Bags:
        """From int64 [N] pairs in any order, for people 0 to count - 1; a pair that repeats counts once."""
        order = np.lexsort((items, people))
        people, items = people[order], items[order]
        first = np.ones(len(people), np.bool_)
        first[1:] = (people[1:] != people[:-1]) | (items[1:] != items[:-1])
        sizes = np.bincount(people[first], minlength=count)
        return cls(items[first], np.concatenate([np.zeros(1, np.int64), np.cumsum(sizes)]))

    def of(self, people: np.ndarray) -> Bags:
        """The bags of some people, in their order."""
        sizes = np.diff(self.offsets)[people]
        offsets = np.concatenate([np.zeros(1, np.int64), np.cumsum(sizes)])
        within = np.arange(offsets[-1]) - np.repeat(offsets[:-1], sizes)
        return Bags(self.values[np.repeat(self.offsets[people], sizes) + within], offsets)

    @property
    def rows(self) -> np.ndarray:
        """int64 [N]: whose bag each value is in."""
        return np.repeat(np.arange(len(self)), np.diff(self.offsets))


def halves(bags: Bags, seed: int) -> tuple[Bags, Bags]:
    """Each bag dealt at random into what the ranker sees and what it should find; the larger half is seen."""
    rows, sizes = bags.rows, np.diff(bags.offsets)
    order = np.lexsort((np.random.default_rng(seed).random(len(rows)), rows))
    place = np.arange(len(rows)) - np.repeat(bags.offsets[:-1], sizes)
    seen = place < (sizes[rows] + 1) // 2
    count = len(bags)
    dealt = bags.values[order]
    return tuple(Bags.of_pairs(rows[half], dealt[half], count) for half in (seen, ~seen))  # type: ignore[return-value]


class HistoryRanker(nn.Module):
    """Input embedding over a store, mean or sum over a history's items as `feature.pooling` says, then a `Ranker`."""

    def __init__(self, feature: Feature, items: int, config: RankingConfig, store: Store, seed: int) -> None:
        super().__init__()
        optimizer = config.optimizer.sparse.update
        self.embeddings = EmbeddingBagCollection([feature], store=store, optimizer=optimizer)
        self.ranker = Ranker(feature.dim, items, hidden=config.hidden, seed=seed)
        self.items = items
        self._name = feature.name

    def forward(self, histories: Bags) -> Tensor:
        """Scores [B, items]."""
        vectors = self.embeddings(Ids((self._name,), histories.values, histories.offsets))
        scores: Tensor = self.ranker(vectors if self.embeddings.output == "sample" else vectors[:, 0])
        return scores


def train_ranker(model: HistoryRanker, seen: Bags, hidden: Bags, config: RankingConfig, seed: int) -> float:
    """Trains on all people, `config.epochs` times in random order; returns the mean loss of the last epoch.

    RankNet compares every item to be found with one drawn evenly from all items.
    """
    rng = np.random.default_rng(seed)
    optimizer = dense_optimizer(config.optimizer.dense, model.parameters())
    losses: list[float] = []
    for _ in range(config.epochs):
        losses = []
        for people in _batches(rng.permutation(len(seen)), config.batch_size):
            wanted = hidden.of(people)
            rows, items = torch.from_numpy(wanted.rows), torch.from_numpy(wanted.values)
            if not len(items):
                continue
            optimizer.zero_grad(set_to_none=True)
            scores = model(seen.of(people))
            if config.loss == "pointwise":
                loss = pointwise_loss(scores, rows, items)
            else:
                others = torch.from_numpy(rng.integers(0, model.items, len(items)))
                loss = ranknet_loss(scores, rows, items, others)
            loss.backward()  # type: ignore[no-untyped-call]
            optimizer.step()
            model.embeddings.step(config.optimizer.sparse.learning_rate)
            losses.append(loss.item())
    return float(np.mean(losses))


@torch.no_grad()
def ranking_ndcg(model: HistoryRanker, seen: Bags, hidden: Bags, k: int = 10, batch_size: int = 512) -> float:
    """Mean nDCG@k of all people with something to find; what was seen is never ranked."""
    found = []
    for people in _batches(np.arange(len(seen)), batch_size):
        known, wanted = seen.of(people), hidden.of(people)
        scores = model(known).numpy()
        scores[known.rows, known.values] = -np.inf
        gains = np.zeros(scores.shape, np.float32)
        gains[wanted.rows, wanted.values] = 1
        found.append(ndcg_at_k(scores, gains, k))
    return float(np.nanmean(np.concatenate(found)))


def _batches(people: np.ndarray, size: int) -> Iterator[np.ndarray]:
    return (people[begin : begin + size] for begin in range(0, len(people), size))
