"""All shards of a real run die at once, alone or with the workers: nothing is lost, or all goes back.

At the end the tables are, bit for bit, those of a run left in peace: so no batch was trained twice or skipped.
"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import pytest
from embershard.cluster.run_folder import read_metrics

sys.path.insert(0, str(Path(__file__).parent))
from train_run import CHECKPOINT_EVERY, TWO, Run, assert_nothing_lost_or_doubled, note_of

pytestmark = [pytest.mark.chaos, pytest.mark.timeout(600)]

JOURNAL = [*TWO, "store.durability=journal"]


def test_every_shard(home: Path, in_peace: Any) -> None:
    """They come back with the last acknowledged push, and the workers go on."""
    run = Run(home, "every-shard", *JOURNAL)
    seconds = run.fault("ShardActor", every=True)
    summary = run.finish()
    note_of("every shard killed, journal", seconds, summary)
    assert_nothing_lost_or_doubled(summary, in_peace(TWO))
    assert (summary["restarts"], summary["steps_redone"]) == (0, 0)
    assert run.notes.count("nothing acknowledged is lost") == 2


def test_every_shard_and_every_worker(home: Path, in_peace: Any) -> None:
    """All goes back to the last checkpoint, which is named; what the journals hold of later pushes is undone."""
    run = Run(home, "every-shard-and-worker", *JOURNAL)
    seconds = run.fault("RayTrainWorker", "ShardActor", every=True)
    summary = run.finish()
    note_of("every shard and worker killed, journal", seconds, summary)
    assert_nothing_lost_or_doubled(summary, in_peace(TWO))
    (record,) = [record for record in read_metrics(run.folder) if "steps_redone" in record]
    assert (summary["restarts"], record["step"] % CHECKPOINT_EVERY) == (1, 0)
    assert 0 < record["steps_redone"] == summary["steps_redone"]
    assert f"after step {record['step']} are done again" in run.notes
