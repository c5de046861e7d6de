"""Runs through the command line on one Ray cluster: finished, stopped, resumed, broken, killed."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml
from embershard.cluster.cli import app
from embershard.cluster.coordinator import Coordinator
from embershard.cluster.run_folder import read_metrics, read_run
from embershard.cluster.run_state import ShardPlan
from embershard.datasets.synthetic import generate
from pydantic import SecretStr

SMALL = {
    "data": {"batch_size": 64},
    "model": {"bottom": [8], "top": [8]},
    "embedding": {"dim": 4},
    "train": {"log_every": 2, "threads": 1},
    "store": {"blocks": 32, "timeout": 30},
    "cluster": {"driver_timeout": 60, "start_timeout": 120},
}


class Command:
    """`embershard` in a process of its own."""

    def __init__(self, folder: Path, *arguments: str) -> None:
        self.folder = folder
        environment = {name: value for name, value in os.environ.items() if not name.startswith("EMBERSHARD_")}
        self.process = subprocess.Popen(
            [sys.executable, "-m", "embershard", *arguments],
            cwd=folder,
            env=environment,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )

    def finish(self, timeout: float = 240.0) -> tuple[int, str, str]:
        """(exit code, stdout, stderr)."""
        try:
            out, err = self.process.communicate(timeout=timeout)
        finally:
            self.process.kill()
        return self.process.returncode, out, err

    def wait_until(self, condition: Callable[[], Any], timeout: float = 240.0) -> None:
        def ended_or_true() -> bool:
            if self.process.poll() is not None:
                pytest.fail(f"ended with {self.process.returncode}: {self.process.stderr.read()}")  # type: ignore[union-attr]
            return bool(condition())

        wait_until(ended_or_true, timeout)


def wait_until(condition: Callable[[], Any], timeout: float = 60.0) -> None:
    deadline = time.monotonic() + timeout
    while not condition():
        assert time.monotonic() < deadline, f"not so within {timeout:g} s"
        time.sleep(0.1)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory, ray_address: str) -> Path:
    """A folder with train/, eval/ and small.yaml, which joins the tests' cluster."""
    path = tmp_path_factory.mktemp("runs")
    # Two files to train on: a row group is the least that a worker can have to itself.
    for name, rows, seed in (("train/a", 2000, 0), ("train/b", 2000, 1), ("eval", 1000, 2)):
        generate(str(path / name), rows=rows, seed=seed, cardinalities=(300, 40, 7), dense=2)
    data = SMALL["data"] | {"path": str(path / "train"), "eval_path": str(path / "eval")}
    cluster = SMALL["cluster"] | {"address": ray_address}
    (path / "small.yaml").write_text(yaml.safe_dump(SMALL | {"data": data, "cluster": cluster}))
    return path


def actors_of(run: Path) -> list[str]:
    import ray

    namespace = read_run(run)["namespace"]
    return [
        actor["name"] for actor in ray.util.list_named_actors(all_namespaces=True) if actor["namespace"] == namespace
    ]


def groups_of(run: Path) -> list[str]:
    import ray

    namespace = read_run(run)["namespace"]
    groups = ray.util.placement_group_table().values()
    return [group["state"] for group in groups if group["name"].startswith(namespace) and group["state"] != "REMOVED"]


def test_two_runs_side_by_side(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """One, with two workers, gets a shard more, is stopped by Ctrl-C and resumed with as many shards as it began with.

    The other ends by an id that is wrong, in one line.
    """
    run = folder / "two"
    two = Command(folder, "train", "small.yaml", "run.dir=two", "cluster.workers=2", "train.epochs=1000")
    # An id beyond the stated cardinality shows only when rows are read: in a worker, and it is the user's to mend.
    wrong = Command(
        folder, "train", "small.yaml", "run.dir=wrong", "embedding.features.c1.cardinality=5", "cluster.shards=1"
    )
    two.wait_until(lambda: read_metrics(run))
    app(["scale", str(run), "--shards", "3", "--json"], standalone_mode=False)  # in this process, which has joined Ray
    assert_scaled(run, 3, capsys.readouterr().out)
    two.process.send_signal(signal.SIGINT)
    code, _, err = wrong.finish()
    assert code == 2, err
    assert "c1" in err.splitlines()[-1] and "out_of_range" in err.splitlines()[-1] and "Traceback" not in err
    step = assert_stopped(run, *two.finish())

    last = step + 10
    resumed = Command(folder, "train", "two", "--resume", "train.epochs=1000", f"train.max_steps={last}", "--json")
    assert_finished(run, step, last, *resumed.finish())


def assert_scaled(run: Path, shards: int, out: str) -> None:
    """There is one shard more, and it has got its share of the blocks from both others."""
    result = json.loads(out.splitlines()[-1])
    assert (result["shards"], result["blocks_moved"]) == (shards, SMALL["store"]["blocks"] // shards)
    assert result["bytes_moved"] > 0 and 0 < result["longest_hold_seconds"] < SMALL["store"]["timeout"]
    assert "workers were held" in out and "p99" in out
    assert len([name for name in actors_of(run) if name.startswith("shard")]) == shards


def assert_stopped(run: Path, code: int, out: str, err: str) -> int:
    """A checkpoint was written at a step boundary; returns its step."""
    assert code == 130, err
    assert err.splitlines()[-1].startswith("embershard: stopped at step ")
    assert read_run(run)["status"] == "interrupted"
    step = max(int(path.name.removeprefix("step-")) for path in (run / "checkpoints").iterdir())
    assert f"step {step};" in err.splitlines()[-1]
    return step


def assert_finished(run: Path, began: int, last: int, code: int, out: str, err: str) -> None:
    """It went on where it stood; the keys of the contract are there, rows crossed the wire, nothing is left behind."""
    assert code == 0, err
    summary = json.loads(out.splitlines()[-1])
    assert summary["run_dir"] == str(run)
    epochs, more = divmod(last, 63)  # of 4,000 rows: the last batch of an epoch is short
    samples = epochs * 4000 + more * 64
    assert (summary["steps"], summary["samples"], summary["shards"], summary["workers"]) == (last, samples, 2, 2)
    assert (summary["method"], summary["placement"]) == ("full", "sharded")
    assert summary["eval"]["samples"] == 1000
    for key in ("auc", "logloss", "normalized_entropy"):
        assert 0 < summary["eval"][key] < 10
    for key in ("seconds", "samples_per_second", "train_loss", "rows_pulled", "rows_pushed", "wire_bytes"):
        assert summary[key] > 0
    assert summary["embedding_bytes"] == 4 * summary["embedding_parameters"] == summary["full_embedding_bytes"]
    assert summary["compression_ratio"] == 1.0
    steps = [m["step"] for m in read_metrics(run) if m["generation"] == 2]
    assert began < steps[0] and steps[-1] == last
    assert "Traceback" not in err and "(raylet)" not in err and "pid=" not in err
    assert actors_of(run) == [] and groups_of(run) == []


def test_no_room_for_the_shards(ray_address: str) -> None:
    """A request that cannot be met ends after the stated wait, with both numbers."""
    import ray

    coordinator = ray.remote(Coordinator).options(num_cpus=0, max_concurrency=4)
    coordinator = coordinator.remote("no-room", 60.0, SecretStr("t" * 16))
    plan = ShardPlan("no-room", 2, 50.0, 32, 0, True, 0.5)
    with pytest.raises(Exception, match=r"2 shards ask for 50 CPUs each, and the cluster has .* of 8 CPUs free"):
        ray.get(coordinator.start.remote(plan))
    ray.get(coordinator.end.remote())
    ray.kill(coordinator)
