"""What a model is trained for and measured by: clicks, or items to be found."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterable
from typing import Any, ClassVar, Protocol, Self

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

from ..datasets.schema import Batch, DataError, Schema
from .metrics import BinaryMetrics, RankingMetrics, ndcg_at_k
from .models.build import ModelConfig
from .models.ranking import draw_others, pointwise_losses, ranknet_losses

RANKED = 10  # items that nDCG looks at
_CHUNK = 256  # rows ranked at once: bounds the memory of sorting all items for each


class Metrics(Protocol):
    """Collects what `Objective.answers` returns, batch by batch; mergeable across workers."""

    def update(self, answers: np.ndarray, truth: np.ndarray) -> None: ...

    def merge(self, others: Iterable[Any]) -> Self: ...

    def compute(self) -> dict[str, Any]: ...


class Objective(ABC):
    """Between a model's outputs and the rows of a batch. judged_by: the metric that says which checkpoint is best."""

    judged_by: ClassVar[str]

    @abstractmethod
    def loss(self, outputs: Tensor, labels: Tensor, batch: Batch) -> Tensor:
        """Sum of the rows' losses, a scalar. labels: the batch's, on the device of the outputs."""

    @abstractmethod
    def answers(self, outputs: np.ndarray, batch: Batch) -> tuple[np.ndarray, np.ndarray]:
        """For each row [B] what `metrics()` takes of it."""

    @abstractmethod
    def metrics(self) -> Metrics: ...


class Clicks(Objective):
    """Binary cross-entropy of logits [B]; answers are logits and labels."""

    judged_by = "auc"

    def loss(self, outputs: Tensor, labels: Tensor, batch: Batch) -> Tensor:
        return F.binary_cross_entropy_with_logits(outputs, labels, reduction="sum")

    def answers(self, outputs: np.ndarray, batch: Batch) -> tuple[np.ndarray, np.ndarray]:
        return outputs, batch.labels

    def metrics(self) -> BinaryMetrics:
        return BinaryMetrics()


class Ranking(Objective):
    """Scores [B, items] of all items; a row's loss is the mean over the items that it should find.

    pointwise: cross-entropy of a softmax over all items. ranknet: against one item per target, drawn evenly from those
    that the row neither knows nor should find. Answers are nDCG@10 and the number of items to find; what a row knows is
    not ranked, and rows with nothing to find count for nothing.
    """

    judged_by = f"ndcg_at_{RANKED}"

    def __init__(self, config: ModelConfig) -> None:
        assert config.items is not None
        self.items = config.items
        self._pairs = config.name == "ranknet"
        self._history, self._target = config.history, config.target

    def loss(self, outputs: Tensor, labels: Tensor, batch: Batch) -> Tensor:
        rows, items = self._of(batch, self._target)
        self._check(items)
        weights = 1 / torch.bincount(rows, minlength=batch.rows)[rows]
        device = outputs.device
        if not self._pairs:
            losses = pointwise_losses(outputs, rows.to(device), items.to(device))
            return losses @ weights.to(device, losses.dtype)
        seen_by, seen = self._known(batch)
        known = torch.cat([seen_by * self.items + seen, rows * self.items + items])
        others = draw_others(known, rows, batch.rows, self.items)
        weights = torch.where(others < 0, 0, weights)
        losses = ranknet_losses(outputs, rows.to(device), items.to(device), others.clamp_(min=0).to(device))
        return losses @ weights.to(device, losses.dtype)

    def answers(self, outputs: np.ndarray, batch: Batch) -> tuple[np.ndarray, np.ndarray]:
        rows, items = (part.numpy() for part in self._of(batch, self._target))
        self._check(torch.from_numpy(items))
        seen_by, seen = (part.numpy() for part in self._known(batch))
        found = np.empty(batch.rows)
        for begin in range(0, batch.rows, _CHUNK):
            scores = outputs[begin : begin + _CHUNK].copy()
            gains = np.zeros(scores.shape, np.float32)
            own, wanted = (_between(one, begin, begin + _CHUNK) for one in (seen_by, rows))
            scores[seen_by[own] - begin, seen[own]] = -np.inf
            gains[rows[wanted] - begin, items[wanted]] = 1
            found[begin : begin + _CHUNK] = ndcg_at_k(scores, gains, RANKED)
        return found, np.bincount(rows, minlength=batch.rows)

    def metrics(self) -> RankingMetrics:
        return RankingMetrics(RANKED)

    def _of(self, batch: Batch, name: str) -> tuple[Tensor, Tensor]:
        """(row, item) of all ids of a bag, int64 [N] each, in the order of the rows."""
        values, offsets = batch.ids[name]
        assert offsets is not None  # `ranked` has seen to it that it is a bag
        rows = np.repeat(np.arange(batch.rows), np.diff(offsets))
        return torch.from_numpy(rows), torch.from_numpy(values)

    def _known(self, batch: Batch) -> tuple[Tensor, Tensor]:
        """Those of the history that are ranked at all."""
        rows, items = self._of(batch, self._history)
        ranked = (items >= 0) & (items < self.items)
        return rows[ranked], items[ranked]

    def _check(self, items: Tensor) -> None:
        if len(wrong := items[(items < 0) | (items >= self.items)]):
            raise DataError(
                f"column {self._target!r}: item {int(wrong[0])} lies outside [0, {self.items}): set model.items above "
                f"every item of this column, or leave such items out"
            )


def _between(rows: np.ndarray, begin: int, end: int) -> slice:
    return slice(*np.searchsorted(rows, [begin, end]))


def ranked(config: ModelConfig, schema: Schema) -> ModelConfig:
    """A ranker's section with the number of items that the data states.

    Raises:
        DataError: a column is missing or no bag, or nobody says how many items there are.
    """
    columns = {column.name: column for column in schema.categorical}
    for setting in ("history", "target"):
        name = getattr(config, setting)
        if name not in columns or not columns[name].bag:
            bags = [column.name for column in schema.categorical if column.bag]
            raise DataError(
                f"model.{setting}: {name!r} is not a bag of the data; its bags are {', '.join(bags) or 'none'}: "
                f"model {config.name} learns from lists of items (`embershard convert --histories` writes them)"
            )
    items = config.items or columns[config.target].cardinality
    if items is None:
        raise DataError(f"model.items: column {config.target!r} states no cardinality; say how many items there are")
    return config.model_copy(update={"items": items})


def objective_of(config: ModelConfig) -> Objective:
    return Ranking(config) if config.ranks else Clicks()
