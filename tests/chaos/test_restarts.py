"""Processes of a real run are killed with -9; at the end its tables are, bit for bit, those of a run left in peace.

Prints how long each fault held up training.
"""

from __future__ import annotations

import shutil
import signal
import sys
import time
from pathlib import Path
from typing import Any

import pytest
from embershard.cluster.run_folder import read_metrics, read_run

sys.path.insert(0, str(Path(__file__).parent))
from train_run import CHECKPOINT_EVERY, ONE, TWO, Run, assert_nothing_lost_or_doubled, note_of, processes

pytestmark = [pytest.mark.chaos, pytest.mark.timeout(600)]


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
    seconds = run.fault("ShardActor", number=signal.SIGSTOP, back_after=back_after)
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
    run = Run(home, "driver", "train.epochs=2000", "cluster.driver_timeout=10")
    run.wait_until(run.steps, "the first step")
    assert len(processes("ShardActor")) == 2
    run.process.kill()
    deadline = time.monotonic() + 60
    while processes("ShardActor") + processes("Coordinator"):
        assert time.monotonic() < deadline, "not ended within 60 s"
        time.sleep(0.1)


def test_nothing_is_left_behind(home: Path) -> None:
    assert not [p for name in ("ShardActor", "Coordinator", "RayTrainWorker") for p in processes(name)]
