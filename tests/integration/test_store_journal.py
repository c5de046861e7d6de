"""A shard is killed with -9 and comes back from its journal, over real gRPC; a model says what must be there.

Gradients are whole numbers and the optimizer is SGD with rate 1, so sums are exact: a push that is lost or counted
twice shows as a difference.
"""

from __future__ import annotations

import signal
import sys
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path

import numpy as np
import pytest
from embershard.parameter_server.client import StoreClient
from embershard.parameter_server.kernels import locate
from embershard.parameter_server.store import ShardUnavailable

sys.path.insert(0, str(Path(__file__).parent))
from exact import exact_table
from shard_process import ShardProcess

ROWS, WIDTH = 300, 4
TABLE = exact_table(ROWS, WIDTH)


class Scenario:
    """A client that pushes, what it was acknowledged, and the shard that is killed under it."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.rng = np.random.default_rng(0)
        self.model = np.zeros((ROWS, WIDTH), np.float32)
        self.shard = ShardProcess(folder, journal_bytes=10_000)  # about eight pushes, then a local snapshot
        self.store = StoreClient.connect(self.shard.address, timeout=60.0)
        self.store.create_tables([TABLE])

    def locate(self, rows: np.ndarray):
        slab, rank = self.store.layout.slabs[0], self.store.block_map.rank()
        return locate(slab, np.zeros(1, np.int32), np.array([0, len(rows)]), rows, rank)

    def push(self):
        rows = self.rng.permutation(ROWS)[:50]
        grads = self.rng.integers(-4, 5, (len(rows), WIDTH)).astype(np.float32)
        self.model[rows] -= grads
        part, inverse = self.locate(rows)
        ordered = np.empty_like(grads)
        ordered[inverse] = grads
        return self.store.push([part], [ordered], [1.0])

    def wrong_rows(self) -> int:
        part, inverse = self.locate(np.arange(ROWS))
        return int((self.store.pull([part]).result()[0][inverse] != self.model).any(axis=1).sum())

    def arm(self, points: str) -> None:
        self.store.control(0, "arm", {"points": points})

    def restart(self) -> dict:
        """The shard again, where its folder is; the client is told nothing."""
        assert self.shard.wait() == -signal.SIGKILL
        address = self.shard.address
        self.shard = ShardProcess(self.folder, journal_bytes=10_000)
        assert self.shard.address == address
        return self.shard.recovery


@pytest.fixture
def scenario(tmp_path: Path) -> Iterator[Scenario]:
    scenario = Scenario(tmp_path / "journal")
    yield scenario
    scenario.store.close()
    scenario.shard.kill()


def test_killed_between_every_two_stages_of_a_push(scenario: Scenario) -> None:
    for point in ("push.checked", "push.journalled", "push.applied"):
        scenario.push().result()
        scenario.arm(f"{point}=kill:4")
        pushes = [scenario.push() for _ in range(10)]
        report = scenario.restart()
        assert report["records"] > 0
        for push in pushes:
            push.result()  # the client went on by itself
        assert scenario.wrong_rows() == 0, point
    assert scenario.store.counters.retries > 0
    (statistics,) = scenario.store.statistics()
    assert statistics["journal_bytes"] > 0


def test_killed_at_every_step_of_a_local_snapshot(scenario: Scenario) -> None:
    for point in ("journal.segment=kill", "snapshot.block=kill:3", "snapshot.manifest=kill", "snapshot.clean=kill"):
        with suppress(ShardUnavailable):  # where a snapshot is being written already, the answer may not come
            scenario.arm(point)
        pushes = [scenario.push() for _ in range(30)]  # fewer than a client may have open
        scenario.restart()
        for push in pushes:
            push.result()
        assert scenario.wrong_rows() == 0, point


def test_without_the_record_the_same_kill_loses_what_was_acknowledged(scenario: Scenario) -> None:
    """The mutant: acknowledged, and never written down."""
    scenario.arm("journal=skip")
    for _ in range(3):
        scenario.push().result()
    assert scenario.wrong_rows() == 0
    scenario.arm("journal=skip,push.checked=kill")
    push = scenario.push()
    scenario.restart()
    push.result()
    assert scenario.wrong_rows() > 0
