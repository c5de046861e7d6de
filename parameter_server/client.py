"""The store over gRPC: one stream to each shard, kept open; a broken one is opened again and its calls are repeated."""

from __future__ import annotations

import itertools
import json
import queue
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import grpc
import numpy as np
from pydantic import SecretStr

from . import store as errors
from . import tables as table_errors
from .blocks import BlockMap
from .checkpoint import CheckpointError
from .protocol import shard_pb2 as pb
from .protocol import shard_pb2_grpc
from .protocol.frames import CALLER_OPTIONS, Assembler, FrameError, encode
from .protocol.messages import SERVICE, decode_reply, encode_request
from .requests import INVALID, PullRequest, PushRequest, Refusal
from .security import Security
from .sharded import CONTROL_SECONDS, OnAnswer, ShardedStore
from .store import SecurityError, ShardUnavailable, StoreError, StoreTimeout
from .tables import Layout, TableSpec

# gRPC's own back-off grows to two minutes; a shard that restarts is to be found again at once.
CLIENT_OPTIONS = [
    *CALLER_OPTIONS,
    ("grpc.initial_reconnect_backoff_ms", 100),
    # Despite its name, also how long one attempt to connect may take: on a starved machine much longer than usual.
    ("grpc.min_reconnect_backoff_ms", 5000),
    ("grpc.max_reconnect_backoff_ms", 1000),
]
_ERRORS: dict[str, type[Exception]] = {
    "StoreError": StoreError,
    "BusyError": errors.BusyError,
    "FencedError": errors.FencedError,
    "TableError": table_errors.TableError,
    "CheckpointError": CheckpointError,
}


class StoreClient(ShardedStore):
    """A store whose shards listen elsewhere. `connect` learns everything else from the first shard that answers."""

    def __init__(
        self,
        layout: Layout,
        block_map: BlockMap,
        timeout: float,
        security: Security,
        find_map: Callable[[], BlockMap | None] = lambda: None,
    ) -> None:
        super().__init__(layout, block_map, timeout, find_map)
        self._security = security
        self._links: dict[str, _Link] = {}

    @classmethod
    def connect(
        cls,
        address: str | Sequence[str],
        *,
        timeout: float = 60.0,
        token: str | SecretStr | None = None,
        find_map: Callable[[], BlockMap | None] = lambda: None,
    ) -> StoreClient:
        """The store at `address`; see `Store.connect`. find_map: see ShardedStore.

        Raises:
            StoreTimeout: no shard at `address` answers within `timeout` seconds.
            SecurityError: one answers that will not have this process's token or certificate, or speaks TLS where
                this process does not, or the other way round.
        """
        security = Security.of_process(token)
        addresses = [address] if isinstance(address, str) else list(address)
        deadline = time.monotonic() + timeout
        while True:
            for candidate in addresses:
                link = _Link(candidate, security)
                try:
                    described = link.control("describe", {}, min(5.0, timeout))
                    return cls._from(described, timeout, security, find_map)
                except SecurityError:
                    raise
                except StoreError:
                    continue
                finally:
                    link.close()
            if time.monotonic() > deadline:
                raise StoreTimeout(f"no shard answered at {', '.join(addresses)} within {timeout:g} s: does it run?")
            time.sleep(0.1)

    @classmethod
    def _from(
        cls, described: dict[str, Any], timeout: float, security: Security, find_map: Callable[[], BlockMap | None]
    ) -> StoreClient:
        layout = Layout(described["blocks"], described["seed"])
        for tables in described["slabs"]:
            layout.add([TableSpec.model_validate(table) for table in tables])
        owners = np.array(described["owners"], np.uint16)
        block_map = BlockMap(described["epoch"], owners, tuple(described["addresses"]))
        return cls(layout, block_map, timeout, security, find_map)

    def _link(self, address: str) -> _Link:
        link = self._links.get(address)
        if link is None:
            link = self._links.setdefault(address, _Link(address, self._security))
        return link

    def _send(self, shard: int, request: PullRequest | PushRequest, timeout: float, on_answer: OnAnswer) -> None:
        addresses = self.block_map.addresses
        if shard >= len(addresses):
            on_answer(ConnectionError(f"shard {shard} has left the store"), None)
            return
        try:
            link = self._link(addresses[shard])
        except SecurityError as error:  # our own certificate's files are being renewed: they were good at the start
            on_answer(ConnectionError(str(error)), None)
            return
        sent = link.send(request, timeout, self.widths, on_answer, self.counters)
        self.counters.add("wire_bytes", sent)

    def control_at(
        self, address: str, method: str, arguments: Mapping[str, Any], within: float = CONTROL_SECONDS
    ) -> Any:
        return self._link(address).control(method, arguments, within)

    def close(self) -> None:
        super().close()
        for link in self._links.values():
            link.close()


class _Link:
    """The stream to one shard."""

    def __init__(self, address: str, security: Security) -> None:
        self.address = address
        self._security = security
        self._channel = security.channel(address, CLIENT_OPTIONS)
        self._exchange = self._channel.stream_stream(f"/{SERVICE}/Exchange")
        self._control = shard_pb2_grpc.ShardStub(self._channel).Control
        self._numbers = itertools.count(1)
        self._lock = threading.Lock()
        self._stream: _Stream | None = None

    def send(
        self, request: PullRequest | PushRequest, timeout: float, widths: list[int], on_answer: OnAnswer, counters: Any
    ) -> int:
        """Starts a call and returns its size in bytes."""
        header, arrays = encode_request(request, timeout)
        with self._lock:
            if self._stream is None or self._stream.broken:
                self._stream = _Stream(self._exchange, self.address, self._security)
            return self._stream.send(next(self._numbers), header, arrays, (request, widths, on_answer, counters))

    def control(self, method: str, arguments: Mapping[str, Any], timeout: float) -> Any:
        """Raises what the shard raised, SecurityError if it never will answer us, or StoreError if it does not."""
        request = pb.ControlRequest(method=method, arguments=json.dumps(dict(arguments)))
        try:
            reply = self._control(request, timeout=timeout, metadata=self._security.metadata)
        except grpc.RpcError as error:
            if why := self._security.diagnose(self.address, error):
                raise SecurityError(f"shard {self.address}: {why}") from None
            gone = error.code() is grpc.StatusCode.UNAVAILABLE
            kind = ShardUnavailable if gone else StoreError
            raise kind(f"shard {self.address}: {method} failed: {error.code().name} {error.details()}") from None
        if reply.error:
            name, _, message = reply.error.partition(": ")
            raise _ERRORS.get(name, StoreError)(message if name in _ERRORS else f"shard {self.address}: {reply.error}")
        return json.loads(reply.result)

    def close(self) -> None:
        self._channel.close()


class _Stream:
    """One incarnation of the stream, with a thread that reads its answers."""

    def __init__(self, exchange: Any, address: str, security: Security) -> None:
        self.address = address
        self._security = security
        self.broken = False
        self._open: dict[int, Any] = {}
        self._lock = threading.Lock()
        self._frames: queue.SimpleQueue[bytes | None] = queue.SimpleQueue()
        self._answers = exchange(self._outgoing(), metadata=security.metadata)
        threading.Thread(target=self._read, name=f"answers-{address}", daemon=True).start()

    def _outgoing(self) -> Iterator[bytes]:
        while (frame := self._frames.get()) is not None:
            yield frame

    def send(self, number: int, header: bytes, arrays: list[np.ndarray], call: Any) -> int:
        with self._lock:
            if not self.broken:
                self._open[number] = call
        if number not in self._open:
            call[2](ConnectionError(f"shard {self.address}: the stream broke"), None)
            return 0
        size = 0
        for frame in encode(number, header, arrays):
            size += len(frame)
            self._frames.put(frame)
        return size

    def _read(self) -> None:
        assembler = Assembler()
        reason = "the stream ended"
        spoke = False
        never: Refusal | None = None  # why no repetition could be answered
        try:
            for frame in self._answers:
                spoke = True
                done = assembler.add(frame)
                if done is None:
                    continue
                number, header, payload = done
                if number not in self._open:
                    raise FrameError(f"an answer to call {number}, which is not open")
                request, widths, on_answer, counters = self._open.pop(number)
                counters.add("wire_bytes", len(header) + len(payload))
                try:
                    reply, newer = decode_reply(header, payload, request, widths)
                except FrameError as error:
                    reply, newer = Refusal(INVALID, str(error)), None
                on_answer(reply, newer)
        except grpc.RpcError as error:
            reason = f"{error.code().name} {error.details()}"
            if not spoke and (why := self._security.diagnose(self.address, error)):
                never = Refusal(INVALID, why)
        except FrameError as error:
            reason = str(error)
            self._answers.cancel()
        self._frames.put(None)
        with self._lock:
            self.broken = True
            lost, self._open = self._open, {}
        for _, _, on_answer, _ in lost.values():
            on_answer(never or ConnectionError(f"shard {self.address}: {reason}"), None)
