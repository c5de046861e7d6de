"""The store over real gRPC against a dense model: exactly once whatever is lost, repeated, moved or out of date."""

from __future__ import annotations

import socket
import sys
import threading
from pathlib import Path

import grpc
import numpy as np
import pytest
from embershard.parameter_server import failpoints
from embershard.parameter_server.blocks import BlockMap
from embershard.parameter_server.client import SERVICE, StoreClient
from embershard.parameter_server.kernels import locate
from embershard.parameter_server.protocol import shard_pb2 as pb
from embershard.parameter_server.protocol.frames import CHANNEL_OPTIONS, Assembler, Decoded, encode
from embershard.parameter_server.protocol.messages import encode_request
from embershard.parameter_server.requests import INVALID, Clock, PullRequest, RowSet
from embershard.parameter_server.server import ShardServer
from embershard.parameter_server.shard import Shard
from embershard.parameter_server.store import FencedError, StoreError, StoreTimeout
from embershard.parameter_server.tables import Layout, Optimizer, TableError, TableSpec
from grpc_health.v1 import health_pb2, health_pb2_grpc
from grpc_reflection.v1alpha.proto_reflection_descriptor_database import ProtoReflectionDescriptorDatabase

sys.path.insert(0, str(Path(__file__).parent))
from exact import exact_table
from proxy import Proxy

ROWS, WIDTH, BLOCKS = 500, 4, 40
TABLE = exact_table(ROWS, WIDTH)


class Cluster:
    """Shards in this process that listen on loopback, each behind a proxy."""

    def __init__(self, shards: int) -> None:
        self.shards = [Shard(i, Layout(BLOCKS)) for i in range(shards)]
        self.servers = [ShardServer(shard) for shard in self.shards]
        self.proxies = [Proxy(server.start()) for server in self.servers]
        self.set_map(BlockMap.initial(BLOCKS, tuple(proxy.address for proxy in self.proxies)))

    def set_map(self, block_map: BlockMap) -> None:
        self.block_map = block_map
        for shard in self.shards:
            shard.set_block_map(block_map)

    def connect(self, timeout: float = 20.0) -> StoreClient:
        return StoreClient.connect([proxy.address for proxy in self.proxies], timeout=timeout)

    def close(self) -> None:
        for server, proxy in zip(self.servers, self.proxies, strict=True):
            proxy.close()
            server.stop()


@pytest.fixture
def cluster():
    cluster = Cluster(3)
    yield cluster
    cluster.close()


def located(store: StoreClient, rows: np.ndarray):
    slab = store.layout.slabs[store.layout.ref("items").slab]
    return locate(slab, np.zeros(1, np.int32), np.array([0, len(rows)]), rows, store.block_map.rank())


def push(store: StoreClient, rows: np.ndarray, grads: np.ndarray, clock: Clock | None = None):
    part, inverse = located(store, rows)
    summed = np.zeros((len(part.index), WIDTH), np.float32)
    np.add.at(summed, inverse, grads)
    return store.push([part], [summed], [1.0], clock)


def pull(store: StoreClient, rows: np.ndarray, clock: Clock | None = None) -> np.ndarray:
    part, inverse = located(store, rows)
    return store.pull([part], clock).result()[0][inverse]


def random_push(rng: np.random.Generator, model: np.ndarray, count: int = 60):
    rows = rng.integers(0, ROWS, count)
    grads = rng.integers(-4, 5, (count, WIDTH)).astype(np.float32)
    np.subtract.at(model, rows, grads)
    return rows, grads


def read_all(store: StoreClient) -> np.ndarray:
    return pull(store, np.arange(ROWS))


def test_pushes_and_pulls_equal_a_dense_model(cluster):
    rng, model = np.random.default_rng(0), np.zeros((ROWS, WIDTH), np.float32)
    with cluster.connect() as store:
        store.create_tables([TABLE])
        for _ in range(20):
            push(store, *random_push(rng, model)).result()
            rows = rng.integers(0, ROWS, 50)
            np.testing.assert_array_equal(pull(store, rows), model[rows])
        assert store.counters.wire_bytes > 0
        assert store.counters.retries == store.counters.moved == 0


def test_a_call_of_many_frames(cluster):
    rng = np.random.default_rng(0)
    wide = TableSpec(name="wide", rows=20_000, width=64, optimizer=Optimizer(kind="sgd"))
    with cluster.connect() as store:
        store.create_tables([wide])
        slab = store.layout.slabs[store.layout.ref("wide").slab]
        rows = rng.permutation(20_000)
        part, _ = locate(slab, np.zeros(1, np.int32), np.array([0, len(rows)]), rows, store.block_map.rank())
        before = store.pull([part]).result()[0].copy()
        grads = rng.integers(-3, 4, before.shape).astype(np.float32)
        store.push([part], [grads], [0.5]).result()
        np.testing.assert_allclose(store.pull([part]).result()[0], before - 0.5 * grads, rtol=0, atol=1e-6)
        assert store.counters.wire_bytes > 3 * 20_000 * 64 * 4


def test_a_client_that_asks_no_more_still_gets_its_answers(cluster):
    """Its stream is half closed long before the shard could send all of 40 MB."""
    with cluster.connect() as store:
        store.create_tables([TableSpec(name="wide", rows=40_000, width=64)])
        own, each = np.flatnonzero(cluster.block_map.owners == 0), store.layout.slabs[0].rows_per_block
        index = (own[:, None] * each + np.arange(each)).reshape(-1).astype(np.uint32)
        counts = np.full(len(own), each, np.uint32)
        header, arrays = encode_request(PullRequest([RowSet(0, index, own.astype(np.uint16), counts)]), 20.0)
        frames = [frame for call in range(1, 13) for frame in encode(call, header, arrays)]
        with grpc.insecure_channel(cluster.servers[0].address, options=CHANNEL_OPTIONS) as channel:
            answers = channel.stream_stream(f"/{SERVICE}/Exchange")(iter(frames))
            assembler = Assembler()
            assert sum(assembler.add(frame) is not None for frame in answers) == 12


def test_lost_answers_are_repeated_and_count_once(cluster):
    rng, model = np.random.default_rng(1), np.zeros((ROWS, WIDTH), np.float32)
    with cluster.connect() as store:
        store.create_tables([TABLE])
        push(store, *random_push(rng, model)).result()
        for proxy in cluster.proxies:
            proxy.swallow_answers = True
            proxy.swallowed.clear()
        done = [push(store, *random_push(rng, model)) for _ in range(4)]
        for proxy in cluster.proxies:
            assert proxy.swallowed.wait(10)  # applied on the shard, and the acknowledgement is lost
            proxy.swallow_answers = False
            proxy.cut()
        for future in done:
            future.result()
        np.testing.assert_array_equal(read_all(store), model)
        assert store.counters.retries > 0
        assert sum(shard["duplicates"] for shard in store.statistics()) > 0


def test_a_lost_answer_takes_no_other_with_it(cluster):
    """What one worker's push lets through is another worker's answer."""
    rng, model = np.random.default_rng(7), np.zeros((ROWS, WIDTH), np.float32)
    with cluster.connect() as one, cluster.connect() as other:
        one.create_tables([TABLE])
        other.create_tables([TABLE])
        one.begin(1, 2, 0)
        push(other, *random_push(rng, model), clock=Clock(1, 1, 1, 2)).result()
        part, _ = located(other, np.arange(ROWS))
        waiting = other.pull([part], Clock(1, 2, 1, 2))
        while any(shard["waiting"] == 0 for shard in one.statistics()):
            pass
        failpoints.arm("network.answer=skip")
        try:
            lost = push(one, *random_push(rng, model), clock=Clock(1, 1, 0, 2))
            waiting.result(10)
        finally:
            failpoints.arm("")
        lost.result()
        np.testing.assert_array_equal(read_all(one), model)


def test_cut_connections_while_pushing(cluster):
    rng, model = np.random.default_rng(2), np.zeros((ROWS, WIDTH), np.float32)
    with cluster.connect() as store:
        store.create_tables([TABLE])
        for number in range(30):
            future = push(store, *random_push(rng, model))
            if number % 5 == 4:
                cluster.proxies[number % 3].cut()
            future.result()
        np.testing.assert_array_equal(read_all(store), model)


def test_a_stale_map_is_mended_by_moved(cluster):
    """Blocks change hands behind the client's back: it is told, block by block, and re-sends just those."""
    rng, model = np.random.default_rng(3), np.zeros((ROWS, WIDTH), np.float32)
    with cluster.connect() as store:
        store.create_tables([TABLE])
        owners = cluster.block_map.owners.copy()
        owners[:10] = 2
        contents = [cluster.shards[0].export_block(block) for block in range(10)]
        cluster.set_map(BlockMap(2, owners, cluster.block_map.addresses))
        for block, content in enumerate(contents):
            cluster.shards[2].load_block(block, content)
        push(store, *random_push(rng, model, 200)).result()
        assert store.counters.moved > 0
        assert store.block_map.epoch == 2
        np.testing.assert_array_equal(read_all(store), model)
        moved = store.counters.moved
        push(store, *random_push(rng, model, 200)).result()
        assert store.counters.moved == moved


def test_an_older_generation_is_fenced(cluster):
    with cluster.connect() as old, cluster.connect() as new:
        old.create_tables([TABLE])
        new.create_tables([TABLE])
        old.begin(1, workers=1, step=0)
        rows, grads = np.arange(50), np.ones((50, WIDTH), np.float32)
        push(old, rows, grads, Clock(1, 1)).result()
        new.begin(2, workers=1, step=0)
        with pytest.raises(FencedError):
            push(old, rows, grads, Clock(1, 2)).result()
        with pytest.raises(FencedError):
            pull(old, rows, Clock(1, 2))
        np.testing.assert_array_equal(pull(new, rows, Clock(2, 1)), -grads)


def test_more_waiting_workers_than_threads(cluster):
    """Every worker but one waits for the last one's push; none of them holds a thread of the server."""
    workers, before = 12, threading.active_count()
    stores = [cluster.connect() for _ in range(workers)]
    stores[0].create_tables([TABLE])
    for store in stores[1:]:
        store.create_tables([TABLE])
    stores[0].begin(1, workers=workers, step=0)
    rows, grads = np.arange(20), np.ones((20, WIDTH), np.float32)
    clocks = [Clock(1, 1, rank, workers, 0, True) for rank in range(workers)]
    waiting = [push(store, rows, grads, clock) for store, clock in zip(stores[1:], clocks[1:], strict=True)]
    assert pull(stores[0], rows).sum() == 0  # a call without a clock passes all those that wait
    assert not any(future.done() for future in waiting)
    server_threads = [t for t in threading.enumerate() if t.name.startswith("shard-")]
    assert len(server_threads) == 3, (before, server_threads)
    push(stores[0], rows, grads, clocks[0]).result()
    for future in waiting:
        future.result()
    np.testing.assert_array_equal(pull(stores[0], rows), -workers * grads)
    for store in stores:
        store.close()


def test_the_deadline_names_the_missing_rank(cluster):
    with cluster.connect(timeout=1.0) as store:
        store.create_tables([TABLE])
        store.begin(1, workers=3, step=0)
        rows, grads = np.arange(20), np.ones((20, WIDTH), np.float32)
        first = push(store, rows, grads, Clock(1, 1, 0, 3, 0, True))
        with pytest.raises(StoreTimeout, match=r"step 1 .*rank.* 1.* 2"):
            first.result()
        assert read_all(store).sum() == 0


def test_a_shard_that_does_not_answer_is_named(cluster):
    with cluster.connect(timeout=1.0) as store:
        store.create_tables([TABLE])
        cluster.proxies[1].swallow_answers = True
        with pytest.raises(StoreTimeout, match=r"no answer from shard 1"):
            read_all(store)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (pb.Request(parts=[pb.Part(slab=7, index_bytes=4)]), "slab 7 is unknown: the shard holds 1"),
        (
            pb.Request(parts=[pb.Part(slab=0, index_bytes=4, blocks=b"\0\0", counts=b"\xff\xff\xff\xff")]),
            "an index of 17179869180 bytes, 4 bytes left",
        ),
        (pb.Request(parts=[pb.Part(slab=0, index_bytes=3, blocks=b"\0\0", counts=b"\1\0\0\0")]), "do not match"),
        (pb.Request(parts=[]), "a payload of 4 bytes where 0 were described"),
    ],
)
def test_a_call_that_contradicts_itself_is_refused(cluster, call: pb.Request, message: str):
    """Refused alone: the stream goes on, and the next call of the same client is answered."""
    with cluster.connect() as store, grpc.insecure_channel(cluster.servers[0].address) as channel:
        store.create_tables([TABLE])
        number = np.zeros(1, np.uint32)
        frames = [*encode(1, call.SerializeToString(), [number]), *encode(2, pb.Request().SerializeToString(), [])]
        stream = channel.stream_stream(f"/{SERVICE}/Exchange")(iter(frames))
        answers = [Decoded(answer) for answer, _ in zip(stream, frames, strict=False)]
        first, second = (pb.Reply.FromString(answer.header) for answer in answers)
        assert first.refusal == INVALID and message in first.message
        assert not second.refusal


@pytest.mark.parametrize(
    ("frame", "message"),
    [
        (b"\x08\x01\x12\x00\x18" + b"\xff\xff\xff\xff\x7f", "34359738367 bytes announced, the limit is 2147483648"),
        (b"\x08\x01\x12\x00\x18\x02\x2a\x03abc", "3 bytes received, 2 announced"),
        (b"\x2a\xff\xff\xff\x7fabc", "a field of 268435455 bytes in a frame of 8"),
        (b"\x99", "unknown field tag|cut off"),
    ],
)
def test_frames_that_claim_too_much_end_their_stream_alone(cluster, frame: bytes, message: str):
    with cluster.connect() as store, grpc.insecure_channel(cluster.servers[0].address) as channel:
        store.create_tables([TABLE])
        with pytest.raises(grpc.RpcError, match=message) as error:
            next(channel.stream_stream(f"/{SERVICE}/Exchange")(iter([frame])))
        assert error.value.code() == grpc.StatusCode.INVALID_ARGUMENT
        assert read_all(store).shape == (ROWS, WIDTH)


def test_rows_and_tables_that_do_not_exist(cluster):
    with cluster.connect() as store:
        store.create_tables([TABLE])
        with pytest.raises(TableError, match=r"table 'items' has no row 500: its rows are 0 to 499"):
            located(store, np.array([3, ROWS]))
        with pytest.raises(TableError, match="unknown table 'nobody': the store holds items"):
            store.layout.ref("nobody")
        part, _ = located(store, np.arange(4))
        part.index = part.index + np.uint32(10**6)
        with pytest.raises(StoreError, match=r"shard .* refused: slab 0: row 1\d+ does not lie in block \d+"):
            store.pull([part]).result()


def test_a_taken_port_is_one_line():
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        with pytest.raises(StoreError, match=f"cannot listen on 127.0.0.1:{port}"):
            ShardServer(Shard(0, Layout(BLOCKS)), port=port).start()


def test_health_and_reflection(cluster):
    with grpc.insecure_channel(cluster.servers[0].address, options=CHANNEL_OPTIONS) as channel:
        health = health_pb2_grpc.HealthStub(channel)
        for service in ("", SERVICE):
            reply = health.Check(health_pb2.HealthCheckRequest(service=service))
            assert reply.status == health_pb2.HealthCheckResponse.SERVING
        assert SERVICE in ProtoReflectionDescriptorDatabase(channel).get_services()
