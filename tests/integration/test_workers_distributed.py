"""Two workers in two processes: DistributedDataParallel between them, shards over gRPC beneath."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from embershard.datasets.schema import DataConfig
from embershard.datasets.synthetic import generate
from embershard.parameter_server.blocks import BlockMap
from embershard.parameter_server.checkpoint import read_manifest
from embershard.parameter_server.requests import Clock
from embershard.parameter_server.server import ShardServer
from embershard.parameter_server.shard import Shard
from embershard.parameter_server.store import Store
from embershard.parameter_server.tables import Layout
from embershard.workers.embeddings.planning import EmbeddingConfig
from embershard.workers.job import CheckpointConfig, TrainConfig, TrainingJob
from embershard.workers.learner import Learner
from embershard.workers.models.build import ModelConfig
from embershard.workers.network import dense_tensors
from embershard.workers.optimizers import DenseConfig, OptimizerConfig, SparseConfig
from embershard.workers.trainer import train

sys.path.insert(0, str(Path(__file__).parents[1] / "oracles"))
from workers_cases import batches, network, tables

BLOCKS, STEPS, BATCH_ROWS = 40, 10, 24
ROWS, BATCH = 3000, 64


@contextmanager
def shards(count: int) -> Iterator[list[str]]:
    servers = [ShardServer(Shard(i, Layout(BLOCKS, 5))) for i in range(count)]
    addresses = [server.start() for server in servers]
    for server in servers:
        server.shard.set_block_map(BlockMap.initial(BLOCKS, tuple(addresses)))
    try:
        yield addresses
    finally:
        for server in servers:
            server.stop()


def run_workers(folder: Path, parts: list[dict[str, Any]], workers: int = 2) -> None:
    task = folder / "task.json"
    task.write_text(json.dumps({"workers": workers, "rendezvous": str(folder / "rendezvous"), "parts": parts}))
    script = str(Path(__file__).parent / "workers_process.py")
    processes = [
        subprocess.Popen([sys.executable, script, str(task), str(rank)], stderr=subprocess.PIPE, text=True)
        for rank in range(workers)
    ]
    errors = [process.communicate(timeout=200)[1] for process in processes]
    assert [process.returncode for process in processes] == [0] * workers, errors


def explicit_alone(kind: str, config: OptimizerConfig, embedding: dict[str, Any]) -> dict[str, np.ndarray]:
    with Store.open(shards=1, blocks=BLOCKS, seed=5) as store:
        net = network(store, sparse=kind, **embedding)
        store.begin(1, 1, 0)
        learner = Learner(net, config, total_steps=STEPS)
        for step, batch in enumerate(batches(STEPS, BATCH_ROWS), 1):
            clock = Clock(1, step, sync=True)
            learner.step(batch, net.embeddings.prefetch(batch.ids, clock), clock)
        net.embeddings.drain()
        found = {f"table {i}": table for i, table in enumerate(tables(net.embeddings))}
        return found | dense_tensors(net, learner.optimizer)


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("data")
    # Two files, so that each of two workers has rows of its own.
    for i, (name, rows) in enumerate((("train/a", ROWS // 2), ("train/b", ROWS // 2), ("eval", 700))):
        generate(str(folder / name), rows=rows, seed=i, cardinalities=(7, 50, 400), dense=3)
    return folder


def job(data: Path, **sections: Any) -> TrainingJob:
    return TrainingJob(
        data=DataConfig(path=str(data / "train"), eval_path=str(data / "eval"), batch_size=BATCH, window_bytes=1 << 13),
        model=ModelConfig(bottom=[8], top=[8]),
        embedding=EmbeddingConfig(dim=4),
        checkpoint=CheckpointConfig(every=20),
        seed=5,
        **sections,
    )


def test_two_workers(data: Path, tmp_path: Path) -> None:
    """One start of two processes for all of: equal to one worker on explicit batches; train, stop, resume.

    Resumed once with the tables in both workers, and once more with shards.
    """
    mlet = {"method": "mlet", "inner_dim": 8}
    configs = {
        kind: OptimizerConfig(
            sparse=SparseConfig(kind=kind, learning_rate=0.1), dense=DenseConfig(kind="adagrad", learning_rate=0.1)
        )
        for kind in ("sgd", "rowwise_adagrad")
    }
    whole = {"kind": "whole", "directory": str(tmp_path / "checkpoints"), "job": job(data).model_dump(mode="json")}
    with shards(2) as a, shards(3) as b, shards(2) as c, shards(3) as d, shards(2) as e, shards(2) as f:
        cases: dict[str, tuple[str, dict[str, Any], dict[str, Any]]] = {
            "sgd": ("sgd", {}, {"addresses": a}),
            "rowwise_adagrad": ("rowwise_adagrad", {}, {"addresses": b}),
            "mlet": ("rowwise_adagrad", mlet, {"addresses": f}),
            "replicated": ("rowwise_adagrad", {}, {}),
        }
        explicit = [
            {
                "kind": "explicit",
                "sparse": kind,
                "embedding": embedding,
                "optimizer": configs[kind].model_dump(mode="json"),
                "steps": STEPS,
                "rows": BATCH_ROWS,
                "output": str(tmp_path / f"{name}.npz"),
                **where,
            }
            for name, (kind, embedding, where) in cases.items()
        ]
        stopped = whole | {"addresses": c, "generation": 1, "stop": True, "output": str(tmp_path / "stopped.json")}
        inside = whole | {"generation": 2, "stop": True, "output": str(tmp_path / "inside.json")}
        resumed = whole | {"addresses": d, "generation": 3, "stop": False, "output": str(tmp_path / "resumed.json")}
        poisoned = {"kind": "poisoned", "addresses": e, "rows": BATCH_ROWS, "output": str(tmp_path / "poisoned")}
        run_workers(tmp_path, [*explicit, stopped, inside, resumed, poisoned])

    for case, (kind, embedding, _) in cases.items():
        alone, together = explicit_alone(kind, configs[kind], embedding), np.load(tmp_path / f"{case}.npz")
        assert set(alone) == set(together.files)
        for name in alone:
            np.testing.assert_allclose(together[name], alone[name], rtol=2e-4, atol=2e-6, err_msg=f"{case} {name}")
    both = [np.load(tmp_path / f"{case}.npz") for case in ("replicated", "rowwise_adagrad")]
    assert all(np.array_equal(both[0][name], both[1][name]) for name in both[0].files)

    told = [json.loads((tmp_path / f"poisoned.{rank}").read_text()) for rank in range(2)]
    assert told[0] == told[1], "a NaN of one worker ends the step for all, with the same words"
    assert re.match(r"step 1: the gradient of table 'c\d\.full' is NaN or infinite", told[0]["message"])
    assert told[0]["rows_pushed"] == 0

    first = json.loads((tmp_path / "stopped.json").read_text())["summary"]
    assert first["stopped"] and 10 <= first["steps"] < 15 and first["eval"] is None
    middle = json.loads((tmp_path / "inside.json").read_text())["summary"]
    assert middle["stopped"] and first["steps"] < middle["steps"] < first["steps"] + 15 and middle["wire_bytes"] > 0
    second = json.loads((tmp_path / "resumed.json").read_text())
    summary, records = second["summary"], second["records"]
    assert summary["samples"] == ROWS and not summary["stopped"] and summary["workers"] == 2
    assert summary["eval"]["samples"] == 700
    assert summary["wire_bytes"] > 0 and summary["rows_pulled"] > 0 and summary["rows_pushed"] > 0
    assert any(f"step-{middle['steps']:09d}" in record.get("note", "") for record in records)
    assert read_manifest(summary["checkpoint"]).state["samples"] == ROWS


def test_a_run_of_one_worker_goes_on_from_any_checkpoint(data: Path, tmp_path: Path) -> None:
    """Over gRPC, so that the bytes on the wire are counted."""
    for generation, max_steps in ((1, 15), (2, None)):
        limited = job(data, train=TrainConfig(max_steps=max_steps))
        with shards(2 if generation == 1 else 3) as addresses, Store.connect(addresses, timeout=60) as store:
            summary = train(limited, store, generation=generation, directory=str(tmp_path))
        assert summary["wire_bytes"] > 0
    assert summary["samples"] == ROWS and summary["eval"]["samples"] == 700
