"""What `embershard plan` says before a run, beside what the run then holds, reads and writes."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from embershard.datasets.schema import DataConfig
from embershard.datasets.synthetic import generate
from embershard.parameter_server.store import Store
from embershard.workers.embeddings.planning import EmbeddingConfig
from embershard.workers.forecast import BATCHES, forecast
from embershard.workers.job import TrainConfig, TrainingJob
from embershard.workers.models.build import ModelConfig
from embershard.workers.trainer import train

SHARDS, BLOCKS, ROWS, BATCH = 3, 40, 2000, 64


@pytest.fixture(scope="module")
def log(tmp_path_factory: pytest.TempPathFactory) -> str:
    path = str(tmp_path_factory.mktemp("data") / "log")
    generate(path, rows=ROWS, seed=1, cardinalities=(7, 50, 400), dense=3)
    return path


def job(log: str, **embedding: Any) -> TrainingJob:
    return TrainingJob(
        data=DataConfig(path=log, batch_size=BATCH),
        model=ModelConfig(bottom=[8], top=[8]),
        embedding=EmbeddingConfig(dim=4, **embedding),
        train=TrainConfig(max_steps=BATCHES),
    )


@pytest.mark.parametrize("embedding", [{}, {"method": "memcom", "rows": 6}], ids=["full", "memcom"])
def test_it_is_what_the_run_then_needs(log: str, embedding: dict[str, Any], tmp_path: Path) -> None:
    asked = job(log, **embedding)
    found = forecast(asked, blocks=BLOCKS, shards=SHARDS, workers=1)
    with Store.open(shards=SHARDS, blocks=BLOCKS, seed=asked.seed) as store:
        summary = train(asked, store, directory=str(tmp_path))
        held = store.statistics()
        pulled = store.counters.rows_pulled
    for key in ("embedding_parameters", "embedding_bytes", "full_embedding_bytes", "compression_ratio", "method"):
        assert found[key] == summary[key]
    assert found["steps"] == summary["steps"] == BATCHES
    shard, worker = found["shard"], found["worker"]
    for name in ("table_bytes", "state_bytes"):
        assert shard[name] == max(statistics[name] for statistics in held)
        assert worker[name] == 0
    assert worker["samples_per_step"] == BATCH
    assert worker["rows_per_step"] * BATCHES == pytest.approx(pulled)
    assert shard["rows_per_step"] == pytest.approx(worker["rows_per_step"] / SHARDS * shard["busiest_over_mean"])
    files = [path for path in Path(summary["checkpoint"]).rglob("*") if path.suffix == ".safetensors"]
    headers = 12_000  # a safetensors file begins with the names and shapes of what is in it
    assert (
        found["checkpoint_bytes"]
        < sum(f.stat().st_size for f in files)
        < found["checkpoint_bytes"] + headers * len(files)
    )
    assert found["seconds"] > 0 and shard["ms_per_step"] > 0


def test_more_workers_have_less_to_do_each(log: str) -> None:
    """The batch is divided, and every shard answers all of them."""
    one, four = (forecast(job(log), blocks=BLOCKS, shards=SHARDS, workers=n) for n in (1, 4))
    assert four["worker"]["samples_per_step"] == BATCH / 4
    assert four["worker"]["rows_per_step"] < one["worker"]["rows_per_step"] < 4 * four["worker"]["rows_per_step"]
    total = four["worker"]["wire_bytes_per_step"] * 4
    mean = total / SHARDS
    assert four["shard"]["wire_bytes_per_step"] == pytest.approx(mean * four["shard"]["busiest_over_mean"])
    assert four["shard"]["table_bytes"] == one["shard"]["table_bytes"]


def test_replicated_tables_are_with_the_workers(log: str) -> None:
    """Nothing crosses to a shard; each worker's gradients go to every other one."""
    asked = job(log, placement="replicated")
    alone, three = (forecast(asked, blocks=BLOCKS, shards=SHARDS, workers=n) for n in (1, 3))
    assert three["shard"]["table_bytes"] == three["shard"]["wire_bytes_per_step"] == 0
    assert three["shard"]["ms_per_step"] == 0 < three["worker"]["ms_per_step"]
    assert three["worker"]["table_bytes"] >= three["embedding_bytes"] == 16 * 457
    assert alone["worker"]["wire_bytes_per_step"] == 0
    assert three["worker"]["wire_bytes_per_step"] == pytest.approx(2 * 20 * three["worker"]["rows_per_step"])
