"""Pulls and pushes (`requests.py`) as headers and payloads of shard.proto, and back; every stated size is checked."""

from __future__ import annotations

import numpy as np

from ..blocks import BlockMap
from ..requests import BlockStatus, Clock, PullReply, PullRequest, PushReply, PushRequest, Refusal, Reply, RowSet
from . import shard_pb2 as pb
from .frames import MAX_CALL_BYTES, FrameError

SERVICE = pb.DESCRIPTOR.services_by_name["Shard"].full_name
_ALIGN = 8
_STATUSES_OF_PUSH = [BlockStatus.APPLIED, BlockStatus.DUPLICATE, BlockStatus.MOVED]
_STATUSES_OF_PULL = [BlockStatus.APPLIED, BlockStatus.MOVED]


def encode_request(request: PullRequest | PushRequest, timeout: float) -> tuple[bytes, list[np.ndarray]]:
    """Header and payload arrays of a call that may wait `timeout` seconds for others."""
    push = isinstance(request, PushRequest)
    header = pb.Request(push=push, epoch=request.epoch, timeout_ms=max(1, int(timeout * 1000)))
    if (clock := request.clock) is not None:
        header.clock.generation, header.clock.step = clock.generation, clock.step
        header.clock.rank, header.clock.workers = clock.rank, clock.workers
        header.clock.staleness, header.clock.sync = clock.staleness, clock.sync
    arrays = []
    for rows in request.parts:
        header.parts.add(
            slab=rows.slab,
            index_bytes=rows.index.dtype.itemsize,
            blocks=rows.blocks.tobytes(),
            counts=rows.counts.tobytes(),
        )
        arrays.append(rows.index)
    if isinstance(request, PushRequest):
        header.client, header.sequence = request.client, request.sequence
        for part, rate in zip(header.parts, request.learning_rates, strict=True):
            part.learning_rate = rate
        arrays.append(np.zeros(-sum(a.nbytes for a in arrays) % _ALIGN, np.uint8))
        arrays += request.grads
    return header.SerializeToString(), arrays


def decode_request(header: bytes, payload: np.ndarray, widths: list[int]) -> tuple[PullRequest | PushRequest, float]:
    """The request, viewing `payload`, and its timeout in seconds. `widths`: floats per row of each slab.

    Raises:
        FrameError: a header that cannot be read, an unknown slab, or sizes that do not add up.
    """
    try:
        message = pb.Request.FromString(header)
    except Exception as error:
        raise FrameError(f"a request header that cannot be read: {error}") from None
    clock = None
    if message.HasField("clock"):
        c = message.clock
        clock = Clock(c.generation, c.step, c.rank, c.workers, c.staleness, c.sync)
    parts, at = [], 0
    for part in message.parts:
        if part.slab >= len(widths):
            raise FrameError(f"slab {part.slab} is unknown: the shard holds {len(widths)}")
        if part.index_bytes not in (4, 8) or len(part.blocks) % 2 or len(part.counts) != 2 * len(part.blocks):
            raise FrameError(f"slab {part.slab}: blocks, counts or index width do not match")
        counts = np.frombuffer(part.counts, np.uint32)
        size = int(counts.sum(dtype=np.uint64)) * part.index_bytes
        if size > len(payload) - at:
            raise FrameError(
                f"slab {part.slab}: an index of {size} bytes, {len(payload) - at} bytes left in the payload"
            )
        index = payload[at : at + size].view(np.uint32 if part.index_bytes == 4 else np.uint64)
        parts.append(RowSet(part.slab, _aligned(index), np.frombuffer(part.blocks, np.uint16), counts))
        at += size
    timeout = message.timeout_ms / 1000
    if not message.push:
        _expect_end(at, payload)
        answer = sum(len(rows.index) * widths[rows.slab] * 4 for rows in parts)
        if answer > MAX_CALL_BYTES:
            raise FrameError(f"a pull of {answer} bytes exceeds the limit of {MAX_CALL_BYTES}: use smaller batches")
        return PullRequest(parts, clock, message.epoch), timeout
    at += -at % _ALIGN
    grads = []
    for rows in parts:
        size = len(rows.index) * widths[rows.slab] * 4
        if size > len(payload) - at:
            raise FrameError(f"slab {rows.slab}: gradients of {size} bytes, {max(0, len(payload) - at)} bytes left")
        grads.append(payload[at : at + size].view(np.float32).reshape(-1, widths[rows.slab]))
        at += size
    _expect_end(at, payload)
    rates = [part.learning_rate for part in message.parts]
    return PushRequest(message.client, message.sequence, parts, grads, rates, clock, message.epoch), timeout


def encode_reply(reply: Reply, newer: BlockMap | None) -> tuple[bytes, list[np.ndarray]]:
    """Header and payload arrays of an answer; `newer` is the shard's block map where the caller's is older."""
    header = pb.Reply()
    arrays: list[np.ndarray] = []
    if isinstance(reply, Refusal):
        header.refusal, header.message = reply.code, reply.message
    else:
        header.statuses.extend(s.tobytes() for s in reply.statuses)
        if isinstance(reply, PullReply):
            arrays = reply.rows
    if newer is not None:
        header.block_map.epoch, header.block_map.owners = newer.epoch, newer.owners.tobytes()
        header.block_map.addresses.extend(newer.addresses)
    return header.SerializeToString(), arrays


def decode_reply(
    header: bytes, payload: np.ndarray, request: PullRequest | PushRequest, widths: list[int]
) -> tuple[Reply, BlockMap | None]:
    """The answer to `request`, viewing `payload`, and the shard's block map if it is newer.

    Raises:
        FrameError: an answer that cannot be read or does not fit the request.
    """
    try:
        message = pb.Reply.FromString(header)
    except Exception as error:
        raise FrameError(f"a reply header that cannot be read: {error}") from None
    newer = None
    if message.HasField("block_map"):
        m = message.block_map
        if len(m.owners) % 2:
            raise FrameError(f"a block map whose owners are {len(m.owners)} bytes")
        newer = BlockMap(m.epoch, np.frombuffer(m.owners, np.uint16), tuple(m.addresses))
        if newer.blocks == 0 or int(newer.owners.max()) >= len(newer.addresses):
            raise FrameError(f"a block map whose owners are not among its {len(newer.addresses)} addresses")
    if message.refusal:
        return Refusal(message.refusal, message.message), newer
    statuses = [np.frombuffer(s, np.uint8) for s in message.statuses]
    if len(statuses) != len(request.parts) or any(
        len(s) != len(p.blocks) for s, p in zip(statuses, request.parts, strict=True)
    ):
        raise FrameError("a reply whose blocks are not those of its request")
    known = _STATUSES_OF_PUSH if isinstance(request, PushRequest) else _STATUSES_OF_PULL
    if any(status.any() and not np.isin(status, known).all() for status in statuses):
        raise FrameError("a reply with a status that this kind of call does not have")
    if isinstance(request, PushRequest):
        _expect_end(0, payload)
        return PushReply(statuses), newer
    rows, at = [], 0
    for part, status in zip(request.parts, statuses, strict=True):
        owned = int(part.counts[status == 0].sum(dtype=np.uint64)) if status.any() else len(part.index)
        size = owned * widths[part.slab] * 4
        if size > len(payload) - at:
            raise FrameError(f"slab {part.slab}: rows of {size} bytes, {len(payload) - at} bytes left in the reply")
        rows.append(payload[at : at + size].view(np.float32).reshape(owned, widths[part.slab]))
        at += size
    _expect_end(at, payload)
    return PullReply(statuses, rows), newer


def _aligned(array: np.ndarray) -> np.ndarray:
    return array if array.flags.aligned else array.copy()


def _expect_end(at: int, payload: np.ndarray) -> None:
    if at != len(payload):
        raise FrameError(f"a payload of {len(payload)} bytes where {at} were described")
