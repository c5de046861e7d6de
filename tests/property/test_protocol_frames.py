"""Frames: what is cut comes together again, whatever the sizes and the interleaving; hostile bytes are an error."""

import contextlib

import numpy as np
import pytest
from embershard.parameter_server.protocol import frames
from embershard.parameter_server.protocol import shard_pb2 as pb
from embershard.parameter_server.protocol.frames import Assembler, Decoded, FrameError, encode
from hypothesis import given, settings
from hypothesis import strategies as st

SIZES = st.lists(st.integers(0, 3000), max_size=5)


@pytest.fixture(autouse=True, scope="module")
def small_frames():
    patch = pytest.MonkeyPatch()
    patch.setattr(frames, "FRAME_BYTES", 512)
    yield
    patch.undo()


@settings(max_examples=60, deadline=None)
@given(calls=st.lists(st.tuples(st.binary(max_size=200), SIZES), min_size=1, max_size=4), data=st.data())
def test_interleaved_calls_come_together(calls, data):
    rng = np.random.default_rng(0)
    sent = {}
    queues = []
    for number, (header, sizes) in enumerate(calls, start=1):
        arrays = [rng.integers(0, 256, size, dtype=np.uint8) for size in sizes]
        sent[number] = (header, b"".join(a.tobytes() for a in arrays))
        queues.append(list(encode(number, header, arrays)))
    assembler, got = Assembler(), {}
    while queues:
        pick = data.draw(st.integers(0, len(queues) - 1))
        frame = queues[pick].pop(0)
        assert len(frame) <= frames.FRAME_BYTES + 64
        done = assembler.add(frame)
        if done is not None:
            got[done[0]] = (done[1], done[2].tobytes())
        if not queues[pick]:
            del queues[pick]
    assert got == sent


@settings(max_examples=40, deadline=None)
@given(call=st.integers(0, 2**63), header=st.binary(min_size=1, max_size=100), size=st.integers(1, 300))
def test_frames_are_the_protobuf_message_and_their_payload_is_aligned(call, header, size):
    payload = np.arange(size, dtype=np.uint8)
    (frame,) = encode(call, header, [payload])
    message = pb.Frame.FromString(frame)
    assert (message.call, message.header, message.payload_bytes) == (call, header, size)
    assert message.payload == payload.tobytes()
    view = np.frombuffer(Decoded(frame).payload, np.uint8)
    assert (view.ctypes.data - np.frombuffer(frame, np.uint8).ctypes.data) % frames.ALIGNMENT == 0


@settings(max_examples=150, deadline=None)
@given(st.binary(max_size=80))
def test_arbitrary_bytes_are_an_error_or_a_frame(noise):
    with contextlib.suppress(FrameError):
        Assembler(limit=1 << 16).add(noise)


def test_announced_gigabytes_are_refused_before_memory_is_allocated():
    frame = pb.Frame(call=1, header=b"h", payload_bytes=1 << 40, payload=b"x").SerializeToString()
    with pytest.raises(FrameError, match="the limit is"):
        Assembler().add(frame)


def test_more_payload_than_announced_is_refused():
    assembler = Assembler()
    assembler.add(pb.Frame(call=1, header=b"h", payload_bytes=4, payload=b"ab").SerializeToString())
    with pytest.raises(FrameError, match="5 bytes received, 4 announced"):
        assembler.add(pb.Frame(call=1, payload=b"cde").SerializeToString())
