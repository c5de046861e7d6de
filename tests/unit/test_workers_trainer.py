"""`train` from the first step to the last: resume, stop, evaluation, checkpoints, init_from."""

from __future__ import annotations

import itertools
import json
from pathlib import Path
from typing import Any

import fsspec
import numpy as np
import pytest
from embershard.datasets import remote
from embershard.datasets.files import load_schema
from embershard.datasets.schema import DataConfig, DataError
from embershard.datasets.synthetic import generate
from embershard.parameter_server.checkpoint import read_dense, read_manifest
from embershard.parameter_server.store import Store
from embershard.workers import trainer
from embershard.workers.embeddings.base import EmbeddingError
from embershard.workers.embeddings.planning import EmbeddingConfig
from embershard.workers.evaluate import evaluate
from embershard.workers.job import CheckpointConfig, TrainConfig, TrainingJob
from embershard.workers.models.build import ModelConfig
from embershard.workers.trainer import train

ROWS, BATCH = 2000, 64
STEPS = -(-ROWS // BATCH)


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("data")
    for name, rows, seed in (("train", ROWS, 1), ("eval", 500, 2)):
        generate(str(folder / name), rows=rows, seed=seed, cardinalities=(7, 50, 400), dense=3)
    return folder


def job(data: Path, **sections: Any) -> TrainingJob:
    embedding = {"dim": 4} | sections.pop("embedding", {})
    return TrainingJob(
        data=DataConfig(path=str(data / "train"), eval_path=str(data / "eval"), batch_size=BATCH, window_bytes=1 << 14),
        model=ModelConfig(bottom=[8], top=[8]),
        embedding=EmbeddingConfig(**embedding),
        train=TrainConfig(**({"log_every": 10} | sections.pop("train", {}))),
        checkpoint=CheckpointConfig(**sections.pop("checkpoint", {})),
        seed=4,
        **sections,
    )


def run(job: TrainingJob, folder: Path, *, shards: int = 2, generation: int = 1, stop_after: int | None = None) -> Any:
    records: list[dict[str, Any]] = []
    asked = iter(range(1, 10_000))
    with Store.open(shards=shards, blocks=80, seed=job.seed) as store:
        summary = train(
            job,
            store,
            generation=generation,
            directory=str(folder),
            report=records.append,
            stop_requested=lambda: stop_after is not None and next(asked) >= stop_after,
        )
    return summary, records


def everything(checkpoint: str) -> dict[str, bytes]:
    """Tables, optimizer state, dense part and cursor, as bytes; whatever the number of shards that wrote them."""
    manifest = read_manifest(checkpoint)
    found = {name: value.tobytes() for name, value in read_dense(checkpoint, manifest).items()}
    with Store.open(shards=1, blocks=manifest.blocks, seed=manifest.seed) as store:
        store.create_tables(manifest.tables)
        store.load(checkpoint)
        shard = store.members[0]
        snapshot = shard.mark()
        for block in range(manifest.blocks):
            for name, value in snapshot.take(block).items():
                if not name.startswith("ledger"):
                    found[f"{block}/{name}"] = np.asarray(value).tobytes()
    state = {key: value for key, value in manifest.state.items() if key != "train_loss"}
    return found | {"state": json.dumps(state, sort_keys=True).encode(), "step": str(manifest.step).encode()}


def test_summary_records_and_checkpoint(data: Path, tmp_path: Path) -> None:
    summary, records = run(job(data, train={"eval_every": 20}), tmp_path)
    assert summary["steps"] == STEPS and summary["samples"] == ROWS and not summary["stopped"]
    assert summary["eval"]["samples"] == 500 and 0 < summary["eval"]["auc"] < 1
    assert summary["rows_pulled"] > 0 and summary["rows_pushed"] > 0
    assert summary["embedding_bytes"] == 4 * summary["embedding_parameters"] == summary["full_embedding_bytes"]
    assert summary["method"] == "full" and summary["placement"] == "sharded"
    steps = [record["step"] for record in records if "loss" in record]
    assert steps == [10, 20, 30, STEPS]
    assert [record["step"] for record in records if "auc" in record] == [20, STEPS]
    assert all(record["steps_total"] == STEPS for record in records if "step" in record)
    result = evaluate(summary["checkpoint"], str(data / "eval"))
    assert {key: result[key] for key in summary["eval"]} == pytest.approx(summary["eval"], rel=1e-6)
    json.dumps(summary)


@pytest.mark.parametrize("consistency", ["sync", "bounded"])
def test_resume_is_bit_identical(data: Path, tmp_path: Path, consistency: str) -> None:
    train_section = {"consistency": consistency, "epochs": 2}
    whole = job(data, train=train_section, checkpoint={"every": 20, "keep": 9})
    straight, _ = run(whole, tmp_path / "straight")
    # As if killed after step 40: its checkpoint is the newest, in the second epoch.
    (tmp_path / "killed").mkdir()
    for step in (20, 40):
        (tmp_path / "killed" / f"step-{step:09d}").symlink_to(tmp_path / "straight" / f"step-{step:09d}")
    resumed, records = run(whole, tmp_path / "killed", shards=3, generation=2)
    assert any("going on from" in record.get("note", "") for record in records)
    assert resumed["steps"] == straight["steps"] == 2 * STEPS and resumed["samples"] == 2 * ROWS
    expected, found = everything(straight["checkpoint"]), everything(resumed["checkpoint"])
    assert [name for name in expected if expected[name] != found.get(name)] == []
    assert resumed["eval"] == straight["eval"]


def test_stop_at_a_step_boundary_then_resume_trains_every_row_once(data: Path, tmp_path: Path) -> None:
    stopped, _ = run(job(data), tmp_path, stop_after=7)
    assert stopped["stopped"] and stopped["steps"] == 8 and stopped["eval"] is None  # 7, and the one asked for ahead
    assert read_manifest(stopped["checkpoint"]).step == 8
    summary, _ = run(job(data), tmp_path, generation=2)
    assert summary["steps"] == STEPS and summary["samples"] == ROWS and not summary["stopped"]


def test_resume_of_a_finished_run_trains_nothing(data: Path, tmp_path: Path) -> None:
    first, _ = run(job(data), tmp_path)
    again, _ = run(job(data), tmp_path, generation=2)
    assert again["steps"] == STEPS and again["eval"] == first["eval"] and again["checkpoint"] == first["checkpoint"]
    assert again["train_loss"] == pytest.approx(first["train_loss"])


def test_only_the_newest_checkpoints_stay(data: Path, tmp_path: Path) -> None:
    run(job(data, checkpoint={"every": 5, "keep": 2}), tmp_path)
    assert sorted(path.name for path in tmp_path.glob("step-*")) == ["step-000000030", f"step-{STEPS:09d}"]


def test_a_damaged_checkpoint_is_skipped_and_said_so(data: Path, tmp_path: Path) -> None:
    run(job(data, checkpoint={"every": 20}), tmp_path)
    block = next((tmp_path / f"step-{STEPS:09d}" / "blocks").iterdir())
    block.write_bytes(block.read_bytes()[:-1] + b"\x00\x01")
    summary, records = run(job(data, checkpoint={"every": 20}), tmp_path, generation=2)
    notes = [record["note"] for record in records if "note" in record]
    assert notes[0].startswith("skipped:") and block.name in notes[0]
    assert notes[1].endswith("step-000000020") and summary["steps"] == STEPS


def test_init_from_lists_what_fits(data: Path, tmp_path: Path) -> None:
    run(job(data), tmp_path / "first")
    source = tmp_path / "first" / f"step-{STEPS:09d}"
    other = {"features": {"c2": {"method": "hash", "rows": 5}, "c3": {"method": "hash", "rows": 9}}}
    run(job(data, embedding=other), tmp_path / "hashed")
    _, records = run(job(data, embedding=other, train={"init_from": str(source), "max_steps": 1}), tmp_path / "second")
    note = next(record["note"] for record in records if "init_from" in record.get("note", ""))
    assert "1 tables loaded" in note
    assert "new here: c2.hashed, c3.hashed" in note and "dropped: c2.full, c3.full" in note
    smaller = {"features": {"c2": {"method": "hash", "rows": 4}, "c3": {"method": "hash", "rows": 9}}}
    hashed = str(tmp_path / "hashed" / f"step-{STEPS:09d}")
    _, records = run(job(data, embedding=smaller, train={"init_from": hashed, "max_steps": 1}), tmp_path / "third")
    assert "of another shape: c2.hashed (5 x 4 there, 4 x 4 here)" in records[0]["note"]


def test_predictions_stand_in_the_order_of_the_data(data: Path, tmp_path: Path) -> None:
    import pyarrow.parquet as pq

    summary, _ = run(job(data, train={"max_steps": 3}), tmp_path)
    evaluate(summary["checkpoint"], str(data / "eval"), batch_size=99, predictions=str(tmp_path / "scores.parquet"))
    scores = pq.read_table(tmp_path / "scores.parquet").to_pydict()
    labels = pq.read_table(data / "eval", columns=["label"])["label"].to_pylist()
    assert scores["label"] == labels
    assert all(0 < p < 1 for p in scores["prediction"])


def test_no_data_path_and_unequal_widths_are_errors(data: Path, tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"data\.path"):
        run(TrainingJob(data=DataConfig()), tmp_path)
    with pytest.raises(EmbeddingError, match="'c2': dim 8 beside 4"):
        run(job(data, embedding={"features": {"c2": {"dim": 8}}}), tmp_path)


@pytest.mark.filterwarnings("ignore:.* row group")
def test_row_groups_beyond_what_may_be_read_ahead_are_noted(data: Path, tmp_path: Path) -> None:
    asked = job(data)
    asked.data.read_ahead_bytes = 40_000
    _, records = run(asked, tmp_path, stop_after=1)
    notes = [record["note"] for record in records if "read_ahead_bytes" in record.get("note", "")]
    assert len(notes) == 1 and "train/part-00000.parquet: row group 0 has" in notes[0]


def test_repeated_requests_for_data_stand_in_records_and_summary(
    data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Also those from before the first step."""
    url = f"memory://{tmp_path.name}"
    fsspec.filesystem("memory").put(str(data), f"/{tmp_path.name}", recursive=True)
    monkeypatch.setattr(remote, "_FIRST_WAIT", 0.0)
    read, calls = remote.RangeReader._range, itertools.count(1)

    def flaky(self: remote.RangeReader, begin: int, end: int) -> bytes:
        if next(calls) % 2:
            raise ConnectionError("lost")
        return read(self, begin, end)

    asked = job(data)
    schema, asked.data.path, asked.data.eval_path = load_schema(f"{url}/train"), f"{url}/train", None
    monkeypatch.setattr(trainer, "load_schema", lambda *_: schema)
    before = remote.RETRIES.count
    monkeypatch.setattr(remote.RangeReader, "_range", flaky)
    summary, records = run(asked, tmp_path)
    retried = remote.RETRIES.count - before
    assert retried >= 2
    assert summary["data_retries"] == retried
    assert sum(record.get("data_retries", 0) for record in records) == retried
    assert summary["stall_seconds"] > 0


def test_the_best_checkpoint_stays_too(data: Path, tmp_path: Path) -> None:
    """Of the steps that were saved and evaluated the one with the highest AUC; said in the summary."""
    train = {"eval_every": 5, "max_steps": 30}
    # A rate that makes the model worse as it goes on: the best is not the newest.
    worse = {"sparse": {"learning_rate": 3.0}, "dense": {"learning_rate": 1.0}}
    settings = {"train": train, "checkpoint": {"every": 5, "keep": 1}, "optimizer": worse}
    summary, records = run(job(data, **settings), tmp_path)
    aucs = {record["step"]: record["auc"] for record in records if "auc" in record}
    best = max(aucs, key=lambda step: (aucs[step], -step))
    assert best != 30
    assert Path(summary["best_checkpoint"]).name == f"step-{best:09d}"
    assert sorted(path.name for path in tmp_path.glob("step-*")) == [f"step-{best:09d}", "step-000000030"]
