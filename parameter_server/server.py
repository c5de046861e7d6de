"""A shard on the network: one event loop on one thread, so a call that waits for others holds no thread.

The loop calls the shard's kernels itself: a shard is single-threaded over its rows, and more cores mean more shards.
"""

from __future__ import annotations

import asyncio
import json
import threading
import time
from collections.abc import AsyncIterator, Iterator, Mapping, Sequence
from contextlib import suppress
from typing import Any

import grpc
from grpc_health.v1 import health_pb2, health_pb2_grpc
from grpc_health.v1._async import HealthServicer
from grpc_reflection.v1alpha import reflection
from pydantic import SecretStr

from . import failpoints, transfer
from .administration import Administration, Fetched
from .protocol import shard_pb2 as pb
from .protocol.frames import (
    CALLER_OPTIONS,
    CHANNEL_OPTIONS,
    MAX_CALL_BYTES,
    MAX_OPEN_CALLS,
    Assembler,
    FrameError,
    encode,
)
from .protocol.messages import SERVICE, decode_request, encode_reply
from .requests import INVALID, Completed, PullReply, PushRequest, Refusal, Reply
from .security import Security
from .shard import Shard
from .store import StoreError

SERVER_OPTIONS = [
    *CHANNEL_OPTIONS,
    # The port must be ours alone: with reuse, a second shard on a taken port would silently get half the calls.
    ("grpc.so_reuseport", 0),
    # What peers that show no token or certificate can hold: a connection for as long as these say, and few calls of it.
    ("grpc.max_concurrent_streams", 128),
    ("grpc.server_handshake_timeout_ms", 20_000),
    ("grpc.max_connection_idle_ms", 300_000),
    # Callers ping every 10 s (frames.py); gRPC by itself ends connections that ping more often than every 5 minutes.
    ("grpc.http2.min_ping_interval_without_data_ms", 5_000),
]


class ShardServer:
    """Serves `shard` at host:port (0 picks a free port) until `stop`.

    token: required of every call; by default that of the environment, and beyond loopback there must be one. TLS is
    spoken where RAY_USE_TLS says so (security.py).

    Raises:
        SecurityError: no token for a host that is not loopback, or a certificate that cannot be read.
    """

    def __init__(
        self, shard: Shard, host: str = "127.0.0.1", port: int = 0, *, token: str | SecretStr | None = None
    ) -> None:
        self._security = Security.of_process(token)
        self._security.require_token_beyond_loopback(f"shard {shard.number}", host)
        self.shard = shard
        self.host = host
        self.port = port
        self._administration = Administration(shard, self._deliver_from_thread, self._fetch)
        self._loop = asyncio.new_event_loop()
        self._stopping: asyncio.Event | None = None
        self._thread = threading.Thread(target=self._run, name=f"shard-{shard.number}", daemon=True)
        self._started = threading.Event()
        self._failure: BaseException | None = None

    @property
    def address(self) -> str:
        return f"{self.host}:{self.port}"

    def start(self) -> str:
        """Returns the address.

        Raises:
            StoreError: the port is taken or the host is not ours.
        """
        self._thread.start()
        self._started.wait()
        if self._failure is not None:
            raise StoreError(f"shard {self.shard.number}: cannot listen on {self.address}: {self._failure}")
        return self.address

    def stop(self) -> None:
        """Answers nothing more; returns when the port is closed."""
        if self._stopping is not None and self._thread.is_alive():
            self._loop.call_soon_threadsafe(self._stopping.set)
            self._thread.join()

    def call(self, method: str, arguments: Mapping[str, Any]) -> Any:
        """An administrative call from within this process; see `Administration.call`."""
        return self._administration.call(method, arguments)

    def _run(self) -> None:
        asyncio.set_event_loop(self._loop)
        self._loop.run_until_complete(self._serve())

    async def _serve(self) -> None:
        self._stopping = asyncio.Event()
        interceptors = self._security.interceptors(f"shard {self.shard.number}")
        server = grpc.aio.server(options=SERVER_OPTIONS, interceptors=interceptors)
        server.add_generic_rpc_handlers((self._handlers(),))
        health = HealthServicer()
        health_pb2_grpc.add_HealthServicer_to_server(health, server)
        reflection.enable_server_reflection((SERVICE, "grpc.health.v1.Health", reflection.SERVICE_NAME), server)
        try:
            self.port = self._listen(server)
            await server.start()
            if self.shard.journal is not None:
                self.shard.journal.remember_port(self.port)
        except Exception as error:
            self._failure = error
            self._started.set()
            return
        for name in ("", SERVICE):
            await health.set(name, health_pb2.HealthCheckResponse.SERVING)
        self._started.set()
        expiry = asyncio.create_task(self._expire())
        await self._stopping.wait()
        expiry.cancel()
        await server.stop(grace=0.2)

    def _listen(self, server: grpc.aio.Server) -> int:
        """The port asked for; where any will do, the one that the journal remembers, so that clients find it again."""
        old = self.shard.journal.port() if self.shard.journal is not None and self.port == 0 else 0
        if old:
            with suppress(RuntimeError):  # somebody else's by now
                return self._security.add_port(server, f"{self.host}:{old}")
        return self._security.add_port(server, f"{self.host}:{self.port}")

    def _handlers(self) -> grpc.GenericRpcHandler:
        exchange = grpc.stream_stream_rpc_method_handler(self._exchange)  # frames stay bytes: see frames.py
        control = grpc.unary_unary_rpc_method_handler(
            self._control, pb.ControlRequest.FromString, pb.ControlReply.SerializeToString
        )
        transfer_block = grpc.unary_stream_rpc_method_handler(self._transfer, pb.TransferRequest.FromString)
        return grpc.method_handlers_generic_handler(
            SERVICE, {"Exchange": exchange, "Control": control, transfer.METHOD: transfer_block}
        )

    async def _exchange(self, _: AsyncIterator[bytes], context: grpc.aio.ServicerContext) -> None:
        stream = _Stream(context)
        assembler = Assembler()
        try:
            while (frame := await context.read()) is not grpc.aio.EOF:
                if failpoints.active("network.cut"):
                    await self._break(context, "network.cut")
                call = assembler.add(frame)
                if call is not None:
                    await stream.begin()
                    self._deliver(self._handle(stream, *call))
                    if failpoints.active("network.answer"):
                        stream.close()  # its writer has not run yet; what this call let through of others is answered
                        await self._break(context, "network.answer")
            await stream.all_answered()  # the client asks no more, and reads on
        except FrameError as error:
            await context.abort(grpc.StatusCode.INVALID_ARGUMENT, f"shard {self.shard.number}: {error}")
        finally:
            stream.close()

    async def _break(self, context: grpc.aio.ServicerContext, failpoint: str) -> None:
        await context.abort(grpc.StatusCode.UNAVAILABLE, f"shard {self.shard.number}: failpoint {failpoint}")

    def _handle(self, stream: _Stream, number: int, header: bytes, payload: Any) -> list[Completed]:
        token = _Token(stream, number)
        try:
            request, timeout = decode_request(header, payload, [slab.width for slab in self.shard.layout.slabs])
        except FrameError as error:
            return [Completed(token, Refusal(INVALID, str(error)))]
        token.epoch = request.epoch
        now = time.monotonic()
        deadline = now + timeout
        if isinstance(request, PushRequest):
            return self.shard.push(request, token, deadline)
        token.pulled_at = now
        return self.shard.pull(request, token, deadline)

    def _deliver(self, completed: list[Completed]) -> None:
        for done in completed:
            token = done.token
            assert isinstance(token, _Token)
            newer = self.shard.block_map if self.shard.block_map.epoch > token.epoch else None
            token.stream.answer(token.number, done.reply, newer)
            if token.pulled_at is not None:
                self._administration.pull_times.add(time.monotonic() - token.pulled_at)

    def _deliver_from_thread(self, completed: list[Completed]) -> None:
        if completed:
            self._loop.call_soon_threadsafe(self._deliver, completed)

    async def _expire(self) -> None:
        while True:
            deadline = self.shard.next_deadline()
            # A new call may have an earlier deadline than those seen here: look again at least twice a second.
            await asyncio.sleep(0.5 if deadline is None else min(0.5, max(0.0, deadline - time.monotonic())))
            self._deliver(self.shard.expire(time.monotonic()))

    async def _control(self, request: pb.ControlRequest, _: grpc.aio.ServicerContext) -> pb.ControlReply:
        try:
            arguments = json.loads(request.arguments or "{}")
            result = await asyncio.to_thread(self._administration.call, request.method, arguments)
        except Exception as error:
            return pb.ControlReply(error=f"{type(error).__name__}: {error}")
        return pb.ControlReply(result=json.dumps(result))

    def _fetch(self, blocks: Sequence[int], source: int, move: str, *, changes: bool, seal: bool) -> Iterator[Fetched]:
        address = self.shard.block_map.addresses[source]
        with self._security.channel(address, CALLER_OPTIONS) as channel:
            metadata = self._security.metadata
            yield from transfer.fetch(channel, address, blocks, move, metadata=metadata, changes=changes, seal=seal)

    async def _transfer(self, request: pb.TransferRequest, context: grpc.aio.ServicerContext) -> None:
        """Between two frames of a block the loop serves whoever else calls."""
        if failpoints.active("network.cut"):
            await self._break(context, "network.cut")
        for number, block in enumerate(request.blocks, 1):
            try:
                if request.changes:
                    tensors = self.shard.changes_of(block, request.move, seal=request.seal)
                else:
                    tensors = self.shard.begin_move(block, request.move)
            except (StoreError, IndexError) as error:
                await context.abort(grpc.StatusCode.FAILED_PRECONDITION, f"shard {self.shard.number}: {error}")
            for frame in transfer.encode_block(number, tensors):
                await context.write(frame)


class _Token:
    """Where the answer to a call goes."""

    __slots__ = ("epoch", "number", "pulled_at", "stream")

    def __init__(self, stream: _Stream, number: int) -> None:
        self.stream = stream
        self.number = number
        self.epoch = 0
        self.pulled_at: float | None = None


class _Stream:
    """The way back to one client: answers leave in the order they were given, as fast as the client takes them.

    A client that takes none is not read any further, once MAX_OPEN_CALLS calls or MAX_CALL_BYTES of rows wait for it.
    """

    def __init__(self, context: grpc.aio.ServicerContext) -> None:
        self._context = context
        self._waiting: asyncio.Queue[tuple[int, Reply, Any]] = asyncio.Queue()
        self._open = 0
        self._unsent_bytes = 0
        self._room = asyncio.Event()
        self._writer = asyncio.create_task(self._write())

    async def begin(self) -> None:
        """One more call that is to be answered."""
        while self._open >= MAX_OPEN_CALLS or self._unsent_bytes > MAX_CALL_BYTES:
            self._room.clear()
            await self._room.wait()
        self._open += 1

    async def all_answered(self) -> None:
        """Waits until what was begun is answered; every call has a deadline."""
        while self._open:
            self._room.clear()
            await self._room.wait()

    def answer(self, number: int, reply: Reply, newer: Any) -> None:
        self._unsent_bytes += _row_bytes(reply)
        self._waiting.put_nowait((number, reply, newer))

    async def _write(self) -> None:
        while True:
            number, reply, newer = await self._waiting.get()
            header, arrays = encode_reply(reply, newer)
            for frame in encode(number, header, arrays):
                await self._context.write(frame)
            self._open -= 1
            self._unsent_bytes -= _row_bytes(reply)
            self._room.set()

    def close(self) -> None:
        self._writer.cancel()


def _row_bytes(reply: Reply) -> int:
    return sum(rows.nbytes for rows in reply.rows) if isinstance(reply, PullReply) else 0
