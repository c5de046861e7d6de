"""Shards, and runs of `embershard train`, on one Ray cluster of three nodes for all tests that lose no node.

The cluster ends with the last test of this package: a process can be connected to one Ray only, and other tests, if
they are run together with these, have theirs.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import ray
import yaml
from embershard.datasets.synthetic import generate
from embershard.parameter_server import failpoints

sys.path.insert(0, str(Path(__file__).parent))
from nodes import Nodes
from shards import Shards
from train_run import ROWS, SETTINGS, Run


@pytest.fixture(scope="package")
def ray_address() -> Iterator[str]:
    """Address of the cluster, which takes the place of the other tests' single node."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("RAY_USAGE_STATS_ENABLED", "0")
        patch.setenv(failpoints.VARIABLE, "")  # the shards may be armed
        nodes = Nodes(cpus=3)
        for _ in range(2):
            nodes.add(cpus=3)
    ray.init(address=nodes.address, namespace="tests", log_to_driver=False, logging_level="ERROR")
    yield nodes.address
    ray.shutdown()
    nodes.close()


@pytest.fixture
def shards(tmp_path: Path, ray_address: str) -> Iterator[Callable[..., Shards]]:
    """Makes `Shards`, with a generation begun."""
    made: list[Shards] = []

    def make(count: int, spare: int = 0, **options: Any) -> Shards:
        folder = tmp_path / f"group-{len(made)}"
        folder.mkdir()
        made.append(Shards(folder, count, spare, **options))
        made[-1].begin()
        return made[-1]

    yield make
    for one in made:
        one.close()


@pytest.fixture(scope="package")
def home(tmp_path_factory: pytest.TempPathFactory, ray_address: str) -> Path:
    path = tmp_path_factory.mktemp("runs")
    for name, rows, seed in (("train/a", ROWS // 2, 0), ("train/b", ROWS // 2, 1), ("eval", 500, 2)):
        generate(str(path / name), rows=rows, seed=seed, cardinalities=(300, 40, 7), dense=2)
    data = SETTINGS["data"] | {"path": str(path / "train"), "eval_path": str(path / "eval")}
    cluster = SETTINGS["cluster"] | {"address": ray_address}
    (path / "run.yaml").write_text(yaml.safe_dump(SETTINGS | {"data": data, "cluster": cluster}))
    return path


@pytest.fixture(scope="package")
def in_peace(home: Path) -> Callable[[list[str]], dict[str, Any]]:
    """The summary of a run with the same settings that nothing happens to."""
    done: dict[str, dict[str, Any]] = {}

    def of(settings: list[str]) -> dict[str, Any]:
        name = "-".join(["in-peace", *(setting.rpartition("=")[2] for setting in settings)])
        if name not in done:
            done[name] = Run(home, name, *settings).finish()
        return done[name]

    return of


@pytest.fixture(autouse=True)
def no_run_goes_on() -> Iterator[None]:
    """After a test that failed."""
    yield
    while Run.started:
        Run.started.pop().process.kill()
