"""Calls cut into frames and put together again: `Frame` of shard.proto, by hand so that no payload is copied twice.

Every frame is a valid protobuf `Frame` whose payload field comes last, at an offset that is a multiple of 16 from the
start of the Python bytes object's data, so that a received payload can be viewed as aligned arrays in place.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence

import numpy as np

FRAME_BYTES = 1 << 20
# One constant sets both ends' limits: gRPC's own default of 4 MB is raised and lowered in one place.
MAX_MESSAGE_BYTES = FRAME_BYTES + (1 << 16)
MAX_CALL_BYTES = 1 << 31
# Calls of one stream that were begun and not answered yet. A client keeps far fewer open.
MAX_OPEN_CALLS = 256
ALIGNMENT = 16

CHANNEL_OPTIONS = [
    ("grpc.max_send_message_length", MAX_MESSAGE_BYTES),
    ("grpc.max_receive_message_length", MAX_MESSAGE_BYTES),
    ("grpc.http2.max_frame_size", FRAME_BYTES),
    # The bandwidth probe resizes windows with extra round trips; on a fast local network it halves the throughput.
    # Without it windows stay as they begin, so they begin with room for several frames.
    ("grpc.http2.bdp_probe", 0),
    ("grpc.http2.lookahead_bytes", 8 * FRAME_BYTES),
    ("grpc.http2.write_buffer_size", 4 * FRAME_BYTES),
    # A read of the default 8 KiB each would cut a frame into a hundred pieces, every one copied three times.
    ("grpc.experimental.tcp_read_chunk_size", FRAME_BYTES // 2),
    ("grpc.experimental.tcp_min_read_chunk_size", FRAME_BYTES // 4),
    ("grpc.experimental.tcp_max_read_chunk_size", 2 * FRAME_BYTES),
]
# A machine that vanishes closes no connection. Who waits for an answer pings, and takes the connection for broken if
# nothing comes back: after 20 s at most, well before any deadline, and not because a process was stopped for a moment.
CALLER_OPTIONS = [
    *CHANNEL_OPTIONS,
    ("grpc.keepalive_time_ms", 10_000),
    # gRPC 1.85 waits for the answer to a ping as long as the second of these says, and 60 s without it; the first is
    # for bytes that the other machine does not confirm.
    ("grpc.keepalive_timeout_ms", 10_000),
    ("grpc.http2.ping_timeout_ms", 10_000),
    ("grpc.http2.max_pings_without_data", 0),  # no limit: an answer takes as long as the slowest worker
]

_CALL, _HEADER, _TOTAL, _PADDING, _PAYLOAD = 0x08, 0x12, 0x18, 0x22, 0x2A


class FrameError(ValueError):
    """Bytes that are no valid frame, or sizes that contradict each other or exceed the limits."""


def _varint(value: int) -> bytes:
    out = bytearray()
    while value > 0x7F:
        out.append((value & 0x7F) | 0x80)
        value >>= 7
    out.append(value)
    return bytes(out)


def _read_varint(frame: bytes, at: int) -> tuple[int, int]:
    value = shift = 0
    while at < len(frame) and shift < 64:
        byte = frame[at]
        at += 1
        value |= (byte & 0x7F) << shift
        if byte < 0x80:
            return value, at
        shift += 7
    raise FrameError("frame: a number is cut off or longer than 64 bits")


def _frame(prefix: bytes, pieces: Sequence[memoryview]) -> bytes:
    size = sum(len(piece) for piece in pieces)
    if size == 0:
        return prefix
    tail = b"\x2a" + _varint(size)
    pad = -(len(prefix) + 2 + len(tail)) % ALIGNMENT
    return b"".join((prefix, bytes((_PADDING, pad)), bytes(pad), tail, *pieces))


def encode(call: int, header: bytes, arrays: Iterable[np.ndarray]) -> Iterator[bytes]:
    """The frames of one call: its header, and the bytes of C-contiguous `arrays` one after another.

    Raises:
        FrameError: header or payload exceed the limits.
    """
    views = [a.reshape(-1).view(np.uint8).data for a in arrays if a.nbytes]
    total = sum(len(v) for v in views)
    if total > MAX_CALL_BYTES or len(header) > MAX_MESSAGE_BYTES // 2:
        raise FrameError(f"a call of {total} bytes exceeds the limit of {MAX_CALL_BYTES}: use smaller batches")
    number = b"\x08" + _varint(call)
    prefix = number + b"\x12" + _varint(len(header)) + header + b"\x18" + _varint(total)
    pieces: list[memoryview] = []
    room = FRAME_BYTES - len(prefix)
    for view in views:
        while len(view) > room:
            pieces.append(view[:room])
            yield _frame(prefix, pieces)
            view, pieces, prefix, room = view[room:], [], number, FRAME_BYTES
        pieces.append(view)
        room -= len(view)
    yield _frame(prefix, pieces)


class Decoded:
    """One parsed frame. `payload` is a view into the frame's own bytes."""

    __slots__ = ("call", "header", "payload", "total")

    def __init__(self, frame: bytes) -> None:
        self.call = 0
        self.header: bytes | None = None
        self.total = 0
        self.payload = memoryview(b"")
        at = 0
        while at < len(frame):
            tag = frame[at]
            value, at = _read_varint(frame, at + 1)
            if tag == _CALL:
                self.call = value
            elif tag == _TOTAL:
                self.total = value
            elif tag in (_HEADER, _PADDING, _PAYLOAD):
                if value > len(frame) - at:
                    raise FrameError(f"frame: a field of {value} bytes in a frame of {len(frame)}")
                if tag == _HEADER:
                    self.header = frame[at : at + value]
                elif tag == _PAYLOAD:
                    self.payload = memoryview(frame)[at : at + value]
                at += value
            else:
                raise FrameError(f"frame: unknown field tag {tag}")


class Assembler:
    """Puts the frames of interleaved calls together.

    Holds at most `limit` bytes, headers included, of at most MAX_OPEN_CALLS calls that are not complete.
    """

    def __init__(self, limit: int = MAX_CALL_BYTES) -> None:
        self.limit = limit
        self._open: dict[int, tuple[bytes, np.ndarray, int]] = {}
        self._held = 0

    def add(self, frame: bytes) -> tuple[int, bytes, np.ndarray] | None:
        """(call, header, payload uint8 [n]) once a call is complete, otherwise None.

        Raises:
            FrameError: not a frame, sizes that do not match, or more than the limit; the stream cannot go on.
        """
        part = Decoded(frame)
        if part.header is not None:
            if part.call in self._open:
                raise FrameError(f"call {part.call}: a second header")
            if len(part.payload) == part.total:
                return part.call, part.header, np.frombuffer(part.payload, np.uint8)
            if part.total + len(part.header) > self.limit - self._held:
                raise FrameError(f"call {part.call}: {part.total} bytes announced, the limit is {self.limit}")
            if len(self._open) == MAX_OPEN_CALLS:
                raise FrameError(f"call {part.call}: {MAX_OPEN_CALLS} others were begun and are not complete")
            header, buffer, filled = part.header, np.empty(part.total, np.uint8), 0
            self._held += part.total + len(header)
        elif part.call in self._open:
            header, buffer, filled = self._open[part.call]
        else:
            raise FrameError(f"call {part.call}: payload without a header")
        end = filled + len(part.payload)
        if end > len(buffer):
            raise FrameError(f"call {part.call}: {end} bytes received, {len(buffer)} announced")
        buffer[filled:end] = part.payload
        if end < len(buffer):
            self._open[part.call] = (header, buffer, end)
            return None
        self._open.pop(part.call, None)
        self._held -= len(buffer) + len(header)
        return part.call, header, buffer
