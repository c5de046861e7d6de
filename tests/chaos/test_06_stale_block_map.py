"""Clients with a block map of long ago: at most two redirections per call, and no storm while nobody serves a block."""

from __future__ import annotations

import signal
import sys
import threading
import time
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
from embershard.cluster.chaos_pusher import Pusher, read_items
from embershard.parameter_server.client import StoreClient
from embershard.parameter_server.sharded import RETRY_SECONDS

sys.path.insert(0, str(Path(__file__).parent))
from ray_shard import TOKEN
from shards import WORKLOAD

pytestmark = [pytest.mark.chaos, pytest.mark.timeout(300)]

CLIENTS = 6


class Counting(StoreClient):
    """Counts the messages to each shard, and how often a block's part of the calls since `forget` was sent."""

    def __init__(self, *arguments: Any) -> None:
        super().__init__(*arguments)
        self._counting = threading.Lock()
        self.forget()

    def forget(self) -> None:
        self.messages: Counter[int] = Counter()
        self._sent: Counter[tuple[int, int]] = Counter()

    @property
    def redirections(self) -> int:
        """Of the block that was sent on most often, if there was one call since `forget`."""
        return max(self._sent.values()) - 1

    def _send(self, shard: int, request: Any, *arguments: Any) -> None:
        with self._counting:
            self.messages[shard] += 1
            self._sent.update((part.slab, block) for part in request.parts for block in part.blocks.tolist())
        super()._send(shard, request, *arguments)


def connect(group) -> list[tuple[Counting, Pusher]]:
    """Tools: without a clock, and without a coordinator to ask. Clients of a history have numbers of their own."""
    stores = [Counting.connect(group.addresses(), token=TOKEN) for _ in range(CLIENTS)]
    return [
        (store, Pusher(store, WORKLOAD, group.recorder, client=1 + i, workers=0, generation=1))
        for i, store in enumerate(stores)
    ]


def test_a_map_of_long_ago(shards) -> None:
    group = shards(2)
    clients = connect(group)
    with group.pushing():
        for count in (5, 2, 4, 3):
            group.rescale(count)
        group.more_steps()
    assert group.block_map().epoch > 6
    for number, (store, pusher) in enumerate(clients):
        assert store.block_map.epoch == 1
        if number % 2:  # some begin with a pull, some with a push
            read_items(store, WORKLOAD)
        else:
            pusher.push(1).result()
        assert 1 <= store.redirections <= 2
        assert store.messages.total() <= 2 + 2 * 3  # the two that it knew, and of each of them to the three there are
        for step in (2, 3):
            store.forget()
            pusher.push(step).result()
            assert store.redirections == 0
            assert store.messages.total() <= 3
        assert store.counters.retries == 0
        store.close()
    verdict = group.verdict()
    assert verdict.nothing_lost, verdict


def test_while_nobody_serves_a_block(shards) -> None:
    """The coordinator dies between writing the new map and telling it: sealed there, and not yet served here."""
    group = shards(2, spare=1)
    with group.connect() as store:
        group.pusher(store).run(1, 10, sync=False)
    clients = connect(group)
    coordinator = group.coordinator(3, "move.committed=kill:2")
    coordinator.join(120)
    assert coordinator.exitcode == -signal.SIGKILL
    began = time.monotonic()
    pushes = [pusher.push(1) for _, pusher in clients]
    group.wait_until(lambda: all(store.messages.total() > 20 for store, _ in clients), "some patience")
    for store, _ in clients:
        seconds = time.monotonic() - began
        assert store.messages[2] == 0  # nobody plays ping-pong: who has the block's rows knows where they are
        assert store.messages.total() <= 2 * (seconds / RETRY_SECONDS + 1)
    assert not any(push.done() for push in pushes)
    group.settle()
    for push in pushes:
        push.result()
    for store, pusher in clients:
        store.forget()
        pusher.push(2).result()
        assert store.redirections == 0
        store.close()
    verdict = group.verdict()
    assert verdict.nothing_lost, verdict
