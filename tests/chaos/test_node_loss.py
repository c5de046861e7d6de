"""Machines of a run go away; at the end its tables are, bit for bit, those of a run left in peace."""

from __future__ import annotations

import itertools
import shutil
import signal
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import psutil
import pytest
from embershard.cluster.run_folder import read_metrics, read_run
from nodes import Nodes
from train_run import CHECKPOINT_EVERY, FAULT_AFTER, ONE, SETTINGS, Run, assert_nothing_lost_or_doubled, note_of

pytestmark = [pytest.mark.chaos, pytest.mark.timeout(580)]

WHOLE = [*ONE, "cluster.shard_cpus=1", "cluster.worker_cpus=1", "cluster.lease=8"]  # 3 CPUs


@pytest.fixture
def nodes() -> Iterator[Nodes]:
    nodes = Nodes(cpus=3)  # two shards and the worker fit on the node that stays
    yield nodes
    nodes.close()


def begin(home: Path, nodes: Nodes, name: str, *settings: str) -> Run:
    return Run(home, name, *WHOLE, f"cluster.address={nodes.address}", *settings)


def lose(run: Run, nodes: Nodes, node: Any, back: Callable[[], Any]) -> float:
    """Takes the node away; returns the longest time without a step until training goes on after `back`."""
    lost = time.time()
    nodes.remove(node)
    run.wait_until(back, "what was on the node")
    seen = len(run.steps())
    run.wait_until(lambda: len(run.steps()) > seen + 3, "the next steps")
    times = [lost, *(record["time"] for record in run.steps() if record["time"] > lost)]
    return max(after - before for before, after in itertools.pairwise(times))


def reach(run: Run, step: int) -> None:
    run.wait_until(lambda: run.steps() and run.steps()[-1]["step"] >= step, f"step {step}")


def assert_back_at_a_checkpoint(run: Run, summary: dict[str, Any]) -> None:
    assert summary["restarts"] == 1
    (again,) = [record for record in read_metrics(run.folder) if "steps_redone" in record]
    assert 0 < again["steps_redone"] == summary["steps_redone"]
    assert again["step"] >= FAULT_AFTER - CHECKPOINT_EVERY and again["step"] % CHECKPOINT_EVERY == 0
    assert f"{again['steps_redone']} steps after step {again['step']} are done again" in run.notes


def test_the_node_of_a_shard_and_the_journal_on_it(home: Path, nodes: Nodes, in_peace: Any) -> None:
    """The shard begins on another node, and the run goes back to the last checkpoint by itself and says which."""
    node = nodes.add(cpus=1)
    run = begin(home, nodes, "node-of-a-shard", "store.durability=journal")
    reach(run, FAULT_AFTER)
    (shard,) = nodes.processes(node, "ShardActor")
    (journal,) = {Path(file.path).parent for file in shard.open_files() if file.path.endswith("/lock")}
    shutil.rmtree(journal)  # it lay on that machine
    seconds = lose(run, nodes, node, lambda: read_run(run.folder)["generation"] == 2)
    summary = run.finish()
    note_of("node of a shard lost, its journal with it", seconds, summary)
    assert_nothing_lost_or_doubled(summary, in_peace(ONE))
    assert_back_at_a_checkpoint(run, summary)
    assert "its journal is not there" in run.notes


def test_the_node_of_the_worker(home: Path, nodes: Nodes, in_peace: Any) -> None:
    """It begins again where there is room, from the last checkpoint."""
    run = begin(home, nodes, "node-of-the-worker", "cluster.shard_cpus=1.5")
    run.wait_until(lambda: nodes.processes(nodes.head, "ShardActor")[1:], "the shards")
    node = nodes.add(cpus=1)
    reach(run, FAULT_AFTER)
    assert nodes.processes(node, "RayTrainWorker")
    nodes.add(cpus=1)
    seconds = lose(run, nodes, node, lambda: read_run(run.folder)["generation"] == 2)
    summary = run.finish()
    note_of("node of the worker lost", seconds, summary)
    assert_nothing_lost_or_doubled(summary, in_peace(ONE))
    assert_back_at_a_checkpoint(run, summary)


def test_the_node_of_the_coordinator(home: Path, nodes: Nodes) -> None:
    """It comes back on another node with its state, and training goes on meanwhile: a stop is heard, nothing redone."""
    run = begin(home, nodes, "node-of-the-coordinator", "train.epochs=2000")
    reach(run, 1)
    node = nodes.add(cpus=0)
    while not nodes.processes(node, "Coordinator"):  # Ray places what asks for nothing anywhere
        for process in nodes.processes(nodes.head, "Coordinator"):
            process.kill()
            process.wait(30)
        run.wait_until(lambda: coordinators(nodes, node), "the coordinator")
    seconds = lose(run, nodes, node, lambda: nodes.processes(nodes.head, "Coordinator"))
    run.process.send_signal(signal.SIGINT)
    _, notes = run.process.communicate(timeout=120)
    assert run.process.returncode == 130, notes
    assert "the coordinator died and is back" in notes and "are done again" not in notes
    jump = max(after["step"] - before["step"] for before, after in itertools.pairwise(run.steps()))
    assert jump > SETTINGS["train"]["log_every"], "training waited"  # it did not: what it reported meanwhile is lost
    print(f"\nnode of the coordinator lost: {seconds:.1f} s without a record, {jump} steps in one", file=sys.stderr)


def coordinators(nodes: Nodes, node: Any) -> list[psutil.Process]:
    return [process for at in (nodes.head, node) for process in nodes.processes(at, "Coordinator")]
