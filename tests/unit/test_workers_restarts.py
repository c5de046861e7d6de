"""A worker that fails in the middle and begins again on the same shards: as if nothing had happened."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from embershard.datasets.schema import DataConfig
from embershard.datasets.synthetic import generate
from embershard.parameter_server.local import LocalStore
from embershard.parameter_server.store import Store
from embershard.workers.embeddings.planning import EmbeddingConfig
from embershard.workers.job import CheckpointConfig, TrainConfig, TrainingJob
from embershard.workers.models.build import ModelConfig
from embershard.workers.trainer import train

FAILS_AT, STEPS = 20, 32


class Lost(Exception):
    """Stands for whatever ends a worker's process."""


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("data")
    generate(str(folder / "train"), rows=2000, seed=1, cardinalities=(7, 400), dense=2)
    return folder


def job(data: Path, every: int, consistency: str) -> TrainingJob:
    return TrainingJob(
        data=DataConfig(path=str(data / "train"), batch_size=64, window_bytes=1 << 14),
        model=ModelConfig(bottom=[4], top=[4]),
        embedding=EmbeddingConfig(dim=4),
        train=TrainConfig(log_every=1, consistency=consistency),
        checkpoint=CheckpointConfig(every=every),
        seed=4,
    )


def contents(store: LocalStore) -> dict[str, np.ndarray]:
    blocks = {f"{s.number}/{b}": s.export_block(b) for s in store.members for b in np.flatnonzero(s._held).tolist()}
    return {
        f"{place}/{name}": tensor
        for place, tensors in blocks.items()
        for name, tensor in tensors.items()
        if name != "ledger/client"  # a random number, different in every incarnation
    }


@pytest.mark.parametrize("consistency", ["bounded", "sync"])
@pytest.mark.parametrize(("every", "redone"), [(8, 4), (0, 20)])
def test_tables_and_samples_are_those_of_an_undisturbed_run(
    data: Path, tmp_path: Path, every: int, redone: int, consistency: str
) -> None:
    asked = job(data, every, consistency)
    with Store.open(shards=2, blocks=40, seed=4) as undisturbed:
        expected = train(asked, undisturbed, directory=str(tmp_path / "undisturbed"))

        def fail(record: dict[str, Any]) -> None:
            if record.get("step") == FAILS_AT and "loss" in record:
                raise Lost

        records: list[dict[str, Any]] = []
        with Store.open(shards=2, blocks=40, seed=4) as store:
            with pytest.raises(Lost):
                train(asked, store, directory=str(tmp_path / "lost"), report=fail)
            store.control_all("mark", {"epoch": store.block_map.epoch})  # a checkpoint was just beginning
            summary = train(
                asked, store, generation=2, reached=FAILS_AT, directory=str(tmp_path / "lost"), report=records.append
            )
            assert contents(store).keys() == contents(undisturbed).keys()
            for name, tensor in contents(undisturbed).items():
                if "ledger" not in name:
                    np.testing.assert_array_equal(contents(store)[name], tensor, err_msg=name)
    assert (summary["steps"], summary["samples"]) == (expected["steps"], expected["samples"]) == (STEPS, 2000)
    assert summary["train_loss"] is not None
    (record,) = [record for record in records if "steps_redone" in record]
    assert record == {"step": FAILS_AT - redone, "steps_redone": redone, "workers": 1}
    assert any(f"{redone} steps after step {FAILS_AT - redone}" in record.get("note", "") for record in records)
