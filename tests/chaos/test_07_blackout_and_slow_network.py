"""The network goes for five seconds, one way or both, or is slow: deadlines name whom, and all goes on by itself."""

from __future__ import annotations

import re
import sys
import time
from pathlib import Path

import numpy as np
import pytest
from embershard.cluster.chaos_pusher import read_items
from embershard.parameter_server.store import StoreError, StoreTimeout

sys.path.insert(0, str(Path(__file__).parent))
from shards import WORKLOAD

pytestmark = [pytest.mark.chaos, pytest.mark.timeout(300)]

SECONDS = 5.0
LATENCY = 0.2
WAYS = {"both": ("requests", "answers"), "requests": ("requests",), "answers": ("answers",)}


@pytest.mark.parametrize("lost", [False, True], ids=["late", "lost"])
@pytest.mark.parametrize("way", WAYS)
def test_five_seconds(shards, way: str, lost: bool) -> None:
    """lost: what was under way never arrives, because the connections end; otherwise it arrives late."""
    group = shards(2, proxied=True)
    with group.connect(timeout=2.0) as impatient, group.pushing():
        read_items(impatient, WORKLOAD)
        for gone in ([1], [0, 1]):
            until = time.monotonic() + SECONDS
            for number in gone:
                for direction in WAYS[way]:
                    getattr(group.proxies[number], direction).clear()
            names = ", ".join(map(str, gone))
            with pytest.raises(StoreTimeout, match=f"pull: no answer from shard {names} within the deadline"):
                read_items(impatient, WORKLOAD)
            address = group.addresses()[1]
            with pytest.raises(StoreError, match=f"shard {re.escape(address)}: statistics failed: DEADLINE_EXCEEDED"):
                impatient.control_at(address, "statistics", {}, 0.5)
            step = group.step
            time.sleep(until - time.monotonic())  # what this is about
            assert group.step == step
            for number in gone:
                if lost:
                    group.proxies[number].cut()
                group.proxies[number].requests.set()
                group.proxies[number].answers.set()
            group.more_steps()
            assert read_items(group.store, WORKLOAD).any()
    verdict = group.verdict()
    assert verdict.nothing_lost, verdict
    assert (verdict.pushes_acknowledged, verdict.pushes_unknown) == (group.step, 0)
    assert verdict.longest_stall_seconds >= SECONDS - 1


def test_slow_is_not_gone(shards) -> None:
    """Nothing is sent twice because an answer takes its time."""
    group = shards(2, proxied=True)
    with group.connect(timeout=10.0) as store:
        group.pusher(store).run(1, 10, sync=False)
        before = read_items(store, WORKLOAD)
        for proxy in group.proxies:
            proxy.delay = LATENCY
        began = time.monotonic()
        group.pusher(store).run(11, 10, sync=False)
        assert time.monotonic() - began > 10 * 2 * LATENCY
        assert (read_items(store, WORKLOAD) != before).any()
        assert store.counters.retries == 0
        np.testing.assert_array_equal([s["duplicates"] for s in group.store.statistics()], 0)
    group.step = 20
    verdict = group.verdict()
    assert verdict.nothing_lost, verdict
    assert (verdict.pushes_acknowledged, verdict.pushes_unknown) == (20, 0)
