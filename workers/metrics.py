"""AUC, logloss, normalized entropy and calibration in bounded memory; nDCG of ranked lists."""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import numpy as np

EXACT_SAMPLES = 4_000_000
# Beyond EXACT_SAMPLES logits are counted by their sign, exponent and 11 bits of mantissa: within 0.05 % of each other.
_BIN_BITS = 20


def logloss_sum(logits: np.ndarray, labels: np.ndarray) -> float:
    """Sum of binary cross-entropy in nats, from logits (float64 inside; never infinite for finite logits)."""
    x = logits.astype(np.float64)
    return float(np.sum(np.maximum(x, 0) - x * labels + np.log1p(np.exp(-np.abs(x)))))


def auc(scores: np.ndarray, labels: np.ndarray) -> float | None:
    """Area under the ROC curve by ranks, ties counted half; None if only one class is present."""
    if not len(scores):
        return None
    order = np.argsort(scores, kind="stable")
    ordered, positive = scores[order], labels[order] > 0.5
    starts = np.flatnonzero(np.concatenate([[True], ordered[1:] != ordered[:-1]]))
    positives, negatives = (np.add.reduceat(c.astype(np.int64), starts) for c in (positive, ~positive))
    return _auc_of_groups(positives, negatives)


def ndcg_at_k(scores: np.ndarray, gains: np.ndarray, k: int) -> np.ndarray:
    """nDCG@k of each list: scores [Q, N], gains [Q, N] (not negative) -> float64 [Q], NaN for lists without any gain.

    Gains count linearly, divided by log2(1 + rank) (Jarvelin and Kekalainen 2002); items of equal score share their
    places evenly, whatever order they stand in, as scikit-learn does.
    """
    queries, items = scores.shape
    weight = np.where(np.arange(items) < k, 1 / np.log2(np.arange(items) + 2), 0)
    order = np.argsort(-scores, axis=1, kind="stable")
    ordered = np.take_along_axis(scores, order, 1)
    found = np.take_along_axis(gains.astype(np.float64), order, 1)
    new = np.ones((queries, items), np.bool_)
    new[:, 1:] = ordered[:, 1:] != ordered[:, :-1]
    starts = np.flatnonzero(new)
    sizes = np.diff(np.append(starts, queries * items))
    tied = np.add.reduceat(found.ravel(), starts) / sizes * np.add.reduceat(np.tile(weight, queries), starts)
    reached = np.bincount(starts // items, tied, queries)
    possible = -np.sort(-gains.astype(np.float64), axis=1) @ weight
    ratio: np.ndarray = np.divide(reached, possible, out=np.full(queries, np.nan), where=possible > 0)
    return ratio


def _auc_of_groups(positives: np.ndarray, negatives: np.ndarray) -> float | None:
    """From the counts of each group of equal scores, in ascending order of the score."""
    total = float(positives.sum()) * float(negatives.sum())
    if total == 0:
        return None
    below = np.cumsum(negatives) - negatives
    return float(np.sum(positives * (below + 0.5 * negatives), dtype=np.float64) / total)


class RankingMetrics:
    """Collects nDCG@k person by person; mergeable across workers."""

    def __init__(self, k: int) -> None:
        self.k = k
        self._sum, self._people = 0.0, 0

    def update(self, found: np.ndarray, wanted: np.ndarray) -> None:
        """nDCG@k float64 [B], and how many items each should find [B]: those with none are left out."""
        self._sum += float(found[wanted > 0].sum())
        self._people += int(np.count_nonzero(wanted))

    def merge(self, others: Iterable[RankingMetrics]) -> RankingMetrics:
        """Adds what others collected; returns itself."""
        for other in others:
            self._sum += other._sum
            self._people += other._people
        return self

    def compute(self) -> dict[str, Any]:
        """{ndcg_at_K, samples}: the mean over all people with something to find (None without any), their number."""
        mean = self._sum / self._people if self._people else None
        return {f"ndcg_at_{self.k}": mean, "samples": self._people}


@dataclass
class BinaryMetrics:
    """Collects logits and labels batch by batch; mergeable across workers.

    Exact up to `exact_samples`; beyond, the AUC is taken over 2^20 bins of nearly equal logits (16 MiB), which are ties
    to it. The other numbers are exact always.
    """

    exact_samples: int = EXACT_SAMPLES

    def __post_init__(self) -> None:
        self.samples = 0
        self.positives = 0
        self._loss = 0.0
        self._predicted = 0.0
        self._kept = 0
        self._chunks: list[tuple[np.ndarray, np.ndarray]] = []
        self._bins: np.ndarray | None = None

    def update(self, logits: np.ndarray, labels: np.ndarray) -> None:
        """logits float32 [B], labels [B] of 0 and 1.

        Raises:
            ValueError: a logit is NaN.
        """
        if np.isnan(logits).any():
            raise ValueError("evaluation: the model answered NaN; its weights or the dense columns hold such values")
        self.samples += len(logits)
        self.positives += int(np.count_nonzero(labels > 0.5))
        self._loss += logloss_sum(logits, labels)
        self._predicted += float(np.sum(0.5 + 0.5 * np.tanh(0.5 * logits.astype(np.float64))))
        self._add(logits.astype(np.float32), labels > 0.5)

    def merge(self, others: Iterable[BinaryMetrics]) -> BinaryMetrics:
        """Adds what others collected; returns itself."""
        for other in others:
            self.samples += other.samples
            self.positives += other.positives
            self._loss += other._loss
            self._predicted += other._predicted
            if other._bins is not None:
                self._fold()
                assert self._bins is not None
                self._bins += other._bins
            for logits, labels in other._chunks:
                self._add(logits, labels)
        return self

    def compute(self) -> dict[str, Any]:
        """{auc, logloss, normalized_entropy, calibration, samples}; a number that the labels do not define is None.

        normalized_entropy: logloss / entropy of the average label, below 1 if the model beats it; calibration: sum of
        the predictions / positives (both He et al. 2014).
        """
        if not self.samples:
            return {"auc": None, "logloss": None, "normalized_entropy": None, "calibration": None, "samples": 0}
        loss = self._loss / self.samples
        rate = self.positives / self.samples
        entropy = -(rate * math.log(rate) + (1 - rate) * math.log(1 - rate)) if 0 < rate < 1 else None
        return {
            "auc": self._auc(),
            "logloss": loss,
            "normalized_entropy": None if entropy is None else loss / entropy,
            "calibration": self._predicted / self.positives if self.positives else None,
            "samples": self.samples,
        }

    def _auc(self) -> float | None:
        if self._bins is not None:
            return _auc_of_groups(self._bins[1], self._bins[0])
        return auc(*(np.concatenate(column) for column in zip(*self._chunks, strict=True)))

    def _add(self, logits: np.ndarray, labels: np.ndarray) -> None:
        if self._bins is not None:
            self._count(logits, labels)
            return
        self._chunks.append((logits, labels))
        self._kept += len(logits)
        if self._kept > self.exact_samples:
            self._fold()

    def _fold(self) -> None:
        if self._bins is None:
            self._bins = np.zeros((2, 1 << _BIN_BITS), np.int64)
            chunks, self._chunks = self._chunks, []
            for logits, labels in chunks:
                self._count(logits, labels)

    def _count(self, logits: np.ndarray, labels: np.ndarray) -> None:
        assert self._bins is not None
        # -0.0 + 0.0 is 0.0. Flipping negative numbers whole, and the sign of positive ones, puts all in order.
        word = np.ascontiguousarray(logits + np.float32(0)).view(np.uint32)
        ordered = np.where(word >> 31, ~word, word | np.uint32(1 << 31)) >> np.uint32(32 - _BIN_BITS)
        for label in (0, 1):
            self._bins[label] += np.bincount(ordered[labels == label], minlength=1 << _BIN_BITS)
