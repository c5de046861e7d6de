"""Bytes that nobody of ours sent, to either end: an error of the protocol, never another one, and nothing changes."""

from __future__ import annotations

import contextlib
from typing import Any

import numpy as np
import pytest
from embershard.parameter_server.blocks import BlockMap
from embershard.parameter_server.protocol.frames import Assembler, FrameError, encode
from embershard.parameter_server.protocol.messages import (
    decode_reply,
    decode_request,
    encode_reply,
    encode_request,
)
from embershard.parameter_server.requests import (
    Clock,
    PullReply,
    PullRequest,
    PushReply,
    PushRequest,
    Refusal,
    RowSet,
)
from embershard.parameter_server.server import ShardServer
from embershard.parameter_server.shard import Shard
from embershard.parameter_server.tables import Layout, Optimizer, TableSpec
from hypothesis import given, settings
from hypothesis import strategies as st

BLOCKS, WIDTH = 20, 3
PART = RowSet(0, np.array([0, 5, 6], np.uint32), np.array([0, 1], np.uint16), np.array([1, 2], np.uint32))
GRADS = np.ones((3, WIDTH), np.float32)
REQUESTS = [
    PullRequest([PART], Clock(1, 1)),
    PullRequest([PART]),
    PushRequest(7, 1, [PART], [GRADS], [0.1], Clock(1, 1)),
    PushRequest(7, 1, [PART], [GRADS], [0.1], Clock(1, 1, sync=True)),
]


@pytest.fixture(scope="module")
def server() -> ShardServer:
    """Not started: its calls are made by hand."""
    shard = Shard(0, Layout(BLOCKS))
    shard.set_block_map(BlockMap.initial(BLOCKS, ("here",)))
    shard.create_tables([TableSpec(name="t", rows=5 * BLOCKS, width=WIDTH, optimizer=Optimizer(kind="sgd"))])
    shard.begin(1, 1, 0)
    return ShardServer(shard)


@st.composite
def mutated(draw: Any, original: bytes) -> bytes:
    """Some bytes changed, cut off, doubled or put in."""
    data = bytearray(original)
    for _ in range(draw(st.integers(1, 4))):
        at = draw(st.integers(0, max(0, len(data) - 1)))
        what = draw(st.sampled_from(["flip", "cut", "insert", "double"]))
        if what == "flip" and data:
            data[at] ^= 1 << draw(st.integers(0, 7))
        elif what == "cut":
            del data[at : at + draw(st.integers(1, 8))]
        elif what == "insert":
            data[at:at] = draw(st.binary(min_size=1, max_size=8))
        else:
            data += data[at : at + 20]
    return bytes(data)


def parts_of(request: PullRequest | PushRequest) -> tuple[bytes, bytes]:
    header, arrays = encode_request(request, 1.0)
    return header, b"".join(array.tobytes() for array in arrays)


@settings(max_examples=150, deadline=None)
@given(st.data())
def test_a_request_is_read_or_refused(server: ShardServer, data: Any) -> None:
    header, payload = parts_of(data.draw(st.sampled_from(REQUESTS)))
    header = data.draw(st.one_of(mutated(header), st.binary(max_size=60), st.just(header)))
    payload = data.draw(st.one_of(mutated(payload), st.just(payload)))
    for done in server._handle(None, 1, header, np.frombuffer(payload, np.uint8)):
        assert isinstance(done.reply, PullReply | PushReply | Refusal)
    assert server.shard.statistics()["tables"] == 1
    (whole,) = server.shard.pull(PullRequest([PART]), None, 0.0)
    assert np.isfinite(whole.reply.rows[0]).all()


@settings(max_examples=100, deadline=None)
@given(st.data())
def test_a_request_in_frames_that_are_damaged(server: ShardServer, data: Any) -> None:
    header, payload = parts_of(data.draw(st.sampled_from(REQUESTS)))
    (frame,) = encode(1, header, [np.frombuffer(payload, np.uint8)])
    assembler = Assembler(limit=1 << 16)
    with contextlib.suppress(FrameError):
        for damaged in (data.draw(mutated(frame)), frame):
            if (call := assembler.add(damaged)) is not None:
                decode_request(*call[1:], [WIDTH])


@settings(max_examples=150, deadline=None)
@given(st.data())
def test_a_reply_is_read_or_an_error(data: Any) -> None:
    request = data.draw(st.sampled_from([REQUESTS[1], REQUESTS[2]]))
    statuses = [np.array(data.draw(st.sampled_from([[0, 0], [0, 2]])), np.uint8)]
    rows = [GRADS[: 3 if statuses[0][1] == 0 else 1]]
    reply = PullReply(statuses, rows) if isinstance(request, PullRequest) else PushReply(statuses)
    newer = data.draw(st.sampled_from([None, BlockMap.initial(BLOCKS, ("here", "there"))]))
    header, arrays = encode_reply(reply, newer)
    payload = b"".join(array.tobytes() for array in arrays)
    header = data.draw(st.one_of(mutated(header), st.binary(max_size=60)))
    payload = data.draw(st.one_of(mutated(payload), st.just(payload)))
    with contextlib.suppress(FrameError):
        got, block_map = decode_reply(header, np.frombuffer(payload, np.uint8), request, [WIDTH])
        if isinstance(got, PushReply):
            assert max(max(status) for status in got.statuses) <= 2
        if isinstance(got, PullReply):
            assert [len(status) for status in got.statuses] == [2]
        assert block_map is None or block_map.owners.max() < len(block_map.addresses)


@pytest.mark.parametrize(
    ("statuses", "newer", "message"),
    [
        ([0, 9], None, "a status that this kind of call does not have"),
        ([0, 1], None, "a status that this kind of call does not have"),
        ([0, 0], BlockMap(1, np.array([0, 5], np.uint16), ("one",)), "owners are not among its 1 addresses"),
    ],
)
def test_replies_that_would_be_believed(statuses: list, newer: BlockMap | None, message: str) -> None:
    header, _ = encode_reply(PullReply([np.array(statuses, np.uint8)], [GRADS]), newer)
    with pytest.raises(FrameError, match=message):
        decode_reply(header, GRADS.reshape(-1).view(np.uint8), REQUESTS[1], [WIDTH])
