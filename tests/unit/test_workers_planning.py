"""From columns and settings to features; DLRM's shapes and numbers."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from embershard.datasets.schema import CategoricalColumn, DenseColumn, Schema
from embershard.datasets.synthetic import KAGGLE
from embershard.parameter_server.tables import Optimizer
from embershard.workers.embeddings.base import EmbeddingError
from embershard.workers.embeddings.planning import (
    EmbeddingConfig,
    EmbeddingSize,
    build_method,
    feature_table,
    plan_features,
)
from embershard.workers.models.dlrm import DLRM, dot_interaction


def schema(*columns: dict[str, Any]) -> Schema:
    categorical = [CategoricalColumn(name=f"c{i}", **column) for i, column in enumerate(columns)]
    return Schema(source="test", label="label", dense=[DenseColumn(name="i1")], categorical=categorical, rows=1)


def sizes(config: EmbeddingConfig, *columns: dict[str, Any]) -> list[int]:
    features = plan_features(schema(*columns), config)
    return [table.rows for f in features for table in build_method(f, Optimizer()).tables]


def test_full_rows_with_and_without_a_cardinality() -> None:
    columns = ({"cardinality": 77}, {"distinct": 40}, {"distinct": 900_000}, {}, {"distinct": 0})
    assert sizes(EmbeddingConfig(), *columns) == [77, 80, 1_000_000, 1_000_000, 1]
    assert sizes(EmbeddingConfig(max_rows=50), *columns) == [77, 50, 50, 50, 1]


def test_hash_by_ratio_and_by_rows() -> None:
    columns = ({"cardinality": 1000}, {"distinct": 300}, {"cardinality": 3})
    assert sizes(EmbeddingConfig(method="hash", ratio=16), *columns) == [63, 38, 1]
    assert sizes(EmbeddingConfig(method="hash", rows=100), *columns) == [100, 100, 3]


def test_overrides_by_feature() -> None:
    config = EmbeddingConfig(
        method="hash", ratio=10, features={"c1": {"method": "full"}, "c2": {"ratio": 2}, "c0": {"cardinality": 60}}
    )
    assert sizes(config, {"distinct": 5}, {"cardinality": 100}, {"cardinality": 100}) == [6, 100, 50]


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ({"features": {"c00": {}}}, r"embedding\.features\.c00: .* did you mean 'c0'"),
        ({"method": "nope"}, r"unknown method 'nope'; one of full, hash"),
        ({"ratio": 4}, r"feature 'c0': method full takes no ratio; .* embedding\.method=hash"),
    ],
)
def test_settings_that_cannot_work(config: dict[str, Any], message: str) -> None:
    with pytest.raises(EmbeddingError, match=message):
        plan_features(schema({"cardinality": 5}), EmbeddingConfig(**config))


@pytest.mark.parametrize("sizes_given", [{}, {"ratio": 2, "rows": 3}])
def test_hash_needs_one_size(sizes_given: dict[str, Any]) -> None:
    feature = plan_features(schema({"cardinality": 5}), EmbeddingConfig(method="hash", **sizes_given))[0]
    with pytest.raises(EmbeddingError, match="'c0': method hash needs either"):
        build_method(feature, Optimizer())


def test_seeds_and_names_give_other_hashes_and_the_same_ones_the_same() -> None:
    keys = {
        (seed, f.name): f.key("full") for seed in (0, 1) for f in plan_features(schema({}, {}), EmbeddingConfig(), seed)
    }
    assert len(set(keys.values())) == 4
    assert keys[0, "c0"] == plan_features(schema({}), EmbeddingConfig())[0].key("full")


def test_kaggle_arithmetic_and_the_printed_table() -> None:
    columns = [{"cardinality": n} for n in KAGGLE]
    methods = [build_method(f, Optimizer()) for f in plan_features(schema(*columns), EmbeddingConfig())]
    size = EmbeddingSize.of(methods)
    assert size.parameters == 540_201_232 and size.bytes == 2_160_804_928 and size.ratio == 1
    table = feature_table(methods)
    assert table[2] == {
        "feature": "c2",
        "ids": "10131227",
        "method": "full",
        "rows": 10131227,
        "width": 16,
        "parameters": 162099632,
        "full_rows": 10131227,
        "ratio": 1.0,
    }
    estimated = build_method(plan_features(schema({"distinct": 7}), EmbeddingConfig())[0], Optimizer())
    assert feature_table([estimated])[0]["ids"] == "~7"
    assert methods[8].tables[0].initializer.scale == math.sqrt(1 / 3)


def test_dlrm_kaggle_has_the_published_number_of_parameters() -> None:
    model = DLRM(13, 26, 16, bottom=[512, 256, 64], top=[512, 256])
    assert model.bottom is not None
    assert sum(p.numel() for p in model.bottom.parameters()) == 155_984
    assert sum(p.numel() for p in model.top.parameters()) == 320_001
    assert isinstance(model.bottom[-1], torch.nn.ReLU) and isinstance(model.top[-1], torch.nn.Linear)


def test_dlrm_initial_values_have_the_published_spread_and_leave_the_global_state_alone() -> None:
    torch.manual_seed(1)
    untouched = torch.rand(1)
    torch.manual_seed(1)
    model = DLRM(13, 26, 16, bottom=[512, 256, 64], top=[512, 256], seed=2)
    assert torch.equal(torch.rand(1), untouched)
    linear = model.top[0]  # 367 -> 512
    assert linear.weight.std().item() == pytest.approx(math.sqrt(2 / (367 + 512)), rel=0.02)
    assert linear.bias.std().item() == pytest.approx(math.sqrt(1 / 512), rel=0.15)
    assert linear.weight.mean().item() == pytest.approx(0, abs=1e-3)
    again = DLRM(13, 26, 16, bottom=[512, 256, 64], top=[512, 256], seed=2)
    assert all(torch.equal(a, b) for a, b in zip(model.parameters(), again.parameters(), strict=True))


def test_interaction_and_its_gradient() -> None:
    x = torch.randn(3, 5, 4, dtype=torch.float64, requires_grad=True)
    pairs = [(i, j) for i in range(5) for j in range(i)]
    expected = torch.stack([(x[:, i] * x[:, j]).sum(1) for i, j in pairs], 1)
    torch.testing.assert_close(dot_interaction(x), expected)
    assert torch.autograd.gradcheck(dot_interaction, (x,))


def test_dlrm_without_dense_columns_and_with_an_empty_batch() -> None:
    model = DLRM(0, 4, 8, bottom=[16], top=[16])
    assert model(torch.empty(5, 0), torch.randn(5, 4, 8)).shape == (5,)
    vectors = torch.empty(0, 26, 16, requires_grad=True)
    DLRM(13, 26, 16, bottom=[8], top=[8])(torch.empty(0, 13), vectors).sum().backward()
    assert vectors.grad is not None
