"""Where tables live: as asked, or by their bytes, with a line that says why."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from embershard.datasets.schema import DataConfig, DataError
from embershard.datasets.synthetic import generate
from embershard.parameter_server.checkpoint import read_dense, read_manifest
from embershard.parameter_server.store import Store
from embershard.workers import placement
from embershard.workers.embeddings.planning import EmbeddingConfig
from embershard.workers.job import CheckpointConfig, TrainConfig, TrainingJob
from embershard.workers.models.build import ModelConfig
from embershard.workers.placement import choose_placement
from embershard.workers.replicated import ReplicatedStore
from embershard.workers.trainer import train


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> str:
    folder = str(tmp_path_factory.mktemp("data"))
    generate(folder, rows=640, seed=1, cardinalities=(7, 50, 400), dense=3)
    return folder


def job(data: str | None, max_steps: int | None = None, **embedding: Any) -> TrainingJob:
    return TrainingJob(
        data=DataConfig(path=data, batch_size=64),
        model=ModelConfig(bottom=[8], top=[8]),
        embedding=EmbeddingConfig(dim=4, **embedding),
        train=TrainConfig(consistency="sync", max_steps=max_steps),
        checkpoint=CheckpointConfig(),
        seed=4,
    )


def test_auto_goes_by_bytes_and_says_so(data: str, monkeypatch: pytest.MonkeyPatch) -> None:
    for asked in ("sharded", "replicated"):
        assert choose_placement(job(None, placement=asked)) == (
            asked,
            f"placement {asked}: as embedding.placement says",
        )
    with pytest.raises(DataError, match=r"data.path: nothing to train on"):
        choose_placement(job(None, placement="auto"))
    # Row-wise Adagrad: 4 floats and one of state per row; a table that all features share counts once.
    rows = 11_000
    auto = job(data, placement="auto", method="mem_rec", token_rows=rows, weight_hashes=0)
    assert choose_placement(auto) == (
        "replicated",
        "placement replicated: tables and optimizer state take 0.2 MB, no more than the 268.4 MB that every worker "
        "would hold",
    )
    monkeypatch.setattr(placement, "REPLICATED_BYTES", 4 * 5 * rows)
    assert choose_placement(auto)[0] == "replicated"
    monkeypatch.setattr(placement, "REPLICATED_BYTES", 4 * 5 * rows - 1)
    chosen, reason = choose_placement(auto)
    assert chosen == "sharded" and "take 0.2 MB, more than" in reason


def test_a_run_with_its_tables_inside_trains_the_same_and_goes_on_over_shards(data: str, tmp_path: Path) -> None:
    def run(store: Store, folder: str, generation: int, **more: Any) -> dict[str, Any]:
        with store:
            return train(job(data, **more), store, generation=generation, directory=str(tmp_path / folder))

    whole = run(Store.open(shards=3, blocks=80, seed=4), "whole", 1)
    first = run(ReplicatedStore(blocks=80, seed=4), "parts", 1, max_steps=5, placement="replicated")
    assert first["steps"] == 5 and first["placement"] == "replicated"
    rest = run(Store.open(shards=2, blocks=80, seed=4), "parts", 2)
    assert rest["steps"] == whole["steps"] == 10
    # The dense part has seen every vector of every step.
    dense, expected = (read_dense(at, read_manifest(at)) for at in (rest["checkpoint"], whole["checkpoint"]))
    assert all(np.array_equal(dense[name], expected[name]) for name in expected)
