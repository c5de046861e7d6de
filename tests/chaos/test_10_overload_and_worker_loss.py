"""Too much for a shard's memory, and everybody at the same rows: refused or held back, and nobody is killed for it.

A worker that is lost, and its share of the data, which counts once: `test_restarts.py`, `test_09_kill_everything.py`.
"""

from __future__ import annotations

import sys
import threading
import time
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path

import numpy as np
import psutil
import pytest
from embershard.cluster.chaos_history import Workload
from embershard.cluster.chaos_pusher import Pusher, read_items
from embershard.cluster.rescale import RescaleError
from embershard.parameter_server.sharded import MAX_OPEN_PUSHES
from embershard.parameter_server.store import StoreTimeout
from embershard.parameter_server.tables import TableError, TableSpec

sys.path.insert(0, str(Path(__file__).parent))
from shards import WORKLOAD

pytestmark = [pytest.mark.chaos, pytest.mark.timeout(300)]

BUDGET = 16_000  # bytes: enough for half of both tables, not for all of both
CLIENTS, PUSHES = 8, 300
PULL_P99, SEAL = 5.0, 10.0  # seconds: several times what a busy machine takes
HOT = Workload(seed=10, rows=8, touched=8)  # the same few rows every time


def test_memory_that_is_used_up(shards) -> None:
    """Tables and blocks beyond it are refused, and pushes wait until a checkpoint is written; the processes live on."""
    group = shards(2, memory_bytes=BUDGET)
    pids = [process.pid for process in group.processes]
    held = [s["table_bytes"] + s["state_bytes"] for s in group.store.statistics()]
    assert max(held) < BUDGET < sum(held)
    taken = rf"needs \d+ bytes, and \d+ of store.memory_bytes={BUDGET} are taken: use more shards, or raise it"
    with group.pushing():
        with pytest.raises(TableError, match=f"shard 0: its share of 'large' {taken}"):
            group.store.create_tables([TableSpec(name="large", rows=10_000, width=16)])
        with pytest.raises(RescaleError, match=rf"shard 0: block \d+ {taken}"):
            group.rescale(1)
        group.more_steps()
        cuts = group.store.control_all("mark", {"epoch": group.block_map().epoch})
        with group.connect(timeout=3.0) as impatient:
            pusher = Pusher(impatient, WORKLOAD, group.recorder, client=1, workers=0, generation=1)
            with pytest.raises(StoreTimeout, match=r"store\.memory_bytes are used up until a checkpoint is written"):
                for step in range(1, 500):
                    pusher.push(step).result()
        assert sum(s["later"] for s in group.store.statistics()) > 0
        for shard, cut in enumerate(cuts):
            group.store.control(shard, "write", {"cut": cut, "directory": str(group.folder / "late")})
        group.more_steps()
    assert [process.pid for process in group.processes] == pids
    verdict = group.verdict()
    assert verdict.nothing_lost, verdict


def test_everybody_at_the_same_rows(shards) -> None:
    """Who pushes faster than a shard applies is held back: no queue grows, pulls are answered, blocks still move."""
    group = shards(2, spare=1, workload=HOT)
    before = resident(group)
    moved = threading.Event()
    open_pushes = [Open() for _ in range(CLIENTS)]
    storm = [threading.Thread(target=push_all, args=(group, 1 + i, one, moved)) for i, one in enumerate(open_pushes)]
    pulls: list[tuple[float, float]] = []  # asked, answered
    with group.connect() as store, ThreadPoolExecutor(1) as other:
        for worker in storm:
            worker.start()
        began = time.monotonic()
        moves = other.submit(to_and_fro, group, moved)
        while any(worker.is_alive() for worker in storm):
            asked = time.monotonic()
            read_items(store, HOT)
            pulls.append((asked, time.monotonic()))
        seconds = time.monotonic() - began
        moved_at, seal = moves.result()
    p99 = percentiles("all of the storm", pulls)
    while_moving = percentiles("its moves", [(asked, answered) for asked, answered in pulls if asked < moved_at])
    pushes = sum(one.begun for one in open_pushes)
    print(f"{pushes / seconds:.0f} pushes/s of {CLIENTS} clients; the longest seal {1e3 * seal:.0f} ms")
    assert max(p99, while_moving) < PULL_P99 and seal < SEAL
    assert all(one.failed is None for one in open_pushes), [one.failed for one in open_pushes]
    most = [one.most for one in open_pushes]
    assert max(most) <= MAX_OPEN_PUSHES + 3  # answers on their way to here, one from each shard, which are three now
    assert max(most) > MAX_OPEN_PUSHES // 2, "nobody was held back: no storm"
    assert max(resident(group)) < max(before) + (64 << 20)
    verdict = group.verdict()
    assert verdict.nothing_lost, verdict
    assert verdict.pushes_acknowledged == pushes


def to_and_fro(group, moved: threading.Event) -> tuple[float, float]:
    """Another shard gets its share of the blocks and gives it back; returns when, and the longest seal in seconds."""
    try:
        seals = [group.rescale(count)["longest_hold_seconds"] for count in (3, 2)]
        return time.monotonic(), max(seals)
    finally:
        moved.set()


def percentiles(during: str, pulls: list[tuple[float, float]]) -> float:
    """Prints what pulls took; returns the p99 in seconds."""
    p50, p99 = np.percentile([answered - asked for asked, answered in pulls], [50, 99])
    print(f"\n{len(pulls)} pulls of the {HOT.rows} rows in {during}: p50 {1e3 * p50:.0f} ms, p99 {1e3 * p99:.0f} ms")
    return float(p99)


class Open:
    """How many pushes of one client are under way, and were at the most; begun: all of them."""

    def __init__(self) -> None:
        self.now = self.most = self.begun = 0
        self.failed: BaseException | None = None
        self._lock = threading.Lock()

    def add(self, push: Future[None]) -> None:
        with self._lock:
            self.begun += 1
            self.now += 1
            self.most = max(self.most, self.now)
        push.add_done_callback(self._ended)

    def _ended(self, push: Future[None]) -> None:
        with self._lock:
            self.now -= 1


def push_all(group, client: int, under_way: Open, enough: threading.Event) -> None:
    """As fast as the store takes them, without waiting for any: PUSHES, and more until it is enough."""
    try:
        with group.connect() as store:
            pusher = Pusher(store, HOT, group.recorder, client=client, workers=0, generation=1)
            pushes: list[Future[None]] = []
            while len(pushes) < PUSHES or not enough.is_set():
                pushes.append(pusher.push(len(pushes) + 1))
                under_way.add(pushes[-1])
            for push in pushes:
                push.result()
    except BaseException as error:
        under_way.failed = error


def resident(group) -> list[int]:
    """Bytes of each shard's process."""
    return [psutil.Process(process.pid).memory_info().rss for process in group.processes]
