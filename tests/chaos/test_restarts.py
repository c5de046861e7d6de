"""Processes of a real run are killed with -9; at the end its tables are, bit for bit, those of a run left in peace.

One worker in `bounded`, and two in `sync`, are reproducible, so that one push lost or applied twice would show.
Prints how long each fault held up training.
"""

from __future__ import annotations

import itertools
import json
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import pytest
import yaml
from embershard.cluster.run_folder import read_metrics, read_run
from embershard.datasets.synthetic import generate
from embershard.parameter_server.checkpoint import read_block, read_manifest

pytestmark = [pytest.mark.chaos, pytest.mark.timeout(600)]

ROWS, BATCH, EPOCHS = 4000, 64, 30
STEPS = EPOCHS * -(-ROWS // BATCH)
FAULT_AFTER, CHECKPOINT_EVERY = 500, 200  # steps
SETTINGS = {
    "data": {"batch_size": BATCH},
    "model": {"bottom": [8], "top": [8]},
    "embedding": {"dim": 4},
    "train": {"log_every": 10, "threads": 1, "epochs": EPOCHS},
    "store": {"blocks": 32, "timeout": 60},
    "checkpoint": {"every": CHECKPOINT_EVERY},
    "cluster": {"driver_timeout": 60, "start_timeout": 120},
}
# One worker of a step that lasts: nothing of it depends on who comes first.
ONE, TWO = ["train.consistency=bounded"], ["train.consistency=sync", "cluster.workers=2"]


class Run:
    """`embershard train` in a process of its own, on the tests' cluster."""

    def __init__(self, home: Path, name: str, *settings: str) -> None:
        self.folder = home / name
        self.process = subprocess.Popen(
            [sys.executable, "-m", "embershard", "train", "run.yaml", f"run.dir={name}", *settings, "--json"],
            cwd=home,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )

    def wait_until(self, condition: Callable[[], Any], what: str, timeout: float = 300.0) -> None:
        deadline = time.monotonic() + timeout
        while not condition():
            if self.process.poll() is not None:
                pytest.fail(f"ended before {what}: {self.process.stderr.read()}")  # type: ignore[union-attr]
            assert time.monotonic() < deadline, f"not within {timeout:g} s: {what}"
            time.sleep(0.05)

    def steps(self) -> list[dict[str, Any]]:
        return [record for record in read_metrics(self.folder) if "loss" in record]

    def finish(self) -> dict[str, Any]:
        out, err = self.process.communicate(timeout=400)
        assert self.process.returncode == 0, err
        print(err, file=sys.stderr)
        self.notes = err
        summary: dict[str, Any] = json.loads(out.splitlines()[-1])
        return summary

    def fault(
        self,
        process: str,
        number: signal.Signals = signal.SIGKILL,
        *,
        before: Callable[[], object] = lambda: None,
        back_after: float | None = None,
    ) -> float:
        """Sends one a signal after FAULT_AFTER steps; returns the longest time without a step, to 10 steps exact.

        before: is called just before. back_after: seconds after which it gets SIGCONT.
        """
        self.wait_until(lambda: self.steps() and self.steps()[-1]["step"] >= FAULT_AFTER, "the fault")
        victim = processes(process)[0]
        seen = len(self.steps())
        before()
        killed = time.time()
        victim.send_signal(number)
        if back_after is not None:
            time.sleep(back_after)  # what this is about: for so long the process does not exist for anybody
            victim.send_signal(signal.SIGCONT)
        # What was on its way when the process died is no step after the fault.
        self.wait_until(lambda: len(self.steps()) > seen + 3, "the next steps")
        gaps = [record["time"] for record in self.steps()[seen - 1 :]]
        return max(b - max(a, killed) for a, b in itertools.pairwise(gaps))


def processes(name: str) -> list[psutil.Process]:
    """The processes of this Ray cluster's actors of the class `name`."""
    found = []
    for process in psutil.Process().children(recursive=True):
        try:
            if process.cmdline() and process.cmdline()[0].startswith(f"ray::{name}"):
                found.append(process)
        except psutil.NoSuchProcess:
            continue
    return found


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory, ray_address: str) -> Path:
    path = tmp_path_factory.mktemp("runs")
    for name, rows, seed in (("train/a", ROWS // 2, 0), ("train/b", ROWS // 2, 1), ("eval", 500, 2)):
        generate(str(path / name), rows=rows, seed=seed, cardinalities=(300, 40, 7), dense=2)
    data = SETTINGS["data"] | {"path": str(path / "train"), "eval_path": str(path / "eval")}
    cluster = SETTINGS["cluster"] | {"address": ray_address}
    (path / "run.yaml").write_text(yaml.safe_dump(SETTINGS | {"data": data, "cluster": cluster}))
    return path


@pytest.fixture(scope="module")
def in_peace(home: Path) -> Callable[[list[str]], dict[str, Any]]:
    """The summary of a run with the same settings that nothing happens to."""
    done: dict[str, dict[str, Any]] = {}

    def of(settings: list[str]) -> dict[str, Any]:
        name = "-".join(["in-peace", *(setting.rpartition("=")[2] for setting in settings)])
        if name not in done:
            done[name] = Run(home, name, *settings).finish()
        return done[name]

    return of


def tables(checkpoint: str) -> dict[str, np.ndarray]:
    """Every row and its optimizer state; not the ledger, which holds the random numbers of clients."""
    found = {}
    for entry in read_manifest(checkpoint).files:
        for name, tensor in read_block(checkpoint, entry).items():
            if not name.startswith("ledger/"):
                found[f"{entry.block}/{name}"] = tensor
    return found


def assert_nothing_lost_or_doubled(summary: dict[str, Any], expected: dict[str, Any]) -> None:
    assert (summary["steps"], summary["samples"]) == (STEPS, EPOCHS * ROWS)
    mine, theirs = tables(summary["checkpoint"]), tables(expected["checkpoint"])
    assert mine.keys() == theirs.keys()
    for name, tensor in theirs.items():
        np.testing.assert_array_equal(mine[name], tensor, err_msg=name)
    assert summary["eval"] == expected["eval"]


def note_of(name: str, seconds: float, summary: dict[str, Any]) -> None:
    print(f"\n{name}: {seconds:.1f} s to the next step, {summary['steps_redone']} steps redone", file=sys.stderr)


@pytest.mark.parametrize("settings", [ONE, TWO], ids=["bounded", "sync"])
def test_a_worker_is_killed(home: Path, in_peace: Any, settings: list[str]) -> None:
    run = Run(home, f"worker-{len(settings)}", *settings)
    seconds = run.fault("RayTrainWorker")
    summary = run.finish()
    note_of(f"worker killed, {settings[0]}", seconds, summary)
    assert_nothing_lost_or_doubled(summary, in_peace(settings))
    assert summary["restarts"] == 1
    (record,) = [m for m in read_metrics(run.folder) if "steps_redone" in m]
    assert 0 < record["steps_redone"] == summary["steps_redone"] <= 2 * CHECKPOINT_EVERY
    assert (record["step"] % CHECKPOINT_EVERY, record["generation"], read_run(run.folder)["generation"]) == (0, 2, 2)
    assert f"after step {record['step']} are done again" in run.notes


def test_a_shard_without_a_journal_is_killed(home: Path, in_peace: Any) -> None:
    run = Run(home, "shard-none", *TWO)
    seconds = run.fault("ShardActor")
    summary = run.finish()
    note_of("shard killed, no journal", seconds, summary)
    assert_nothing_lost_or_doubled(summary, in_peace(TWO))
    assert summary["restarts"] == 1 and summary["steps_redone"] > 0
    assert "all shards begin afresh" in run.notes and "are done again" in run.notes


def test_a_shard_with_a_journal_is_killed(home: Path, in_peace: Any) -> None:
    """Nobody else has to begin again, and nothing is done twice."""
    run = Run(home, "shard-journal", *TWO, "store.durability=journal")
    seconds = run.fault("ShardActor")
    summary = run.finish()
    note_of("shard killed, journal", seconds, summary)
    assert_nothing_lost_or_doubled(summary, in_peace(TWO))
    assert (summary["restarts"], summary["steps_redone"]) == (0, 0)
    assert "nothing acknowledged is lost" in run.notes
    assert not list((run.folder / "journal").glob("*/*")), "journals of a run that has ended"


def test_a_shard_is_killed_and_its_journal_lost(home: Path, in_peace: Any) -> None:
    """As when its machine is gone: the whole run goes back to the last checkpoint by itself."""
    run = Run(home, "shard-lost", *TWO, "store.durability=journal")
    seconds = run.fault("ShardActor", before=lambda: shutil.rmtree(run.folder / "journal"))
    summary = run.finish()
    note_of("shard killed, journal lost", seconds, summary)
    assert_nothing_lost_or_doubled(summary, in_peace(TWO))
    assert summary["restarts"] == 1 and summary["steps_redone"] > 0
    assert "came back without what it held" in run.notes and "are done again" in run.notes


@pytest.mark.parametrize("back_after", [3.0, None], ids=["three-seconds", "for-good"])
def test_a_shard_is_stopped(home: Path, in_peace: Any, back_after: float | None) -> None:
    """It goes on if it is back within its lease; after that its process is ended and its journal repeated."""
    run = Run(home, f"stopped-{back_after}", *TWO, "store.durability=journal", "cluster.lease=8")
    seconds = run.fault("ShardActor", signal.SIGSTOP, back_after=back_after)
    summary = run.finish()
    note_of(f"shard stopped {'for 3 s' if back_after else 'for good'}, lease 8 s", seconds, summary)
    assert_nothing_lost_or_doubled(summary, in_peace(TWO))
    assert (summary["restarts"], summary["steps_redone"]) == (0, 0)
    assert ("did not answer for" in run.notes) == (back_after is None)


def test_the_coordinator_is_killed(home: Path, in_peace: Any) -> None:
    """Training goes on meanwhile, and it comes back with its state: a stop is still heard, a summary still comes."""
    run = Run(home, "coordinator", *ONE)
    seconds = run.fault("Coordinator")
    summary = run.finish()
    note_of("coordinator killed", seconds, summary)
    assert_nothing_lost_or_doubled(summary, in_peace(ONE))
    assert (summary["restarts"], summary["steps_redone"]) == (0, 0)
    assert "the coordinator died and is back" in run.notes


def test_a_killed_driver_leaves_nothing_behind(home: Path) -> None:
    """The coordinator misses its heartbeat and ends everything of the run."""
    run = Run(home, "driver", "train.epochs=100000", "cluster.driver_timeout=10")
    run.wait_until(run.steps, "the first step")
    assert len(processes("ShardActor")) == 2
    run.process.kill()
    deadline = time.monotonic() + 60
    while processes("ShardActor") + processes("Coordinator"):
        assert time.monotonic() < deadline, "not ended within 60 s"
        time.sleep(0.1)


def test_nothing_is_left_behind(home: Path) -> None:
    assert not [p for name in ("ShardActor", "Coordinator", "RayTrainWorker") for p in processes(name)]
