"""What one stream can make a shard hold: calls and bytes, begun, waiting and unsent."""

from __future__ import annotations

import asyncio

import numpy as np
import pytest
from embershard.parameter_server import server
from embershard.parameter_server.protocol import frames
from embershard.parameter_server.protocol import shard_pb2 as pb
from embershard.parameter_server.protocol.frames import MAX_OPEN_CALLS, Assembler, FrameError
from embershard.parameter_server.protocol.messages import decode_request
from embershard.parameter_server.requests import INVALID, PullReply, Refusal


def first_frame(call: int, header: bytes, announced: int) -> bytes:
    return pb.Frame(call=call, header=header, payload_bytes=announced).SerializeToString()


def rest(call: int, payload: bytes) -> bytes:
    return pb.Frame(call=call, payload=payload).SerializeToString()


def test_calls_that_are_never_completed_are_counted() -> None:
    assembler = Assembler()
    for call in range(MAX_OPEN_CALLS):
        assert assembler.add(first_frame(call, b"h", 1)) is None
    with pytest.raises(FrameError, match=f"call 1000: {MAX_OPEN_CALLS} others were begun and are not complete"):
        assembler.add(first_frame(1000, b"h", 1))
    assert assembler.add(rest(3, b"x")) is not None
    assert assembler.add(first_frame(1000, b"h", 1)) is None


def test_headers_count_as_bytes_that_are_held() -> None:
    assembler = Assembler(limit=1000)
    assert assembler.add(first_frame(1, b"h" * 600, 1)) is None
    with pytest.raises(FrameError, match="the limit is 1000"):
        assembler.add(first_frame(2, b"h" * 600, 1))
    assert assembler.add(rest(1, b"x")) == (1, b"h" * 600, np.frombuffer(b"x", np.uint8))
    assert assembler.add(first_frame(2, b"h" * 600, 1)) is None


def test_a_pull_whose_answer_would_be_too_large() -> None:
    """Refused before a byte of the answer is allocated: 513 indices ask for more than 2 GiB of rows."""
    count, width = 513, 1 << 20
    part = pb.Part(slab=0, index_bytes=4, blocks=bytes(2), counts=np.uint32(count).tobytes())
    header = pb.Request(parts=[part]).SerializeToString()
    payload = np.zeros(4 * count, np.uint8)
    with pytest.raises(FrameError, match=f"a pull of {count * width * 4} bytes exceeds the limit of 2147483648"):
        decode_request(header, payload, [width])
    decode_request(header, payload, [width // 2])


class SlowClient:
    """A client that takes nothing until `gate` is set."""

    def __init__(self) -> None:
        self.gate = asyncio.Event()

    async def write(self, _: bytes) -> None:
        await self.gate.wait()


async def waits(stream: server._Stream) -> asyncio.Task[None]:
    """A call that was read and has to wait for room."""
    begun = asyncio.ensure_future(stream.begin())
    for _ in range(10):
        await asyncio.sleep(0)
    assert not begun.done()
    return begun


def test_a_client_that_takes_no_answers_is_not_read_any_further() -> None:
    async def scenario() -> None:
        client = SlowClient()
        stream = server._Stream(client)
        for _ in range(MAX_OPEN_CALLS):
            await stream.begin()
        stream.answer(1, Refusal(INVALID, "no"), None)
        begun = await waits(stream)
        client.gate.set()
        await asyncio.wait_for(begun, 10)
        stream.close()

    asyncio.run(scenario())


def test_nor_is_one_whose_answers_are_large(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(server, "MAX_CALL_BYTES", 1000)

    async def scenario() -> None:
        client = SlowClient()
        stream = server._Stream(client)
        for call in range(2):
            await stream.begin()
            stream.answer(call, PullReply([np.zeros(1, np.uint8)], [np.zeros((100, 2), np.float32)]), None)
        begun = await waits(stream)
        client.gate.set()
        await asyncio.wait_for(begun, 10)
        stream.close()

    asyncio.run(scenario())


def test_a_client_keeps_fewer_pushes_open_than_a_stream_takes() -> None:
    from embershard.parameter_server.sharded import MAX_OPEN_PUSHES

    assert 2 * MAX_OPEN_PUSHES < frames.MAX_OPEN_CALLS
