"""QR's feature generation: every partition's vector is a feature of its own."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from embershard.cluster.config import RunConfig
from embershard.datasets.schema import CategoricalColumn, Schema
from embershard.datasets.synthetic import generate
from embershard.parameter_server.store import Store
from embershard.parameter_server.tables import Optimizer
from embershard.workers.embeddings.base import EmbeddingError, Feature
from embershard.workers.embeddings.collection import EmbeddingBagCollection
from embershard.workers.embeddings.layers import initial_rows
from embershard.workers.embeddings.planning import (
    EmbeddingConfig,
    EmbeddingSize,
    build_method,
    feature_table,
    plan_features,
)
from embershard.workers.evaluate import evaluate
from embershard.workers.export import export
from embershard.workers.export_files import ExportError
from embershard.workers.trainer import train


def generate_plan(cardinality: int | None, **options: Any) -> list[Feature]:
    columns = [
        CategoricalColumn(name="a", cardinality=cardinality, distinct=150),
        CategoricalColumn(name="b", cardinality=5),
    ]
    schema = Schema(source="test", label="label", dense=[], categorical=columns, rows=1)
    return plan_features(schema, EmbeddingConfig(method="qr", dim=4, operation="generate", threshold=9, **options))


@pytest.mark.parametrize("cardinality", [300, None])
def test_feature_generation_gives_each_partition_a_vector_of_its_own(cardinality: int | None) -> None:
    features = generate_plan(cardinality, rows=4)
    assert [(f.name, f.column, f.part) for f in features] == [("a.0", "a", 0), ("a.1", "a", 1), ("b", None, None)]
    ids = np.array([0, 7, 299, 7])
    with Store.open(shards=2, blocks=40, seed=1) as store:
        embeddings = EmbeddingBagCollection(features, store=store)
        tables = {table.name: table for method in embeddings.methods for table in method.tables}
        sizes = {name: table.rows for name, table in tables.items()}
        assert sizes == {"a.partition0": 4, "a.partition1": 75, "b.full": 5}
        vectors = embeddings({"b": ids % 5, "a": ids})
        assert vectors.shape == (4, 3, 4) and torch.equal(vectors[1], vectors[3])
        if cardinality:
            rows = {name: initial_rows(table, 1) for name, table in tables.items()}
            np.testing.assert_array_equal(vectors[:, 0].detach(), rows["a.partition0"][ids % 4])
            np.testing.assert_array_equal(vectors[:, 1].detach(), rows["a.partition1"][ids // 4])
            assert np.abs(rows["a.partition1"]).max() == pytest.approx(1 / 75**0.5, rel=0.05)
        vectors.square().sum().backward()
        embeddings.step(0.1)
        assert not torch.equal(embeddings({"b": ids % 5, "a": ids}), vectors)
        size = embeddings.size
    assert (size.parameters, size.full_parameters) == (4 * (4 + 75 + 5), 4 * (300 + 5))
    records = feature_table([build_method(f, Optimizer()) for f in features])
    assert [record["full_rows"] for record in records] == [300, 0, 5, 305]


def test_feature_generation_within_bytes_counts_every_partition() -> None:
    features = generate_plan(3000, bytes=4 * 4 * 800)
    methods = [build_method(f, Optimizer()) for f in features]
    assert len(features) == 3 and 700 < EmbeddingSize.of(methods).parameters / 4 <= 800


def test_feature_generation_is_trained_but_not_exported(tmp_path: Path) -> None:
    generate(str(tmp_path / "log"), rows=300, cardinalities=(400, 9), dense=2)
    settings = ("embedding.method=qr", "embedding.rows=5", "embedding.operation=generate", "model.top=[8]")
    config = RunConfig.load(None, f"data.path={tmp_path / 'log'}", f"data.eval_path={tmp_path / 'log'}", *settings)
    with Store.open(blocks=20) as store:
        summary = train(config.job(), store, directory=str(tmp_path / "run"))
    assert evaluate(summary["checkpoint"], str(tmp_path / "log"))["auc"] == pytest.approx(summary["eval"]["auc"])
    with pytest.raises(ExportError, match="column 'c1' has one per partition"):
        export(summary["checkpoint"], str(tmp_path / "m.safetensors"))


def test_generated_features_need_a_plan() -> None:
    whole = Feature(name="a", method="qr", cardinality=300, dim=4, rows=4, operation="generate")
    with pytest.raises(EmbeddingError, match="operation generate gives 2 vectors"):
        build_method(whole, Optimizer()).compose([torch.ones(1, 4)] * 2)
    with pytest.raises(EmbeddingError, match="operation=generate is for method qr"):
        build_method(whole.model_copy(update={"method": "double_hash"}), Optimizer())
