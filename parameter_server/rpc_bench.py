"""What moving rows costs: the real client and server beside a raw loopback socket with and without the same kernel.

    transport   a ready buffer sent (push) or received (pull) through the client and server, no kernel at either end
    real        a pull that gathers, a push that updates
    socket      the same bytes over a plain TCP connection, with and without the same kernel
    bare        the same bytes through gRPC's own Python API and nothing of ours: what gRPC itself leaves to be had

Every contender has its server in a process of its own: `python -m embershard.parameter_server.rpc_bench NAME JSON`.
"""

from __future__ import annotations

import asyncio
import json
import multiprocessing
import os
import queue
import resource
import socket
import statistics
import struct
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from multiprocessing.connection import Connection
from typing import Any

import grpc
import numpy as np

from . import kernels
from .allocator import keep_freed_memory
from .blocks import BlockMap
from .client import StoreClient
from .memory import SlabMemory
from .optimizers import apply
from .protocol.frames import CHANNEL_OPTIONS, FRAME_BYTES
from .recovery import open_shard
from .requests import Completed, PullReply, PullRequest, PushReply, PushRequest, RowSet
from .server import ShardServer
from .shard import Shard
from .tables import Layout, Optimizer, TableSpec

BLOCKS = 256
TABLE_BYTES = 1 << 29
SIZES = [1 << 16, 1 << 18, 1 << 20, 1 << 22, 1 << 24, 1 << 26]
OPTIMIZER = Optimizer(kind="rowwise_adagrad")
LEARNING_RATE = 1e-3


class ReadyShard(Shard):
    """Answers pulls with a ready buffer and drops pushes: what is left is the transport."""

    ready: np.ndarray

    def pull(self, request: PullRequest, token: object, deadline: float) -> list[Completed]:
        rows = [self.ready[: len(part.index)] for part in request.parts]
        return [Completed(token, PullReply([np.zeros(len(part.blocks), np.uint8) for part in request.parts], rows))]

    def push(self, request: PushRequest, token: object, deadline: float) -> list[Completed]:
        return [Completed(token, PushReply([np.zeros(len(part.blocks), np.uint8) for part in request.parts]))]


def _table(width: int) -> TableSpec:
    return TableSpec(name="t", rows=TABLE_BYTES // (4 * width), width=width, optimizer=OPTIMIZER)


def _serve_shard(width: int, ready: bool, journal: str | None, blocks: int, number: int, pipe: Connection) -> None:
    keep_freed_memory()
    kernels.warm_up()
    shard = ReadyShard(number, Layout(blocks)) if ready else open_shard(number, blocks, 0, journal=journal)[0]
    if isinstance(shard, ReadyShard):
        shard.ready = np.ones((max(SIZES) // (4 * width), width), np.float32)
    pipe.send(ShardServer(shard).start())
    shard.set_block_map(BlockMap.initial(blocks, pipe.recv()))
    pipe.recv()


@contextmanager
def shard_processes(
    shards: int, *, width: int = 0, ready: bool = False, journal: str | None = None, blocks: int = BLOCKS
) -> Iterator[tuple[tuple[str, ...], list[int]]]:
    """(addresses, process ids) of a store's shards, each in a process of its own, for as long as the block runs.

    journal: a folder in which each shard keeps its journal.
    """
    context = multiprocessing.get_context("spawn")
    pipes = [context.Pipe() for _ in range(shards)]
    processes = [
        context.Process(target=_serve_shard, args=(width, ready, folder, blocks, i, pipes[i][1]), daemon=True)
        for i, folder in enumerate(None if journal is None else f"{journal}/shard-{i}" for i in range(shards))
    ]
    try:
        for process in processes:
            process.start()
        addresses = tuple(pipe.recv() for pipe, _ in pipes)
        for pipe, _ in pipes:
            pipe.send(addresses)
        yield addresses, [int(process.pid or 0) for process in processes]
    finally:
        for process in processes:
            process.terminate()
            process.join()


def _serve_socket(width: int, ready: bool, port: Connection) -> None:
    keep_freed_memory()
    kernels.warm_up()
    memory = SlabMemory(Layout(BLOCKS).add([_table(width)])[0])
    if not ready:
        memory.weights[:], memory.state[:] = 0.01, 0.0
    with socket.create_server(("127.0.0.1", 0)) as listener:
        port.send(listener.getsockname()[1])
        peer, _ = listener.accept()
        with peer:
            peer.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
            _socket_loop(peer, memory.weights, memory.state, ready)


def _socket_loop(peer: socket.socket, weights: np.ndarray, state: np.ndarray, ready: bool) -> None:
    width = weights.shape[1]
    buffer = np.ones((max(SIZES) // (4 * width), width), np.float32)
    index = np.empty(len(buffer), np.uint32)
    while head := peer.recv(16, socket.MSG_WAITALL):
        push, count = struct.unpack("<QQ", head)
        _receive(peer, index[:count])
        if push:
            _receive(peer, buffer[:count])
            if not ready:
                apply(OPTIMIZER, weights, state, index[:count], buffer[:count], LEARNING_RATE)
            peer.sendall(b"12345678")
        else:
            if not ready:
                kernels.gather(weights, index[:count], buffer[:count])
            peer.sendall(buffer[:count].data.cast("B"))


def _receive(peer: socket.socket, into: np.ndarray) -> None:
    view = into.data.cast("B")
    while view:
        got = peer.recv_into(view)
        if not got:
            raise ConnectionError("the peer closed the connection")
        view = view[got:]


@contextmanager
def _socket_server(width: int, ready: bool) -> Iterator[tuple[int, int]]:
    context = multiprocessing.get_context("spawn")
    ours, theirs = context.Pipe()
    process = context.Process(target=_serve_socket, args=(width, ready, theirs), daemon=True)
    process.start()
    try:
        yield ours.recv(), int(process.pid or 0)
    finally:
        process.terminate()
        process.join()


def process_cpu(pid: int) -> float:
    """CPU seconds that a process has used, to a hundredth."""
    with open(f"/proc/{pid}/stat") as file:
        fields = file.read().rsplit(")", 1)[1].split()
    return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")


def _own_cpu() -> float:
    usage = resource.getrusage(resource.RUSAGE_SELF)
    return usage.ru_utime + usage.ru_stime


def _measure(width: int, pid: int, exchange: Callable[[bool, int, int], None]) -> dict[str, float]:
    """Calls `exchange(push, rows, which)` for every size and direction."""
    readings: dict[str, float] = {}
    for push in (False, True):
        name = "push" if push else "pull"
        for size in SIZES:
            count, repeat = size // (4 * width), max(5, min(200, (1 << 27) // size))
            exchange(push, count, 0)
            own, other, seconds = _own_cpu(), process_cpu(pid), []
            for i in range(repeat):
                start = time.perf_counter()
                exchange(push, count, i)
                seconds.append(time.perf_counter() - start)
            gigabytes = repeat * size / 1e9
            label = f"{name}_{size >> 10}k"
            readings[f"{label}_gbps"] = size / statistics.median(seconds) / 1e9
            readings[f"{label}_p50_ms"] = statistics.median(seconds) * 1e3
            if repeat >= 100:  # of fewer it would be the slowest
                readings[f"{label}_p99_ms"] = sorted(seconds)[int(len(seconds) * 0.99)] * 1e3
            readings[f"{label}_client_cpu_s_per_gb"] = (_own_cpu() - own) / gigabytes
            readings[f"{label}_server_cpu_s_per_gb"] = (process_cpu(pid) - other) / gigabytes
    return readings


def _indices(width: int, rows_of_table: int) -> list[np.ndarray]:
    rng = np.random.default_rng(0)
    return [rng.permutation(rows_of_table)[: max(SIZES) // (4 * width)] for _ in range(4)]


def grpc_store(width: int, ready: bool, mtls: bool = False) -> dict[str, float]:
    """Through the real client and server; `ready`: no kernel at either end; `mtls`: as RAY_USE_TLS says."""
    if not mtls:
        os.environ.pop("RAY_USE_TLS", None)
    with shard_processes(1, width=width, ready=ready) as (addresses, (pid,)), StoreClient.connect(addresses) as store:
        store.create_tables([_table(width)])
        (slab,) = store.layout.slabs
        rank, zero = store.block_map.rank(), np.zeros(1, np.int32)
        parts: dict[tuple[int, int], RowSet] = {}
        for which, rows in enumerate(_indices(width, slab.tables[0].rows)):
            for size in SIZES:
                count = size // (4 * width)
                parts[count, which] = kernels.locate(slab, zero, np.array([0, count]), rows[:count], rank)[0]
        grads = np.full((max(SIZES) // (4 * width), width), 1e-3, np.float32)

        def exchange(push: bool, count: int, which: int) -> None:
            part = parts[count, which % 4]
            if push:
                store.push([part], [grads[:count]], [LEARNING_RATE]).result()
            else:
                store.pull([part]).result()

        return _measure(width, pid, exchange)


def raw_socket(width: int, ready: bool) -> dict[str, float]:
    """The same bytes over one TCP connection; `ready`: no kernel."""
    with _socket_server(width, ready) as (port, pid), socket.create_connection(("127.0.0.1", port)) as peer:
        peer.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        indices = [np.ascontiguousarray(i, np.uint32) for i in _indices(width, TABLE_BYTES // (4 * width))]
        buffer = np.full((max(SIZES) // (4 * width), width), 1e-3, np.float32)
        answer = np.empty(8, np.uint8)

        def exchange(push: bool, count: int, which: int) -> None:
            peer.sendall(struct.pack("<QQ", push, count))
            peer.sendall(indices[which % 4][:count].data.cast("B"))
            if push:
                peer.sendall(buffer[:count].data.cast("B"))
                _receive(peer, answer)
            else:
                _receive(peer, buffer[:count])

        return _measure(width, pid, exchange)


async def _serve_bytes(ready: bytes, pipe: Connection) -> None:
    async def exchange(_: Any, context: grpc.aio.ServicerContext) -> None:
        while (message := await context.read()) is not grpc.aio.EOF:
            left, wanted = struct.unpack("<QQ", message)
            while left > 0:
                left -= len(await context.read())
            for begin in range(0, wanted, FRAME_BYTES):
                await context.write(ready[: wanted - begin])

    server = grpc.aio.server(options=CHANNEL_OPTIONS)
    handler = grpc.stream_stream_rpc_method_handler(exchange)
    server.add_generic_rpc_handlers((grpc.method_handlers_generic_handler("bare", {"Exchange": handler}),))
    port = server.add_insecure_port("127.0.0.1:0")
    await server.start()
    pipe.send((port, os.getpid()))
    await server.wait_for_termination()


def _serve_bare(ready: bytes, pipe: Connection) -> None:
    keep_freed_memory()
    asyncio.run(_serve_bytes(ready, pipe))


def bare_grpc(width: int, ready: bool) -> dict[str, float]:
    """Ready bytes in messages of a frame's size; the sizes of both directions stand in a message of their own."""
    context = multiprocessing.get_context("spawn")
    ours, theirs = context.Pipe()
    frame = b"x" * FRAME_BYTES
    process = context.Process(target=_serve_bare, args=(frame, theirs), daemon=True)
    process.start()
    port, pid = ours.recv()
    messages: queue.SimpleQueue[bytes] = queue.SimpleQueue()
    try:
        with grpc.insecure_channel(f"127.0.0.1:{port}", options=CHANNEL_OPTIONS) as channel:
            answers = channel.stream_stream("/bare/Exchange")(iter(messages.get, None))

            def exchange(push: bool, count: int, _: int) -> None:
                sent, wanted = count * 4, 8 if push else count * 4 * width
                sent += count * 4 * width if push else 0
                messages.put(struct.pack("<QQ", sent, wanted))
                for begin in range(0, sent, FRAME_BYTES):
                    messages.put(frame[: sent - begin])
                while wanted > 0:
                    wanted -= len(next(answers))

            return _measure(width, pid, exchange)
    finally:
        process.terminate()
        process.join()


CONTENDERS: dict[str, Callable[..., dict[str, Any]]] = {"grpc": grpc_store, "socket": raw_socket, "bare": bare_grpc}

if __name__ == "__main__":
    keep_freed_memory()
    print(json.dumps(CONTENDERS[sys.argv[1]](**json.loads(sys.argv[2]))))
