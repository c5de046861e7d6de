"""Metrics against scikit-learn, the schedule against its formulas."""

from __future__ import annotations

import math

import numpy as np
import pytest
from embershard.workers.metrics import BinaryMetrics, ndcg_at_k
from embershard.workers.schedule import ScheduleConfig, factor
from hypothesis import given, settings
from hypothesis import strategies as st
from sklearn.metrics import log_loss, ndcg_score, roc_auc_score


def sample(n: int, seed: int = 0) -> tuple[np.ndarray, np.ndarray]:
    rng = np.random.default_rng(seed)
    logits = np.round(rng.standard_normal(n) * 2, 1).astype(np.float32)  # rounded: ties
    return logits, (rng.random(n) < 1 / (1 + np.exp(-0.7 * logits))).astype(np.float32)


def collect(logits: np.ndarray, labels: np.ndarray, pieces: int, **options: int) -> BinaryMetrics:
    metrics = BinaryMetrics(**options)
    for part in np.array_split(np.arange(len(logits)), pieces):
        metrics.update(logits[part], labels[part])
    return metrics


@settings(max_examples=25, deadline=None)
@given(st.integers(20, 500), st.integers(1, 5), st.integers(0, 1000))
def test_agrees_with_scikit_learn(n: int, pieces: int, seed: int) -> None:
    logits, labels = sample(n, seed)
    labels[:2] = 0, 1
    result = collect(logits, labels, pieces).compute()
    probabilities = 1 / (1 + np.exp(-logits.astype(np.float64)))
    assert result["auc"] == pytest.approx(roc_auc_score(labels, logits), abs=1e-12)
    assert result["logloss"] == pytest.approx(log_loss(labels, probabilities), rel=1e-9)
    rate = labels.mean(dtype=np.float64)
    entropy = log_loss(labels, np.full(n, rate))
    assert result["normalized_entropy"] == pytest.approx(result["logloss"] / entropy, rel=1e-9)
    assert result["calibration"] == pytest.approx(probabilities.mean() / rate, rel=1e-9)
    assert result["samples"] == n


def test_bounded_memory_stays_within_a_hair_of_exact_and_merges() -> None:
    rng = np.random.default_rng(3)
    logits = rng.standard_normal(50_000).astype(np.float32) * 3
    labels = (rng.random(50_000) < 1 / (1 + np.exp(-logits))).astype(np.float32)
    exact = collect(logits, labels, 7).compute()
    binned = collect(logits, labels, 7, exact_samples=1000)
    assert binned._chunks == []
    assert binned.compute()["auc"] == pytest.approx(exact["auc"], abs=2e-5)
    halves = [
        collect(logits[part], labels[part], 2, exact_samples=limit)
        for part, limit in zip(np.array_split(np.arange(50_000), 3), (100, 10**6, 10**6), strict=True)
    ]
    merged = BinaryMetrics().merge(halves).compute()
    assert merged["auc"] == pytest.approx(exact["auc"], abs=2e-5)
    assert merged["logloss"] == pytest.approx(exact["logloss"], rel=1e-12)
    assert merged["calibration"] == pytest.approx(exact["calibration"], rel=1e-12)
    assert merged["samples"] == 50_000


def test_extreme_logits_and_one_class() -> None:
    metrics = collect(np.array([-200.0, 200.0, -0.0, 0.0], np.float32), np.array([0, 1, 0, 1], np.float32), 1)
    assert metrics.compute()["auc"] == 0.875 and math.isfinite(metrics.compute()["logloss"])
    only = collect(np.array([1.0, 2.0], np.float32), np.ones(2, np.float32), 1).compute()
    assert only["auc"] is None and only["normalized_entropy"] is None and only["logloss"] > 0
    nothing = {"auc": None, "logloss": None, "normalized_entropy": None, "calibration": None, "samples": 0}
    assert BinaryMetrics().compute() == nothing
    assert collect(np.array([1.0], np.float32), np.zeros(1, np.float32), 1).compute()["calibration"] is None


def test_nan_is_an_error() -> None:
    with pytest.raises(ValueError, match="NaN"):
        BinaryMetrics().update(np.array([np.nan], np.float32), np.ones(1))


@settings(max_examples=25, deadline=None)
@given(st.integers(1, 6), st.integers(2, 30), st.integers(1, 40), st.booleans(), st.integers(0, 1000))
def test_ndcg_agrees_with_scikit_learn(queries: int, items: int, k: int, ties: bool, seed: int) -> None:
    rng = np.random.default_rng(seed)
    scores = rng.standard_normal((queries, items))
    scores = np.round(scores) if ties else scores
    gains = rng.integers(0, 4, (queries, items))
    gains[:, 0] += 1
    expected = [ndcg_score(gains[q : q + 1], scores[q : q + 1], k=k) for q in range(queries)]
    np.testing.assert_allclose(ndcg_at_k(scores, gains, k), expected, rtol=1e-12, atol=1e-15)


def test_ndcg_of_a_list_without_gain_is_not_a_number() -> None:
    found = ndcg_at_k(np.array([[2.0, 1.0], [2.0, 1.0]]), np.array([[0, 0], [0, 1]]), 1)
    assert np.isnan(found[0]) and found[1] == 0


@pytest.mark.parametrize(
    ("config", "expected"),
    [
        ({}, {1: 1, 50: 1, 100: 1}),
        ({"warmup_steps": 10}, {1: 0.1, 5: 0.5, 10: 1, 100: 1}),
        ({"kind": "linear", "warmup_steps": 20}, {10: 0.5, 20: 1, 60: 0.5, 100: 0}),
        ({"kind": "linear", "final_factor": 0.2}, {50: 0.6, 100: 0.2, 200: 0.2}),
        ({"kind": "polynomial", "decay_start": 50, "decay_steps": 20}, {50: 1, 60: 0.25, 70: 0, 99: 0}),
        ({"kind": "cosine"}, {50: 0.5, 25: (1 + math.cos(math.pi / 4)) / 2, 100: 0}),
    ],
)
def test_schedule(config: dict, expected: dict[int, float]) -> None:
    for step, value in expected.items():
        assert factor(ScheduleConfig(**config), step, 100) == pytest.approx(value, abs=1e-12)
