"""Every guard beside its mutant: the same scenario loses and doubles nothing, and with the guard off it does.

The scenarios are small and real: the fault that the guard is there for, once, judged by the checker of chaos runs.
"""

from __future__ import annotations

import shutil
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path

import pytest
from embershard.cluster.chaos_history import HISTORY_FILE, History, Recorder, Verdict, Workload, check, read_tables
from embershard.cluster.chaos_pusher import Pusher
from embershard.cluster.migration import Call, Migration, Move, Phase
from embershard.parameter_server import failpoints, restore
from embershard.parameter_server.blocks import BlockMap
from embershard.parameter_server.client import StoreClient
from embershard.parameter_server.local import LocalStore
from embershard.parameter_server.recovery import open_shard
from embershard.parameter_server.server import ShardServer
from embershard.parameter_server.shard import Shard
from embershard.parameter_server.store import FencedError, Store
from embershard.parameter_server.tables import Layout

sys.path.insert(0, str(Path(__file__).parent))
from shard_process import ShardProcess

BLOCKS = 40
WORKLOAD = Workload(seed=5, rows=200, touched=24)


class Scenario:
    """One history and its guard. armed: what switches the guard off, empty where it stays on."""

    def __init__(self, folder: Path, armed: str) -> None:
        self.folder = folder
        self.armed = armed
        self.recorder = Recorder(folder / HISTORY_FILE)
        self.recorder.write("workload", **WORKLOAD.__dict__)

    def begin(self, store: Store, generation: int = 1, step: int = 0) -> Pusher:
        store.begin(generation, 1, step)
        self.recorder.write("generation", generation=generation, step=step, workers=1)
        return Pusher(store, WORKLOAD, self.recorder, client=0, workers=1, generation=generation)

    def verdict(self, store: Store) -> Verdict:
        failpoints.arm("")
        store.save(str(self.folder / "final")).result()
        return check(History.read(self.folder / HISTORY_FILE), read_tables(str(self.folder / "final")))


@pytest.fixture(autouse=True)
def disarmed() -> Iterator[None]:
    yield
    failpoints.arm("")


def ledger(scenario: Scenario) -> Verdict:
    """Answers are lost after the push was applied; the client repeats it."""
    shards = [Shard(number, Layout(BLOCKS)) for number in range(2)]
    servers = [ShardServer(shard) for shard in shards]
    block_map = BlockMap.initial(BLOCKS, tuple(server.start() for server in servers))
    for shard in shards:
        shard.set_block_map(block_map)
    try:
        with StoreClient.connect(block_map.addresses) as store:
            store.create_tables(WORKLOAD.tables())
            pusher = scenario.begin(store)
            pusher.run(1, 3, sync=False)
            failpoints.arm(",".join(filter(None, [scenario.armed, "network.answer=skip:1"])))
            pusher.push(4).result()
            assert store.counters.retries > 0
            pusher.run(5, 3, sync=False)
            return scenario.verdict(store)
    finally:
        for server in servers:
            server.stop()


def journal(scenario: Scenario) -> Verdict:
    """kill -9 of a shard that has acknowledged."""
    shard = ShardProcess(scenario.folder / "journal")
    try:
        with StoreClient.connect(shard.address) as store:
            store.create_tables(WORKLOAD.tables())
            pusher = scenario.begin(store)
            pusher.run(1, 3, sync=False)
            store.control(0, "arm", {"points": scenario.armed})
            pusher.run(4, 3, sync=False)
            shard.kill()
            shard = ShardProcess(scenario.folder / "journal")
            for step in (7, 8, 9):  # without pulls: without its journal the shard waits for pushes that it had
                pusher.push(step).result()
            return scenario.verdict(store)
    finally:
        shard.kill()


def fence(scenario: Scenario) -> Verdict:
    """A worker of the generation before lives on, and pushes after everything went back to the checkpoint."""
    with LocalStore(shards=2, blocks=BLOCKS) as old, old.attach() as new:
        old.create_tables(WORKLOAD.tables())
        new.layout.add(WORKLOAD.tables())
        straggler = scenario.begin(old)
        straggler.run(1, 3, sync=False)
        checkpoint = str(scenario.folder / "step-3")
        old.save(checkpoint).result()
        straggler.run(4, 2, sync=False)
        pusher = scenario.begin(new, generation=2, step=3)
        new.load(checkpoint)
        failpoints.arm(scenario.armed)
        with suppress(FencedError):
            straggler.push(6).result()
        pusher.run(4, 4, sync=False)
        return scenario.verdict(new)


def cut(scenario: Scenario) -> Verdict:
    """Pushes go on while a checkpoint is written; later everything goes back to it."""
    with LocalStore(shards=2, blocks=BLOCKS) as store, store.attach() as new:
        store.create_tables(WORKLOAD.tables())
        new.layout.add(WORKLOAD.tables())
        pusher = scenario.begin(store)
        pusher.run(1, 3, sync=False)
        checkpoint, pushed = str(scenario.folder / "step-3"), threading.Event()
        failpoints.arm(scenario.armed)
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(restore, "write_block", _after(pushed, restore.write_block))
            saved = store.save(checkpoint)
            pusher.run(4, 3, sync=False)
            pushed.set()
            saved.result()
        again = scenario.begin(new, generation=2, step=3)
        new.load(checkpoint)
        again.run(4, 4, sync=False)
        return scenario.verdict(new)


def _after(event: threading.Event, call: Callable) -> Callable:
    def waiting(*arguments: object) -> object:
        assert event.wait(30)
        return call(*arguments)

    return waiting


def seal(scenario: Scenario) -> Verdict:
    """Pushes between a block's last changes and its new owner; without a clock, so that no gate keeps them back."""
    with LocalStore(shards=2, blocks=BLOCKS) as store:
        store.create_tables(WORKLOAD.tables())
        scenario.recorder.write("generation", generation=1, step=0, workers=0)
        pusher = Pusher(store, WORKLOAD, scenario.recorder, client=0, workers=0, generation=1)
        failpoints.arm(scenario.armed)
        moves = [Move(block, 0, 1) for block in range(10)]
        migration = Migration(store.block_map, store.block_map.addresses, moves)
        addresses, step, pushes = store.block_map.addresses, 0, []
        while not migration.ended:
            step += 1
            pushes.append(pusher.push(step))  # after a block's seal it waits for the new owner
            migration.succeeded(
                [
                    store.control_at(addresses[call.shard], call.method, call.arguments)
                    if isinstance(call, Call)
                    else None
                    for call in migration.calls()
                ]
            )
        assert migration.phase is Phase.DONE
        for push in pushes:
            push.result(30)
        return scenario.verdict(store)


def lease(scenario: Scenario) -> Verdict:
    """A shard was replaced on another machine, where nobody could end it; a client has not heard of that yet."""
    old, _ = open_shard(0, BLOCKS, 0, journal=str(scenario.folder / "old"))
    servers = [ShardServer(old)]
    old.set_block_map(BlockMap.initial(BLOCKS, (servers[0].start(),)))
    known: list[BlockMap] = [old.block_map]
    try:
        with StoreClient.connect(servers[0].address, find_map=lambda: known[0]) as store:
            store.create_tables(WORKLOAD.tables())
            pusher = scenario.begin(store)
            pusher.run(1, 3, sync=False)
            old.lease.grant(time.monotonic())
            shutil.copytree(scenario.folder / "old", scenario.folder / "new")
            new, recovery = open_shard(0, BLOCKS, 0, journal=str(scenario.folder / "new"))
            assert recovery is not None
            servers.append(ShardServer(new))
            known[0] = BlockMap(2, old.block_map.owners, (servers[1].start(),))
            new.set_block_map(known[0])
            failpoints.arm(scenario.armed)
            pusher.run(4, 3, sync=False)
        with StoreClient.connect(servers[1].address) as after:
            return scenario.verdict(after)
    finally:
        for server in servers:
            server.stop()


SCENARIOS = {run.__name__: run for run in (ledger, journal, fence, cut, seal, lease)}


def test_every_guard_has_its_scenario() -> None:
    assert set(SCENARIOS) == failpoints.GUARDS


@pytest.mark.parametrize("guard", SCENARIOS)
def test_nothing_is_lost_or_doubled(guard: str, tmp_path: Path) -> None:
    verdict = SCENARIOS[guard](Scenario(tmp_path, ""))
    assert verdict.nothing_lost, verdict
    assert verdict.pushes_acknowledged > 5


@pytest.mark.parametrize("guard", SCENARIOS)
def test_without_its_guard_it_shows(guard: str, tmp_path: Path) -> None:
    verdict = SCENARIOS[guard](Scenario(tmp_path, f"{guard}=skip"))
    assert verdict.rows_lost + verdict.rows_doubled > 0, verdict
