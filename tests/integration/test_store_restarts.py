"""Over real gRPC: a worker of the past that still lives, a shard whose lease has ended, a shard at a new address."""

from __future__ import annotations

import sys
import time
from pathlib import Path

import numpy as np
import pytest
from embershard.parameter_server.blocks import BlockMap
from embershard.parameter_server.client import CLIENT_OPTIONS, StoreClient
from embershard.parameter_server.kernels import locate
from embershard.parameter_server.requests import Clock
from embershard.parameter_server.server import SERVER_OPTIONS, ShardServer
from embershard.parameter_server.shard import Shard
from embershard.parameter_server.store import FencedError
from embershard.parameter_server.tables import Layout

sys.path.insert(0, str(Path(__file__).parent))
from exact import exact_table
from proxy import Proxy

ROWS, WIDTH, BLOCKS = 100, 2, 40
TABLE = exact_table(ROWS, WIDTH)


class Servers:
    """Two shards in this process that listen on loopback."""

    def __init__(self) -> None:
        self.shards = [Shard(i, Layout(BLOCKS)) for i in range(2)]
        self.servers = [ShardServer(shard) for shard in self.shards]
        self.announce(1)

    def announce(self, epoch: int) -> BlockMap:
        addresses = tuple(server.address if server.port else server.start() for server in self.servers)
        block_map = BlockMap(epoch, BlockMap.initial(BLOCKS, addresses).owners, addresses)
        for shard in self.shards:
            shard.set_block_map(block_map)
        return block_map

    def close(self) -> None:
        for server in self.servers:
            server.stop()


@pytest.fixture
def quick_pings(monkeypatch: pytest.MonkeyPatch) -> None:
    """Every option of pings at a tenth of its time, and servers that are strict about pings that come too often."""

    def quick(options: list[tuple[str, int]]) -> list[tuple[str, int]]:
        return [(name, value // 10 if "keepalive" in name or "ping_" in name else value) for name, value in options]

    strict = [*quick(SERVER_OPTIONS), ("grpc.http2.max_ping_strikes", 1)]
    monkeypatch.setattr("embershard.parameter_server.client.CLIENT_OPTIONS", quick(CLIENT_OPTIONS))
    monkeypatch.setattr("embershard.parameter_server.server.SERVER_OPTIONS", strict)


@pytest.fixture
def servers():
    servers = Servers()
    yield servers
    servers.close()


def subtract_one(store: StoreClient, clock: Clock | None = None):
    """A push that lowers every element of the table by one."""
    slab = store.layout.slabs[0]
    part, _ = locate(
        slab, np.zeros(1, np.int32), np.array([0, ROWS]), np.arange(ROWS), np.arange(BLOCKS, dtype=np.uint16)
    )
    order = np.argsort(store.block_map.owners[part.blocks], kind="stable")
    assert (order == np.arange(len(order))).all()
    return store.push([part], [np.ones((ROWS, WIDTH), np.float32)], [1.0], clock)


def value(servers: Servers) -> float:
    """The one value that every element of the table has."""
    values = {
        float(element)
        for shard in servers.shards
        for block in np.flatnonzero(shard.block_map.owned_by(shard.number)).tolist()
        for element in shard.export_block(block)["items/weight"].reshape(-1)
    }
    assert len(values) == 1, f"{values}: a push was applied in part"
    return values.pop()


def test_a_worker_of_the_past_changes_nothing(servers: Servers, tmp_path: Path) -> None:
    """It pushes before, while and after the next generation goes back to the beginning, and would go back itself."""
    with StoreClient.connect(servers.announce(2).addresses[0]) as old:
        old.create_tables([TABLE])
        old.begin(1, 1, 0)
        subtract_one(old, Clock(1, 1)).result()
        assert value(servers) == -1
        with StoreClient.connect(servers.announce(3).addresses[0]) as new:
            new.begin(2, 1, 0)
            late = subtract_one(old, Clock(1, 2))
            new.reset()
            subtract_one(new, Clock(2, 1)).result()
            with pytest.raises(FencedError, match="generation 2 is running"):
                late.result()
            with pytest.raises(FencedError):
                subtract_one(old, Clock(1, 3)).result()
            cut = new.save(str(tmp_path / "new"))
            for action in (old.reset, lambda: old.save(str(tmp_path)), lambda: old.load(str(tmp_path / "new"))):
                cut.result()
                with pytest.raises(FencedError, match="2 is running"):
                    action()
            assert value(servers) == -1
            assert sum(s["fenced"] for s in new.statistics()) >= 2


def test_a_push_waits_while_the_lease_has_ended(servers: Servers) -> None:
    with StoreClient.connect(servers.announce(2).addresses[0]) as store:
        store.create_tables([TABLE])
        store.begin(1, 1, 0)
        ended = servers.shards[1]
        ended.lease.grant(time.monotonic())
        push = subtract_one(store, Clock(1, 1))
        while store.counters.retries < 2:
            assert not push.done()
            time.sleep(0.01)
        ended.lease.grant(time.monotonic() + 1000)
        push.result()
        assert value(servers) == -1
        assert ended.statistics()["lease_ended"] >= 2


def test_a_shard_that_is_replaced_at_another_address_is_found(servers: Servers) -> None:
    """Nobody but `find_map` can tell the client: no shard that it can reach has to be asked for anything."""
    known: list[BlockMap | None] = [None]
    with StoreClient.connect(servers.announce(2).addresses[0], find_map=lambda: known[0]) as store:
        store.create_tables([TABLE])
        store.begin(1, 1, 0)
        subtract_one(store, Clock(1, 1)).result()
        for server in servers.servers:
            server.stop()
        push = subtract_one(store, Clock(1, 2))
        servers.servers = [ShardServer(shard) for shard in servers.shards]
        known[0] = servers.announce(3)
        push.result()
        assert store.block_map.epoch == 3
        assert value(servers) == -2
        store.begin(2, 1, 2)  # administrative calls find it, too


def test_a_shard_whose_machine_vanished_is_left_for_its_replacement(quick_pings: None, servers: Servers) -> None:
    """A call that waits long for another worker is left alone; then no connection ends, and nothing comes any more."""
    direct = servers.announce(2)
    proxy = Proxy(direct.addresses[1])
    for shard in servers.shards:
        shard.set_block_map(BlockMap(3, direct.owners, (direct.addresses[0], proxy.address)))
    known: list[BlockMap | None] = [None]
    with StoreClient.connect(direct.addresses[0], find_map=lambda: known[0]) as store:
        store.create_tables([TABLE])
        subtract_one(store).result()
        store.begin(1, 2, 0)
        first = subtract_one(store, Clock(1, 1, 0, 2, 0, True))
        time.sleep(4.5)  # what this is about: more pings than a server that allows none stands, and than gRPC sends
        assert not first.done() and store.counters.retries == 0
        proxy.requests.clear()
        proxy.answers.clear()
        known[0] = servers.announce(4)
        with StoreClient.connect(direct.addresses[0]) as other:
            second = subtract_one(other, Clock(1, 1, 1, 2, 0, True))
            for push in (first, second):
                push.result(20)
            assert store.counters.retries > 0 == other.counters.retries
        assert value(servers) == -3
    proxy.close()
