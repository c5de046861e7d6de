"""Shards join and leave over real gRPC while workers train and checkpoints are written: every push counts once."""

from __future__ import annotations

import sys
import threading
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
from embershard.cluster.rescale import Rescale, RescaleError
from embershard.parameter_server import checkpoint
from embershard.parameter_server.blocks import BlockMap
from embershard.parameter_server.client import StoreClient
from embershard.parameter_server.kernels import locate
from embershard.parameter_server.requests import Clock
from embershard.parameter_server.server import ShardServer
from embershard.parameter_server.shard import Shard
from embershard.parameter_server.tables import Layout

sys.path.insert(0, str(Path(__file__).parent))
from exact import exact_table

ROWS, WIDTH, BLOCKS, WORKERS = 20_000, 4, 60, 2
TABLE = exact_table(ROWS, WIDTH)


class Cluster:
    """Servers that come and go, and the block map that was written last."""

    def __init__(self, shards: int) -> None:
        self.servers: list[ShardServer] = []
        self.grow(shards)
        self.block_map = BlockMap.initial(BLOCKS, tuple(self.addresses()))
        for server in self.servers:
            server.shard.set_block_map(self.block_map)

    def addresses(self) -> list[str]:
        return [server.address for server in self.servers]

    def grow(self, shards: int) -> None:
        while len(self.servers) < shards:
            server = ShardServer(Shard(len(self.servers), Layout(BLOCKS)))
            server.start()
            if (
                self.servers
            ):  # as the coordinator does: a new shard knows where the others are, and that it owns nothing
                server.shard.set_block_map(self.block_map)
            self.servers.append(server)

    def shrink(self, shards: int) -> None:
        for server in self.servers[shards:]:
            server.stop()
        del self.servers[shards:]

    def connect(self) -> StoreClient:
        return StoreClient.connect(self.addresses(), timeout=30.0, find_map=lambda: self.block_map)

    def commit(self, block_map: BlockMap) -> None:
        self.block_map = block_map

    def scale(self, store: StoreClient, shards: int) -> dict[str, float]:
        self.grow(shards)
        result = Rescale(store, self.addresses, self.commit, group_bytes=100_000).run(shards)
        self.shrink(shards)
        return result


@pytest.fixture
def cluster() -> Iterator[Cluster]:
    cluster = Cluster(1)
    yield cluster
    cluster.shrink(0)


class Worker(threading.Thread):
    """Pulls `lag` steps ahead and pushes as the training loop does; in step with the others by a barrier."""

    def __init__(self, cluster: Cluster, rank: int, sync: bool, barrier: threading.Barrier, stop: list[bool]) -> None:
        super().__init__(daemon=True)
        self.store = cluster.connect()
        self.rank, self.sync, self.barrier, self.stop = rank, sync, barrier, stop
        self.model = np.zeros((ROWS, WIDTH), np.float32)
        self.error: BaseException | None = None
        self.steps = 0
        self.stepped = threading.Event()

    def run(self) -> None:
        try:
            self._train()
        except BaseException as error:
            self.error = error
            self.barrier.abort()

    def _train(self) -> None:
        generator = np.random.default_rng(self.rank)
        ahead = self._pull(generator, 1)
        while True:
            self.steps += 1
            self.stepped.set()
            self.barrier.wait()  # stands for the all-reduce between the workers
            if self.stop[0]:
                break
            rows, pulled = ahead
            pulled.result()
            if not self.sync:  # the pull ahead is answered before the push, as in `workers.pipeline`
                ahead = self._pull(generator, self.steps + 1)
                ahead[1].result()
            self._push(generator, rows)
            if self.sync:
                ahead = self._pull(generator, self.steps + 1)
        self.store.close()

    def _clock(self, step: int) -> Clock:
        return Clock(1, step, self.rank, WORKERS, 0 if self.sync else 1, self.sync)

    def _located(self, rows: np.ndarray):
        slab = self.store.layout.slabs[0]
        return locate(slab, np.zeros(1, np.int32), np.array([0, len(rows)]), rows, self.store.block_map.rank())

    def _pull(self, generator: np.random.Generator, step: int):
        rows = np.unique(generator.integers(0, ROWS, 500))
        return rows, self.store.pull([self._located(rows)[0]], self._clock(step))

    def _push(self, generator: np.random.Generator, rows: np.ndarray) -> None:
        part, inverse = self._located(rows)
        grads = generator.integers(-3, 4, (len(rows), WIDTH)).astype(np.float32)
        self.model[rows] -= grads[inverse]
        self.store.push([part], [grads], [1.0], self._clock(self.steps)).result()


def every_row(store: StoreClient):
    rank = store.block_map.rank()
    return locate(store.layout.slabs[0], np.zeros(1, np.int32), np.array([0, ROWS]), np.arange(ROWS), rank)


@pytest.mark.parametrize("sync", [False, True], ids=["bounded", "sync"])
def test_shards_join_and_leave_while_workers_train(cluster: Cluster, sync: bool, tmp_path: Path) -> None:
    with cluster.connect() as store:
        store.create_tables([TABLE])
        store.begin(1, WORKERS, 0)
        asked, stop = threading.Event(), [False]
        # Decided once for all workers, while they all stand at the barrier.
        barrier = threading.Barrier(WORKERS, action=lambda: stop.__setitem__(0, asked.is_set()))
        workers = [Worker(cluster, rank, sync, barrier, stop) for rank in range(WORKERS)]
        for worker in workers:
            worker.start()
        saved = store.save(str(tmp_path / "cut"))  # its cut and the moves get out of each other's way
        for shards in (3, 2, 4):
            result = cluster.scale(store, shards)
            assert result["blocks_moved"] == {3: 40, 2: 20, 4: 30}[shards]
            assert np.bincount(store.block_map.owners).tolist() == [BLOCKS // shards] * shards
            for worker in workers:  # steps with the new map
                for _ in range(3):
                    worker.stepped.clear()
                    worker.stepped.wait(10)
        asked.set()
        for worker in workers:
            worker.join(30)
            assert worker.error is None, worker.error
        saved.result()
        assert checkpoint.verify(str(tmp_path / "cut")) == []
        part, inverse = every_row(store)
        np.testing.assert_array_equal(store.pull([part]).result()[0][inverse], sum(worker.model for worker in workers))
        assert sum(worker.store.counters.moved for worker in workers) > 0
        assert [s["clients"] for s in store.statistics()] == [WORKERS] * 4


def test_a_tool_with_a_map_of_long_ago_finds_every_row(cluster: Cluster) -> None:
    """The map in its hands names shards that are gone and none that are there; it asks no shard more than it must."""
    old = cluster.connect()
    with cluster.connect() as store:
        store.create_tables([TABLE])
        old.layout.add([TABLE])
        for shards in (3, 2):
            cluster.scale(store, shards)
        part, _ = every_row(old)
        with old:
            old.push([part], [np.ones((ROWS, WIDTH), np.float32)], [1.0]).result()
            assert (old.pull([part]).result()[0] == -1).all()
            assert old.counters.moved <= 2 * BLOCKS
            assert old.block_map.epoch == store.block_map.epoch


@pytest.mark.parametrize("written", [False, True], ids=["before it is written", "and its answer is lost"])
def test_scaling_that_is_given_up_at_a_commit_leaves_one_owner(cluster: Cluster, written: bool) -> None:
    """With the write of the map failing at the same moment, and done all the same or not."""
    commits: list[BlockMap] = []

    def commit(block_map: BlockMap) -> None:
        commits.append(block_map)
        if len(commits) == 3:
            move.give_up()
            if written:
                cluster.commit(block_map)
            raise OSError("the head does not answer")
        cluster.commit(block_map)

    with cluster.connect() as store:
        store.create_tables([TABLE])
        cluster.grow(3)
        move = Rescale(store, cluster.addresses, commit, group_bytes=100_000)
        with pytest.raises(RescaleError, match="given up"):
            move.run(3)
        # The map of the third commit moved blocks; the fourth is the one before, and the one that is in force.
        assert commits[3] is cluster.block_map and cluster.block_map.epoch == commits[1].epoch
        owned = [set(np.flatnonzero(server.shard._served).tolist()) for server in cluster.servers]
        assert owned == [set(np.flatnonzero(cluster.block_map.owners == shard).tolist()) for shard in range(3)]
        part, _ = every_row(store)
        store.push([part], [np.ones((ROWS, WIDTH), np.float32)], [1.0]).result()
        cluster.scale(store, 3)
        assert np.bincount(store.block_map.owners).tolist() == [BLOCKS // 3] * 3
        part, _ = every_row(store)
        assert (store.pull([part]).result()[0] == -1).all()


def test_a_shard_that_joined_and_got_no_block_leaves_again(cluster: Cluster) -> None:
    """As after a rescale that was given up between the two."""
    with cluster.connect() as store:
        store.create_tables([TABLE])
        cluster.grow(3)
        Rescale(store, cluster.addresses, cluster.commit).join(3)
        assert store.shards == 3 and np.bincount(store.block_map.owners).tolist() == [BLOCKS]
        cluster.scale(store, 2)
        assert store.shards == 2 and np.bincount(store.block_map.owners).tolist() == [BLOCKS // 2] * 2
