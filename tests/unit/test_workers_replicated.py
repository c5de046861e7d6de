"""Placement `replicated`: workers on threads, each with all tables, against workers over shards."""

from __future__ import annotations

import sys
import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from embershard.parameter_server.requests import Clock
from embershard.parameter_server.store import Store, StoreError
from embershard.workers.learner import Learner
from embershard.workers.optimizers import DenseConfig, OptimizerConfig, SparseConfig
from embershard.workers.replicated import ReplicatedStore

sys.path.insert(0, str(Path(__file__).parents[1] / "oracles"))
from workers_cases import batches, network, share, tables

# Three: a sum of two numbers is the same in either order.
WORKERS, STEPS, ROWS = 3, 6, 24
# The dense part stays as it is: no DistributedDataParallel adds its gradients between threads.
CONFIG = OptimizerConfig(
    sparse=SparseConfig(kind="rowwise_adagrad", learning_rate=0.1), dense=DenseConfig(kind="sgd", learning_rate=1e-30)
)


class Meeting:
    """An exchange between threads: everybody's bytes, once all have come."""

    def __init__(self) -> None:
        self._barrier = threading.Barrier(WORKERS, timeout=60)
        self._own: list[Any] = [None] * WORKERS

    def of(self, rank: int) -> Callable[[np.ndarray], list[np.ndarray]]:
        def exchange(own: np.ndarray) -> list[np.ndarray]:
            self._own[rank] = own.copy()
            self._barrier.wait()
            every = list(self._own)
            self._barrier.wait()
            return every

        return exchange


def work(store: Store, rank: int, workers: int, sync: bool, first: int = 1, last: int = STEPS) -> list[np.ndarray]:
    """Trains this rank's share; in `bounded` one step at a time, so that what a pull sees depends on no race."""
    net = network(store, sparse="rowwise_adagrad")
    learner = Learner(net, CONFIG, total_steps=STEPS)
    for step, batch in enumerate(batches(STEPS, ROWS), 1):
        if first <= step <= last:
            clock = Clock(1, step, rank, workers, 0, sync)
            own = share(batch, rank, workers)
            learner.step(own, net.embeddings.prefetch(own.ids, clock), clock)
    net.embeddings.drain()
    return tables(net.embeddings)


def replicated(sync: bool, stores: list[ReplicatedStore], **steps: int) -> list[list[np.ndarray]]:
    for store in stores:
        network(store, sparse="rowwise_adagrad")
        store.begin(1, WORKERS, steps.get("first", 1) - 1)
    with ThreadPoolExecutor(WORKERS) as threads:
        return list(threads.map(lambda rank: work(stores[rank], rank, WORKERS, sync, **steps), range(WORKERS)))


def sharded(shards: int) -> list[np.ndarray]:
    with Store.open(shards=shards, blocks=40, seed=5) as store:
        network(store, sparse="rowwise_adagrad")
        store.begin(1, WORKERS, 0)
        views = [store.attach() for _ in range(WORKERS)]
        with ThreadPoolExecutor(WORKERS) as threads:
            found, *_ = threads.map(lambda rank: work(views[rank], rank, WORKERS, True), range(WORKERS))
            return found


def open_stores() -> list[ReplicatedStore]:
    meeting = Meeting()
    return [ReplicatedStore(blocks=40, seed=5, exchange=meeting.of(rank)) for rank in range(WORKERS)]


@pytest.mark.parametrize("sync", [True, False])
def test_every_worker_holds_the_same_tables_and_in_sync_those_of_shards(sync: bool) -> None:
    stores = open_stores()
    one, *others = replicated(sync, stores)
    assert all(np.array_equal(a, b) for other in others for a, b in zip(one, other, strict=True))
    if sync:
        assert all(np.array_equal(a, b) for a, b in zip(one, sharded(3), strict=True))
    assert all(store.counters.wire_bytes > 0 and store.counters.rows_pushed > 0 for store in stores)
    for store in stores:
        store.close()


def test_alone_it_is_a_store_in_this_process() -> None:
    with ReplicatedStore(blocks=40, seed=5) as store, Store.open(shards=2, blocks=40, seed=5) as other:
        found = []
        for each in (store, other):
            network(each, sparse="rowwise_adagrad")
            each.begin(1, 1, 0)
            found.append(work(each, 0, 1, True))
        assert all(np.array_equal(a, b) for a, b in zip(*found, strict=True))
        assert store.counters.wire_bytes == 0


def test_a_run_goes_on_from_a_checkpoint_of_the_other_placement(tmp_path: Path) -> None:
    whole = sharded(1)
    stores = open_stores()
    replicated(True, stores, last=3)
    stores[0].save(str(tmp_path / "half"), step=3).result()
    with Store.open(shards=3, blocks=40, seed=5) as shards:
        network(shards, sparse="rowwise_adagrad")
        shards.load(str(tmp_path / "half"))
        shards.begin(1, WORKERS, 3)
        views = [shards.attach() for _ in range(WORKERS)]
        with ThreadPoolExecutor(WORKERS) as threads:
            rest = list(threads.map(lambda rank: work(views[rank], rank, WORKERS, True, first=4), range(WORKERS)))
        assert all(np.array_equal(a, b) for a, b in zip(rest[0], whole, strict=True))
        shards.save(str(tmp_path / "end"), step=STEPS).result()
    again = open_stores()
    for store in again:
        network(store, sparse="rowwise_adagrad")
        store.load(str(tmp_path / "end"))
        assert all(np.array_equal(a, b) for a, b in zip(tables(network(store).embeddings), whole, strict=True))
    for store in stores + again:
        store.close()


def test_a_refused_push_fails_its_future() -> None:
    with ReplicatedStore(blocks=40) as store:
        net = network(store)
        store.begin(1, 1, 0)
        batch = batches(1, 4)[0]
        net.embeddings(net.embeddings.prefetch(batch.ids)).sum().backward()
        with pytest.raises(StoreError, match="generation 1 is running"):
            net.embeddings.step(clock=Clock(7, 1, sync=True))
            net.embeddings.drain()
