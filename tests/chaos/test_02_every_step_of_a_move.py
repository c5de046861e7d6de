"""Source, target and coordinator are killed or stopped at every named step of a move: one owner, nothing lost."""

from __future__ import annotations

import os
import signal
import sys
import threading
import time
from pathlib import Path

import psutil
import pytest
from embershard.cluster.rescale import RescaleError

sys.path.insert(0, str(Path(__file__).parent))
from shards import Shards

pytestmark = [pytest.mark.chaos, pytest.mark.timeout(300)]

SOURCE, TARGET = 0, 2
# The number is the pass: the third of many blocks, and the block map after that of the shard that joins.
STEPS = [
    (SOURCE, "move.begun", 3),
    (SOURCE, "move.sealed", 3),
    (SOURCE, "move.owned", 2),
    (TARGET, "move.received", 3),
    (TARGET, "move.owned", 2),
]


@pytest.mark.parametrize("action", ["kill", "stop"])
@pytest.mark.parametrize(("victim", "point", "number"), STEPS, ids=lambda value: str(value))
def test_a_shard(shards, victim: int, point: str, number: int, action: str) -> None:
    group = shards(2, spare=1)
    with group.pushing():
        group.arm(victim, f"{point}={action}:{number}")
        ended: list[object] = []
        move = threading.Thread(target=lambda: ended.append(rescale_again(group, 3)))
        move.start()
        if action == "kill":
            group.restart(victim)
        else:
            group.wait_until(lambda: group.is_stopped(victim), "the stop")
            time.sleep(1.0)  # what this is about: for so long it does not exist for anybody
            group.go_on(victim)
        move.join(120)
        assert ended
        group.more_steps()
    assert len(group.block_map().addresses) == 3
    verdict = group.verdict()
    assert verdict.nothing_lost, verdict


def rescale_again(group: Shards, shards: int) -> object:
    """As the person who asked does, where a move was given up."""
    try:
        return group.rescale(shards)
    except RescaleError:
        return group.rescale(shards)


@pytest.mark.parametrize("action", ["kill", "stop"])
@pytest.mark.parametrize("number", [1, 2], ids=["joining", "moving"])
@pytest.mark.parametrize("point", ["move.commit", "move.committed"])
def test_the_coordinator(shards, point: str, number: int, action: str) -> None:
    group = shards(2, spare=1)
    with group.pushing():
        process = group.coordinator(3, f"{point}={action}:{number}")
        if action == "kill":
            process.join(120)
            assert process.exitcode == -signal.SIGKILL
            group.settle()  # the next one begins where the last one ended
            group.rescale(3)
        else:
            assert process.pid is not None
            group.wait_until(lambda: psutil.Process(process.pid).status() == psutil.STATUS_STOPPED, "the stop")
            time.sleep(1.0)
            os.kill(process.pid, signal.SIGCONT)
            process.join(120)
            assert process.exitcode == 0
            group.store.adopt(group.block_map())
        group.more_steps()
    assert len(group.block_map().addresses) == 3
    verdict = group.verdict()
    assert verdict.nothing_lost, verdict
