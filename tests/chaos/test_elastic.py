"""Workers grow and shrink, with the cluster and when asked to: at the end every row of the epoch has counted once.

Every row has an id of its own. As many samples were trained as there are rows, and a gradient has reached every id: so
none was trained twice.
"""

from __future__ import annotations

import itertools
import json
import signal
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
from embershard.workers.checkpoints import newest
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


def command(run: Run, name: str, *options: str) -> dict[str, Any]:
    """What an `embershard` command about the run prints as JSON."""
    command = [sys.executable, "-m", "embershard", name, str(run.folder), *options, "--json"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120, check=True)
    found: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return found


def changes(run: Run) -> list[dict[str, Any]]:
    """What every group but the first began with."""
    return [record for record in read_metrics(run.folder) if "steps_redone" in record]


def test_a_group_grows_and_shrinks_with_the_cluster(home: Path, nodes: Nodes) -> None:
    run = Run(home, "elastic")
    run.wait_until(run.steps, "the first steps")
    assert command(run, "status")["workers"] == 1
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


def test_a_group_shrinks_and_grows_when_asked_to(home: Path, nodes: Nodes) -> None:
    """Each time from a checkpoint that it writes for that: there are no others, so no step is done again."""
    nodes.add(cpus=2)  # the shards are spread over both nodes, and three workers fit beside them
    run = Run(home, "asked", "data.batch_size=4", "checkpoint.every=0", "checkpoint.keep=9")
    run.wait_until(lambda: run.steps() and command(run, "status")["workers"] == 3, "three workers")
    before = len(changes(run))  # Ray may have said of the second node only after the run had begun without it
    for now, workers in ((3, 1), (1, 2)):
        seen = len(changes(run))
        assert command(run, "scale", "--workers", str(workers)) == {"workers": now, "wanted": workers}
        run.wait_until(lambda seen=seen: len(changes(run)) > seen, f"{workers} workers")
        run.wait_until(lambda: run.steps()[-1]["generation"] == changes(run)[-1]["generation"], "their steps")
        assert command(run, "status")["workers"] == workers
    run.process.send_signal(signal.SIGINT)
    _, notes = run.process.communicate(timeout=120)
    assert run.process.returncode == 130, notes
    last, damaged = newest(str(run.folder / "checkpoints"))
    assert last is not None and not damaged
    assert [change["workers"] for change in changes(run)[before:]] == [1, 2]
    assert not any(change["steps_redone"] for change in changes(run))
    written = sorted(int(path.name.removeprefix("step-")) for path in (run.folder / "checkpoints").iterdir())
    assert written == [*(change["step"] for change in changes(run)), last.step]
    steps = [record["step"] for record in run.steps()]
    assert steps == sorted(set(steps)), "a step was done twice"
    assert 0 < last.state["samples"] == rows_trained(last.path) < ROWS
    print(f"\n{notes}", file=sys.stderr)


def rows_trained(checkpoint: str) -> int:
    """Ids whose optimizer state a gradient has reached."""
    states = [state for name, state in tables(checkpoint).items() if name.endswith("/row.full/row_sum")]
    return sum(int(np.count_nonzero(state)) for state in states)
