"""The workers of a run grow with the cluster and shrink with it: at the end every row of the epoch has counted once.

Every row has an id of its own. As many samples were trained as there are rows, and a gradient has reached every id: so
none was trained twice.
"""

from __future__ import annotations

import itertools
import json
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import yaml
from embershard.cluster.run_folder import read_metrics
from nodes import Nodes
from train_run import Run, tables

pytestmark = [pytest.mark.chaos, pytest.mark.timeout(580)]

ROWS, BATCH, FILES = 60_000, 16, 4
SETTINGS = {
    "data": {"batch_size": BATCH, "label": "label", "dense": ["size"], "categorical": ["row", "kind"]},
    "model": {"bottom": [8], "top": [8]},
    "embedding": {"dim": 4, "features": {"row": {"cardinality": ROWS}, "kind": {"cardinality": 10}}},
    "train": {"log_every": 10, "threads": 1, "consistency": "sync"},
    "store": {"blocks": 32},
    "checkpoint": {"every": 200},
    "cluster": {"workers": [1, 3], "shard_cpus": 0.25, "worker_cpus": 0.5, "start_timeout": 60},
}


@pytest.fixture
def nodes() -> Iterator[Nodes]:
    """Room for two shards and one worker."""
    nodes = Nodes(cpus=1)
    yield nodes
    nodes.close()


@pytest.fixture
def home(tmp_path: Path, nodes: Nodes) -> Path:
    random = np.random.default_rng(0)
    order = random.permutation(ROWS)
    for number, rows in enumerate(np.array_split(order, FILES)):
        kinds = random.integers(0, 10, len(rows))
        labels = (random.random(len(rows)) < (1 + kinds) / 12).astype(np.float32)
        sizes = random.random(len(rows)).astype(np.float32)
        table = pa.table({"label": labels, "size": sizes, "row": rows, "kind": kinds})
        (tmp_path / "train").mkdir(exist_ok=True)
        pq.write_table(table, tmp_path / "train" / f"{number}.parquet", row_group_size=500)
    data = SETTINGS["data"] | {"path": str(tmp_path / "train"), "eval_path": str(tmp_path / "train")}
    cluster = SETTINGS["cluster"] | {"address": nodes.address}
    (tmp_path / "run.yaml").write_text(yaml.safe_dump(SETTINGS | {"data": data, "cluster": cluster}))
    return tmp_path


def status(run: Run) -> dict[str, Any]:
    command = [sys.executable, "-m", "embershard", "status", str(run.folder), "--json"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120, check=True)
    found: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return found


def changes(run: Run) -> list[dict[str, Any]]:
    """What every group but the first began with."""
    return [record for record in read_metrics(run.folder) if "steps_redone" in record]


def test_a_group_grows_and_shrinks_with_the_cluster(home: Path, nodes: Nodes) -> None:
    run = Run(home, "elastic")
    run.wait_until(run.steps, "the first steps")
    assert status(run)["workers"] == 1
    more = nodes.add(cpus=1)
    run.wait_until(lambda: changes(run), "more workers")
    run.wait_until(lambda: run.steps()[-1]["generation"] == 2, "their steps")
    (grown,) = changes(run)
    assert (grown["workers"], grown["steps_redone"]) == (3, 0)
    assert len(nodes.processes(more, "RayTrainWorker")) == 2
    nodes.remove(more)
    summary = run.finish()
    grown, shrunk = changes(run)
    assert (shrunk["workers"], shrunk["generation"]) == (1, 3)
    assert (summary["workers"], summary["resizes"], summary["restarts"]) == (1, 1, 1)
    assert summary["steps_redone"] == shrunk["steps_redone"]
    assert summary["samples"] == ROWS
    assert rows_trained(summary["checkpoint"]) == ROWS
    assert summary["eval"]["auc"] > 0.65
    assert "from 1 to 3 workers at the next step boundary" in run.notes
    print(f"\n{grown}\n{shrunk}", file=sys.stderr)
    for before, after in itertools.pairwise(run.steps()):
        if before["generation"] != after["generation"]:
            print(f"{after['time'] - before['time']:.1f} s without a step", file=sys.stderr)


def rows_trained(checkpoint: str) -> int:
    """Ids whose optimizer state a gradient has reached."""
    states = [state for name, state in tables(checkpoint).items() if name.endswith("/row.full/row_sum")]
    return sum(int(np.count_nonzero(state)) for state in states)
