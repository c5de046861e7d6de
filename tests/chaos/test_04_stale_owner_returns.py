"""An owner is stopped past its lease, another serves its blocks, and it returns: it changes nothing any more."""

from __future__ import annotations

import os
import signal
import sys
import time
from pathlib import Path

import numpy as np
import pytest
from embershard.cluster.liveness import MARGIN_SECONDS
from embershard.parameter_server.client import StoreClient
from embershard.parameter_server.requests import RowSet
from embershard.parameter_server.store import BusyError, FencedError, StoreTimeout

sys.path.insert(0, str(Path(__file__).parent))
from ray_shard import TOKEN
from shards import WORKLOAD

pytestmark = [pytest.mark.chaos, pytest.mark.timeout(300)]

LEASE_SECONDS = 4.0
OWNER = 0


def stop_past_its_lease(group, point: str = "") -> None:
    """At a stage of its next push, or anywhere; returns when another may serve its blocks."""
    until = time.monotonic() + LEASE_SECONDS
    group.processes[OWNER].grant_lease(until)
    if point:
        group.arm(OWNER, f"{point}=stop")
        group.wait_until(lambda: group.is_stopped(OWNER), "the stop", LEASE_SECONDS)
    else:
        group.stop(OWNER)
    time.sleep(max(0.0, until + MARGIN_SECONDS - time.monotonic()))  # what this is about


def assert_it_refuses_everything(address: str) -> None:
    """Even to those who have heard of nobody else."""
    with StoreClient.connect(address, timeout=3.0, token=TOKEN) as stale:
        block = int(np.flatnonzero(stale.block_map.owners == OWNER)[0])
        slab = stale.layout.slabs[0]
        row = np.array([block * slab.rows_per_block], slab.index_dtype)
        part = RowSet(0, row, np.array([block], np.uint16), np.ones(1, np.uint32))
        with pytest.raises(StoreTimeout, match=rf"pull: no answer from shard {OWNER} .*its lease has ended"):
            stale.pull([part]).result()
        with pytest.raises(StoreTimeout, match=rf"push: no answer from shard {OWNER} .*its lease has ended"):
            stale.push([part], [np.ones((1, slab.width), np.float32)], [1.0]).result()
        epoch = {"epoch": stale.block_map.epoch}
        for method, arguments in (
            ("mark", epoch),
            ("load", {"directory": "anywhere", "tables": {}, **epoch}),
            ("reset", epoch),
            ("begin", {"generation": 9, "workers": 1, "step": 0}),
        ):
            with pytest.raises(BusyError, match="its lease has ended"):
                stale.control_at(address, method, arguments)
        assert stale.control_at(address, "statistics", {})["lease_ended"] > 2


def files(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


@pytest.mark.parametrize("point", ["", "push.checked", "push.journalled", "push.applied"])
def test_its_journal_was_repeated_elsewhere(shards, point: str) -> None:
    """As when its disk came along. What it was about to acknowledge when it was stopped it must not, any more."""
    group = shards(2)
    with group.pushing():
        group.more_steps()
        stop_past_its_lease(group, point)
        old = group.replace(OWNER, journal=True)
        journal = files(group.folder / f"shard-{OWNER}")
        os.kill(old.pid, signal.SIGCONT)
        group.more_steps()  # the worker has heard of the new one, from the old one's refusal
        assert_it_refuses_everything(old.address)
        if point != "push.checked":  # stopped right before it wrote, it writes; nobody reads that
            assert files(group.folder / f"shard-{OWNER}") == journal
    assert group.block_map().epoch == 2
    verdict = group.verdict()
    assert verdict.nothing_lost, verdict
    assert verdict.pushes_unknown == 0


def test_it_never_returns(shards) -> None:
    """As when its machine vanished: nobody ends its connections, and the worker goes on at the new one all the same."""
    group = shards(2)
    with group.pushing():
        group.more_steps()
        stop_past_its_lease(group)
        group.replace(OWNER, journal=True)
        group.more_steps()
    verdict = group.verdict()
    print(f"\nvanished: {verdict.longest_stall_seconds} s without an acknowledgement", file=sys.stderr)
    assert verdict.nothing_lost, verdict
    assert verdict.longest_stall_seconds < 40  # of `store.timeout`'s 60


def test_all_went_back_to_the_last_checkpoint(shards) -> None:
    """As when its machine is gone. Its workers live on, too, and would write a checkpoint of the same step."""
    group = shards(1)
    checkpoints = group.folder / "checkpoints"
    with group.pushing():
        group.more_steps()
    at = group.step
    group.store.save(str(checkpoints / "step-1"), step=at).result()
    with group.pushing():  # acknowledged, and undone
        group.more_steps()
    with group.connect(timeout=5.0) as old_worker:
        straggler = group.pusher(old_worker)
        stop_past_its_lease(group)
        old = group.replace(OWNER, journal=False)
        group.store.create_tables(WORKLOAD.tables())
        group.begin(generation=2, step=at)
        group.store.load(str(checkpoints / "step-1"))
        with group.pushing():
            group.more_steps()
        group.store.save(str(checkpoints / "step-2"), step=group.step).result()
        before = files(checkpoints), files(group.folder / f"shard-{OWNER}")
        os.kill(old.pid, signal.SIGCONT)
        with pytest.raises(StoreTimeout, match="its lease has ended: mark has to wait"):
            old_worker.save(str(checkpoints / "step-2"), step=group.step)
        assert_it_refuses_everything(old.address)
        assert (files(checkpoints), files(group.folder / f"shard-{OWNER}")) == before
        with pytest.raises(FencedError, match="generation 2 is running"):
            straggler.push(group.step + 1).result()  # it asked, and was sent to the new one
    verdict = group.verdict()
    assert verdict.nothing_lost, verdict
    assert verdict.pushes_undone > 0
