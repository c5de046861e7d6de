"""Who may talk to a shard, over real gRPC: tokens of every method, mutual TLS, and what a refused peer can reach."""

from __future__ import annotations

import logging
import pickle
import socket
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import grpc
import numpy as np
import pytest
from embershard.parameter_server.blocks import BlockMap
from embershard.parameter_server.client import SERVICE, StoreClient
from embershard.parameter_server.kernels import locate
from embershard.parameter_server.protocol import shard_pb2 as pb
from embershard.parameter_server.protocol.frames import MAX_OPEN_CALLS, Decoded, encode
from embershard.parameter_server.requests import RowSet
from embershard.parameter_server.security import Security
from embershard.parameter_server.server import ShardServer
from embershard.parameter_server.shard import Shard
from embershard.parameter_server.store import SecurityError, Store, StoreError, StoreTimeout
from embershard.parameter_server.tables import Layout
from grpc_health.v1 import health_pb2, health_pb2_grpc
from grpc_reflection.v1alpha import reflection_pb2, reflection_pb2_grpc

sys.path.insert(0, str(Path(__file__).parent))
from certificates import Authority
from exact import exact_table

BLOCKS, WIDTH = 10, 4
TOKEN, OTHER = "0123456789abcdef-right", "fedcba9876543210-wrong"
TABLE = exact_table(100, WIDTH)
VARIABLES = ("RAY_USE_TLS", "RAY_TLS_SERVER_CERT", "RAY_TLS_SERVER_KEY", "RAY_TLS_CA_CERT")


@pytest.fixture(autouse=True)
def plain_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in (*VARIABLES, "EMBERSHARD_TOKEN", "EMBERSHARD_TOKEN_FILE"):
        monkeypatch.delenv(name, raising=False)


@pytest.fixture(scope="module")
def authorities(tmp_path_factory: pytest.TempPathFactory) -> tuple[Authority, Authority]:
    folder = tmp_path_factory.mktemp("certificates")
    return Authority(folder, "ours"), Authority(folder, "theirs")


@contextmanager
def environment(variables: dict[str, str]) -> Iterator[None]:
    with pytest.MonkeyPatch.context() as patch:
        for name, value in variables.items():
            patch.setenv(name, value)
        yield


@contextmanager
def serving(variables: dict[str, str] | None = None, token: str | None = None) -> Iterator[str]:
    """The address of a shard that was started in such an environment."""
    shard = Shard(0, Layout(BLOCKS))
    with environment(variables or {}):
        server = ShardServer(shard, token=token)
    shard.set_block_map(BlockMap.initial(BLOCKS, (server.start(),)))
    try:
        yield server.address
    finally:
        server.stop()


def push_and_pull(store: StoreClient) -> None:
    store.create_tables([TABLE])
    rows, grads = np.arange(10), np.ones((10, WIDTH), np.float32)
    part, _ = locate(store.layout.slabs[0], np.zeros(1, np.int32), np.array([0, 10]), rows, store.block_map.rank())
    store.push([part], [grads], [1.0]).result()
    np.testing.assert_array_equal(store.pull([part]).result()[0], -grads)


def one_row(store: StoreClient) -> tuple[RowSet, np.ndarray]:
    slab, rank = store.layout.slabs[0], store.block_map.rank()
    return locate(slab, np.zeros(1, np.int32), np.array([0, 1]), np.zeros(1, np.int64), rank)


def call_exchange(channel: grpc.Channel, metadata: tuple[tuple[str, str], ...]) -> None:
    frames = encode(1, pb.Request().SerializeToString(), [])
    next(channel.stream_stream(f"/{SERVICE}/Exchange")(iter(frames), metadata=metadata, timeout=5))


def call_control(channel: grpc.Channel, metadata: tuple[tuple[str, str], ...]) -> None:
    request = pb.ControlRequest(method="describe").SerializeToString()
    channel.unary_unary(f"/{SERVICE}/Control")(request, metadata=metadata, timeout=5)


def call_health(channel: grpc.Channel, metadata: tuple[tuple[str, str], ...]) -> None:
    request = health_pb2.HealthCheckRequest()
    health_pb2_grpc.HealthStub(channel).Check(request, metadata=metadata, timeout=5)


def call_health_watch(channel: grpc.Channel, metadata: tuple[tuple[str, str], ...]) -> None:
    request = health_pb2.HealthCheckRequest()
    next(health_pb2_grpc.HealthStub(channel).Watch(request, metadata=metadata, timeout=5))


def call_reflection(channel: grpc.Channel, metadata: tuple[tuple[str, str], ...]) -> None:
    request = reflection_pb2.ServerReflectionRequest(list_services="")
    stub = reflection_pb2_grpc.ServerReflectionStub(channel)
    next(stub.ServerReflectionInfo(iter([request]), metadata=metadata, timeout=5))


def call_transfer(channel: grpc.Channel, metadata: tuple[tuple[str, str], ...]) -> None:
    request = pb.TransferRequest(blocks=[0]).SerializeToString()
    next(channel.unary_stream(f"/{SERVICE}/Transfer")(request, metadata=metadata, timeout=5))


METHODS = [call_exchange, call_control, call_transfer, call_health, call_health_watch, call_reflection]


def test_every_method_of_the_shard_is_tried_here() -> None:
    service = pb.DESCRIPTOR.services_by_name["Shard"]
    assert {f"call_{method.name.lower()}" for method in service.methods} <= {call.__name__ for call in METHODS}


@pytest.mark.parametrize("call", METHODS, ids=lambda call: call.__name__)
def test_every_method_asks_for_the_token(call) -> None:
    right = Security.of_process(TOKEN).metadata
    wrong = [
        ((), "a token is required"),
        (Security.of_process(OTHER).metadata, "the token is not the one"),
        ((("authorization", TOKEN),), "the token is not the one"),
        ((("authorization", ""),), "the token is not the one"),
    ]
    with serving(token=TOKEN) as address, grpc.insecure_channel(address) as channel:
        for metadata, message in wrong:
            with pytest.raises(grpc.RpcError) as refused:
                call(channel, metadata)
            assert refused.value.code() == grpc.StatusCode.UNAUTHENTICATED
            assert message in refused.value.details()
            assert TOKEN not in str(refused.value) and OTHER not in str(refused.value)
        call(channel, right)


def test_an_unknown_method_is_refused_like_any_other() -> None:
    with serving(token=TOKEN) as address, grpc.insecure_channel(address) as channel:
        with pytest.raises(grpc.RpcError) as refused:
            channel.unary_unary("/nobody/Knows")(b"", timeout=5)
        assert refused.value.code() == grpc.StatusCode.UNAUTHENTICATED


def test_a_refused_message_is_never_parsed(monkeypatch: pytest.MonkeyPatch) -> None:
    """Neither parser is reached, and the answer does not even wait for the message."""
    parsed: list[bytes] = []
    monkeypatch.setattr(pb.ControlRequest, "FromString", lambda message: parsed.append(message))
    monkeypatch.setattr("embershard.parameter_server.server.Assembler.add", lambda _, frame: parsed.append(frame))
    never = threading.Event()

    def unsent() -> Iterator[bytes]:
        never.wait(20)
        yield b"too late"

    with serving(token=TOKEN) as address, grpc.insecure_channel(address) as channel:
        for call in (
            lambda: channel.unary_unary(f"/{SERVICE}/Control")(b"\xff garbage", timeout=5),
            lambda: next(channel.stream_stream(f"/{SERVICE}/Exchange")(unsent(), timeout=5)),
            lambda: channel.stream_unary(f"/{SERVICE}/Control")(unsent(), timeout=5),
        ):
            with pytest.raises(grpc.RpcError) as refused:
                call()
            assert refused.value.code() == grpc.StatusCode.UNAUTHENTICATED
        never.set()
        assert parsed == []
        # The same garbage with the token does reach the parser.
        metadata = Security.of_process(TOKEN).metadata
        channel.unary_unary(f"/{SERVICE}/Control")(b"\xff garbage", metadata=metadata, timeout=5)
        assert parsed == [b"\xff garbage"]


def test_more_calls_than_a_stream_takes_at_once() -> None:
    """They wait for each other, and every one is answered."""
    calls = range(1, 2 * MAX_OPEN_CALLS)
    empty = pb.Request().SerializeToString()
    with serving() as address, grpc.insecure_channel(address) as channel:
        stream = channel.stream_stream(f"/{SERVICE}/Exchange")(frame for n in calls for frame in encode(n, empty, []))
        assert [Decoded(answer).call for answer, _ in zip(stream, calls, strict=False)] == list(calls)
        stream.cancel()


@pytest.mark.parametrize("token", [None, OTHER])
def test_a_client_without_the_token_fails_at_once(token: str | None, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.DEBUG)
    with serving(token=TOKEN) as address:
        begun = time.monotonic()
        with pytest.raises(SecurityError, match=r"shard 127.0.0.1:\d+: shard 0: .*token") as refused:
            Store.connect(address, timeout=30, token=token)
        assert time.monotonic() - begun < 15
        with Store.connect(address, token=TOKEN) as store:
            push_and_pull(store)
            for shown in (repr(store.__dict__), repr(store._security), str(refused.value), caplog.text):
                assert TOKEN not in shown and OTHER not in shown


def test_a_stream_whose_token_is_refused_is_not_repeated() -> None:
    """A shard that was started again with another token: pulls end with the reason, not at their deadline."""
    with serving(token=TOKEN) as address:
        store = Store.connect(address, token=TOKEN, timeout=30)
        push_and_pull(store)
        store._security = Security.of_process(OTHER)
        for link in store._links.values():
            link.close()
        store._links.clear()
        part, _ = one_row(store)
        with pytest.raises(StoreError, match="the token is not the one"):
            store.pull([part]).result(timeout=15)
        store.close()


def test_mutual_tls_and_token_from_the_environment(authorities, tmp_path: Path) -> None:
    file = tmp_path / "token"
    file.write_text(TOKEN + "\n")
    ours = authorities[0].issue("both") | {"EMBERSHARD_TOKEN_FILE": str(file)}
    with serving(ours) as address, environment(ours), Store.connect(address) as store:
        push_and_pull(store)


def test_certificates_that_are_being_renewed_are_waited_for(authorities) -> None:
    """A connection that must be opened while a file is away is opened when it is back: nothing fails, nothing hangs."""
    ours = authorities[0].issue("renewed")
    key = Path(ours["RAY_TLS_SERVER_KEY"])
    with serving(ours) as address, environment(ours), Store.connect(address, timeout=30) as store:
        push_and_pull(store)
        part, _ = one_row(store)
        for link in store._links.values():
            link.close()
        store._links.clear()
        away = key.rename(key.with_suffix(".away"))
        waiting = store.pull([part])
        assert not waiting.done()
        away.rename(key)
        np.testing.assert_array_equal(waiting.result(timeout=20)[0], -np.ones((1, WIDTH)))
        assert store.counters.retries > 0


@pytest.mark.parametrize(
    ("server", "client", "message"),
    [
        ({"name": "a"}, {"name": "b", "theirs": True}, "its certificate is not accepted here"),
        ({"name": "a", "host": "10.9.9.9"}, {"name": "b"}, "its certificate is not accepted here: IP address mismatch"),
        ({"name": "a", "expired": True}, {"name": "b"}, "its certificate is not accepted here: .*expired"),
        ({"name": "a"}, {"name": "b", "expired": True}, "does not accept this process's certificate"),
        ({"name": "a"}, None, "it speaks TLS and this process does not: set RAY_USE_TLS=1"),
        (None, {"name": "b"}, "it does not speak TLS, and RAY_USE_TLS is set here"),
    ],
)
def test_connections_that_cannot_be(authorities, server, client, message: str) -> None:
    """Each ends at once, with who would not have whom; the time-out is far away."""

    def variables(who: dict | None) -> dict[str, str]:
        return {} if who is None else authorities[who.pop("theirs", False)].issue(who.pop("name"), **who)

    server, client = variables(server and dict(server)), variables(client and dict(client))
    with serving(server) as address, environment(client):
        begun = time.monotonic()
        with pytest.raises(SecurityError, match=message):
            Store.connect(address, timeout=30)
        assert time.monotonic() - begun < 15


def test_a_certificate_of_another_authority_is_refused_by_the_shard(authorities) -> None:
    """The client trusts the shard, and the shard does not trust the client: nor one that shows no certificate."""
    ours, theirs = authorities[0].issue("shard"), authorities[1].issue("stranger")
    with serving(ours) as address:
        half = environment(theirs | {"RAY_TLS_CA_CERT": ours["RAY_TLS_CA_CERT"]})
        with half, pytest.raises(SecurityError, match="does not accept this process's certificate"):
            Store.connect(address, timeout=30)
        nothing_shown = grpc.ssl_channel_credentials(Path(ours["RAY_TLS_CA_CERT"]).read_bytes())
        with grpc.secure_channel(address, nothing_shown) as channel, pytest.raises(grpc.RpcError) as refused:
            call_control(channel, ())
        assert refused.value.code() == grpc.StatusCode.UNAVAILABLE


def test_nobody_there_is_still_a_time_out() -> None:
    with socket.create_server(("127.0.0.1", 0)) as deaf, pytest.raises(StoreTimeout, match="no shard answered"):
        Store.connect(f"127.0.0.1:{deaf.getsockname()[1]}", timeout=0.5)


def test_beyond_loopback_a_token_is_required() -> None:
    shard = Shard(0, Layout(BLOCKS))
    with pytest.raises(SecurityError, match=r"shard 0: 0\.0\.0\.0 is not loopback, and there is no token"):
        ShardServer(shard, "0.0.0.0")
    server = ShardServer(shard, "0.0.0.0", token=TOKEN)
    port = server.start().rpartition(":")[2]
    try:
        with grpc.insecure_channel(f"127.0.0.1:{port}") as channel, pytest.raises(grpc.RpcError):
            call_control(channel, ())
    finally:
        server.stop()


def test_the_token_travels_to_another_process_and_shows_nowhere() -> None:
    security = Security.of_process(TOKEN)
    assert pickle.loads(pickle.dumps(security)).metadata == security.metadata
    assert TOKEN not in f"{security} {security!r} {security.token!r}"
