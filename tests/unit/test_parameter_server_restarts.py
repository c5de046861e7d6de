"""What a shard does while its coordinator is silent, and when the workers begin again: leases, reset, cuts given up."""

from __future__ import annotations

import threading
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest
from embershard.parameter_server import failpoints, restore
from embershard.parameter_server.administration import Administration
from embershard.parameter_server.blocks import BlockMap
from embershard.parameter_server.lease import Lease
from embershard.parameter_server.local import LocalStore
from embershard.parameter_server.requests import LATER, Clock, PullReply, PullRequest, PushReply, PushRequest, RowSet
from embershard.parameter_server.shard import Shard
from embershard.parameter_server.store import BusyError, StoreError, StoreTimeout
from embershard.parameter_server.tables import Layout, Optimizer, TableSpec

BLOCKS = 20
SPECS = [
    TableSpec(name="a", rows=60, width=4, optimizer=Optimizer(kind="adam")),
    TableSpec(name="b", rows=30, width=2, optimizer=Optimizer(kind="sgd")),
]


class Now:
    seconds = 0.0

    def __call__(self) -> float:
        return self.seconds


def make_shard(now: Now | None = None) -> Shard:
    shard = Shard(0, Layout(BLOCKS, 1))
    shard.set_block_map(BlockMap.initial(BLOCKS, ("x",)))
    shard.create_tables(SPECS)
    if now is not None:
        shard.lease = Lease(now)
    return shard


def every_row(shard: Shard) -> list[RowSet]:
    blocks = np.arange(BLOCKS, dtype=np.uint16)
    return [
        RowSet(
            slab.id,
            np.arange(BLOCKS * slab.rows_per_block, dtype=np.uint32),
            blocks,
            np.full(BLOCKS, slab.rows_per_block, np.uint32),
        )
        for slab in shard.layout.slabs
    ]


def push(shard: Shard, sequence: int, clock: Clock | None = None) -> object:
    parts = every_row(shard)
    grads = [np.ones((len(part.index), shard.layout.slabs[part.slab].width), np.float32) for part in parts]
    (done,) = shard.push(PushRequest(7, sequence, parts, grads, [1.0] * len(parts), clock), "push", 0.0)
    return done.reply


def pull(shard: Shard, clock: Clock | None = None) -> object:
    (done,) = shard.pull(PullRequest(every_row(shard), clock), "pull", 0.0)
    return done.reply


def contents(shard: Shard) -> list[dict[str, np.ndarray]]:
    return [shard.export_block(block) for block in range(BLOCKS)]


def assert_same(one: list[dict[str, np.ndarray]], other: list[dict[str, np.ndarray]]) -> None:
    for mine, theirs in zip(one, other, strict=True):
        assert mine.keys() == theirs.keys()
        for name in mine:
            np.testing.assert_array_equal(mine[name], theirs[name])


def test_a_lease_without_grants_never_ends_and_an_overtaken_grant_does_not_shorten_it() -> None:
    now = Now()
    lease = Lease(now)
    now.seconds = 1e9
    assert not lease.ended
    lease.grant(now.seconds + 30)
    lease.grant(now.seconds + 10)
    now.seconds += 29.9
    assert not lease.ended
    now.seconds += 0.1
    assert lease.ended


@pytest.mark.parametrize("sync", [False, True])
def test_after_its_lease_a_shard_neither_reads_nor_applies_nor_counts_a_step(sync: bool) -> None:
    now = Now()
    shard = make_shard(now)
    shard.begin(1, 1, 0)
    shard.lease.grant(30.0)
    assert isinstance(push(shard, 1, Clock(1, 1, sync=sync)), PushReply)
    before = contents(shard)
    now.seconds = 30.0
    for reply in (push(shard, 2, Clock(1, 2, sync=sync)), push(shard, 3), pull(shard), pull(shard, Clock(1, 2))):
        assert reply.code == LATER
    assert_same(contents(shard), before)
    assert (shard.clocks.step, shard.statistics()["lease_ended"]) == (1, 4)
    shard.lease.grant(60.0)
    assert isinstance(push(shard, 2, Clock(1, 2, sync=sync)), PushReply)
    assert shard.clocks.step == 2
    assert isinstance(pull(shard, Clock(1, 3)), PullReply)


@pytest.mark.parametrize("sync", [False, True])
def test_a_push_during_which_the_lease_ends_is_not_acknowledged_nor_read(sync: bool) -> None:
    """As when the process is stopped in the middle: by the time it goes on, another may have its blocks."""
    now = Now()
    shard = make_shard(now)
    shard.begin(1, 1, 0)
    shard.lease.grant(30.0)
    ahead = Clock(1, 2, sync=sync)
    assert shard.pull(PullRequest(every_row(shard), ahead), "pull", 0.0) == []

    class Journal:
        def append(self, *_: object) -> None:
            now.seconds = 30.0

    shard.journal = Journal()
    request = PushRequest(7, 1, [], [], [], Clock(1, 1, sync=sync))
    assert [done.reply.code for done in shard.push(request, "push", 0.0)] == [LATER, LATER]  # and the pull behind it
    shard.journal = None
    shard.lease.grant(60.0)
    (done,) = shard.push(request, "again", 0.0)
    assert isinstance(done.reply, PushReply)
    assert shard.statistics()["lease_ended"] == 2


def test_after_its_lease_a_shard_only_says_what_it_knows_and_hears_what_was_decided(tmp_path: Path) -> None:
    now = Now()
    shard = make_shard(now)
    shard.lease.grant(30.0)
    administration = Administration(shard, lambda completed: None, lambda *_, **__: [])
    cut = administration.mark(1)
    now.seconds = 30.0
    refused = {
        "mark": {"epoch": 1},
        "write": {"cut": cut, "directory": str(tmp_path)},
        "load": {"directory": str(tmp_path), "tables": {}, "epoch": 1},
        "reset": {"epoch": 1},
        "begin": {"generation": 1, "workers": 1, "step": 0},
        "create_tables": {"tables": []},
        "close_gate": {"after": 0, "lag": 0, "seconds": 1.0},
    }
    for method, arguments in refused.items():
        with pytest.raises(BusyError, match=f"shard 0: its lease has ended: {method} has to wait"):
            administration.call(method, arguments)
    assert list(tmp_path.iterdir()) == []
    assert administration.call("describe", {})["epoch"] == 1
    administration.call("set_block_map", {"epoch": 2, "owners": [0] * BLOCKS, "addresses": ["x"]})
    shard.lease.grant(60.0)
    assert len(administration.call("write", {"cut": cut, "directory": str(tmp_path)})) == BLOCKS


def test_the_deadline_says_why_a_call_was_sent_again() -> None:
    with LocalStore(shards=2, blocks=BLOCKS) as store:
        store.create_tables(SPECS)
        store.timeout = 0.2
        store.members[1].lease.grant(0.0)
        with pytest.raises(StoreTimeout, match=r"no answer from shard 1 within .*\(shard 1: its lease has ended\)"):
            store.pull(every_row(store.members[0])).result()


def test_without_the_guard_a_shard_whose_lease_has_ended_goes_on() -> None:
    now = Now()
    shard = make_shard(now)
    shard.lease.grant(30.0)
    now.seconds = 31.0
    failpoints.arm("lease=skip")
    try:
        assert isinstance(push(shard, 1), PushReply)
    finally:
        failpoints.arm("")


def test_reset_is_as_if_tables_had_just_been_created() -> None:
    shard = make_shard()
    assert isinstance(push(shard, 1), PushReply)
    shard.reset()
    assert_same(contents(shard), contents(make_shard()))
    assert len(shard.ledger) == 0
    reply = push(shard, 1)
    assert not any(statuses.any() for statuses in reply.statuses)  # all APPLIED: the same number counts as new


def test_reset_waits_for_a_cut() -> None:
    shard = make_shard()
    push(shard, 1)
    before = contents(shard)
    with shard.mark(), pytest.raises(StoreError, match="not in the checkpoint yet"):
        shard.reset()
    assert_same(contents(shard), before)


def test_a_new_generation_gives_up_the_cuts_of_the_old_one(tmp_path: Path) -> None:
    """Their writer is gone; a load or another cut must not wait for it."""
    shard = make_shard()
    administration = Administration(shard, lambda completed: None, lambda *_, **__: [])
    administration.begin(1, 1, 0)
    cut = administration.mark(1)
    administration.begin(1, 1, 0)  # the running generation again: nothing changes
    assert len(administration.write(cut, str(tmp_path / "one"))) == BLOCKS
    cut = administration.mark(1)
    administration.begin(2, 1, 0)
    shard.reset()
    with pytest.raises(StoreError, match="given up"):
        administration.write(cut, str(tmp_path / "two"))
    administration.write(administration.mark(1), str(tmp_path / "three"))


def test_a_cut_that_nobody_came_to_write_is_given_up_by_the_next() -> None:
    shard = make_shard()
    administration = Administration(shard, lambda completed: None, lambda *_, **__: [])
    first, second = administration.mark(1), administration.mark(1)
    assert first != second


def test_a_load_that_is_asked_for_again_waits_for_the_first(monkeypatch: pytest.MonkeyPatch) -> None:
    """Its caller takes the connection for broken; it must not undo what is pushed after the second one's answer."""
    together = threading.Barrier(2)

    def load(*_: object) -> dict[str, list[str]]:
        with pytest.raises(threading.BrokenBarrierError):
            together.wait(0.1)
        return {}

    monkeypatch.setattr(restore, "load_blocks", load)
    administration = Administration(make_shard(), lambda completed: None, lambda *_, **__: [])
    with ThreadPoolExecutor(2) as pool:
        for call in [pool.submit(administration.load, "anywhere", {}, 1) for _ in range(2)]:
            assert call.result() == {}
