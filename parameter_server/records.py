"""What a shard writes down before it changes anything, so that doing it again gives the same shard. Pure; no I/O.

A record is a kind, a header and arrays. Of a push the record holds what was applied of it and nothing else: what was
decided is not decided again.
"""

from __future__ import annotations

import json
import struct
from collections.abc import Iterator, Mapping, Sequence
from enum import IntEnum
from typing import Any, Protocol

import numpy as np

from .protocol.frames import FrameError
from .protocol.messages import decode_request, encode_request
from .requests import BlockStatus, PushRequest
from .store import StoreError

_COUNT, _SIZES = struct.Struct("<I"), struct.Struct("<IQ")
ALIGNMENT = 8
_DTYPES = ("float32", "int64", "uint64", "uint32")


class Kind(IntEnum):
    """What a record is about. The numbers are part of the format."""

    TABLES = 1
    BLOCK_MAP = 2
    BEGIN = 3
    PUSHES = 4  # applied as one: gradients are added in the order in which the pushes stand
    BLOCK = 5  # tables of one block, and its ledger, overwritten
    ROWS = 6  # rows of one slab overwritten
    RESET = 7
    INCOMING = 8  # a block, or what changed of it, from another shard; a later block map may make it this shard's own
    SEAL = 9
    CANCEL_MOVES = 10
    JOIN = 11


class JournalError(StoreError):
    """A journal that cannot be written or read: one line with the file, and where in it."""


class Journal(Protocol):
    """Where records go."""

    def append(self, kind: Kind, header: bytes, arrays: Sequence[np.ndarray]) -> None:
        """Returns once the record would survive the process. Raises JournalError: nothing of it was kept."""

    def statistics(self) -> dict[str, int]:
        """What of it is worth counting, by name."""

    def port(self) -> int:
        """Where the shard listened last; 0 if that is not known."""

    def remember_port(self, port: int) -> None:
        """Keeps what `port` says."""


def encode_json(content: Mapping[str, Any]) -> bytes:
    return json.dumps(content).encode()


def decode_json(header: bytes) -> dict[str, Any]:
    """Raises JournalError if it is none."""
    try:
        content = json.loads(header)
    except (ValueError, RecursionError):
        content = None
    if not isinstance(content, dict):
        raise JournalError("the header of a record is no JSON object")
    return content


def encode_tensors(content: Mapping[str, Any], tensors: Mapping[str, np.ndarray]) -> tuple[bytes, list[np.ndarray]]:
    """A header with `content` and what the arrays are, and the arrays."""
    described = {name: [value.dtype.name, *value.shape] for name, value in tensors.items()}
    arrays = []
    for value in tensors.values():
        arrays += [np.ascontiguousarray(value), *_padding(value.nbytes)]
    return encode_json({**content, "tensors": described}), arrays


def decode_tensors(header: bytes, payload: np.ndarray) -> tuple[dict[str, Any], dict[str, np.ndarray]]:
    """What `encode_tensors` was given; the arrays view `payload`. Raises JournalError if sizes do not add up."""
    content = decode_json(header)
    tensors, at = {}, 0
    try:
        for name, (dtype, *shape) in content.pop("tensors").items():
            if dtype not in _DTYPES or any(not isinstance(side, int) or side < 0 for side in shape):
                raise JournalError(f"tensor {name!r} is {dtype}{shape}")
            size = np.dtype(dtype).itemsize
            for side in shape:
                size *= side
            if size > len(payload) - at:
                raise JournalError(f"tensor {name!r} has {size} bytes where {len(payload) - at} are left")
            tensors[name] = payload[at : at + size].view(dtype).reshape(shape)
            at += size + -size % ALIGNMENT
    except (KeyError, AttributeError, TypeError, ValueError, OverflowError) as error:
        raise JournalError(f"the tensors of a record are not described: {error!r}") from None
    return content, tensors


def encode_pushes(decided: Sequence[tuple[PushRequest, np.ndarray]]) -> tuple[bytes, list[np.ndarray]]:
    """Pushes with the statuses (uint8 [blocks]) that were decided for them: what is applied, and the clocks."""
    sizes, headers, arrays = [_COUNT.pack(len(decided))], [], []
    for request, statuses in decided:
        header, these = encode_request(applied_part(request, statuses), 0.0)
        total = sum(array.nbytes for array in these)
        sizes.append(_SIZES.pack(len(header), total))
        headers.append(header)
        arrays += [*these, *_padding(total)]
    return b"".join((*sizes, *headers)), arrays


def decode_pushes(header: bytes, payload: np.ndarray, widths: list[int]) -> list[PushRequest]:
    """What `encode_pushes` kept, viewing `payload`. Raises JournalError if sizes do not add up."""
    try:
        return list(_decode_pushes(header, payload, widths))
    except (FrameError, struct.error) as error:
        raise JournalError(f"a push that cannot be read: {error}") from None


def _decode_pushes(header: bytes, payload: np.ndarray, widths: list[int]) -> Iterator[PushRequest]:
    (count,) = _COUNT.unpack_from(header)
    if count > len(header) // _SIZES.size:
        raise FrameError(f"{count} pushes in a header of {len(header)} bytes")
    at, start = _COUNT.size + count * _SIZES.size, 0
    for i in range(count):
        length, size = _SIZES.unpack_from(header, _COUNT.size + i * _SIZES.size)
        if length > len(header) - at or size > len(payload) - start:
            raise FrameError(f"push {i} is longer than its record")
        request, _ = decode_request(header[at : at + length], payload[start : start + size], widths)
        if not isinstance(request, PushRequest):
            raise FrameError("a pull stands where a push should")
        yield request
        at += length
        start += size + -size % ALIGNMENT


def applied_part(request: PushRequest, statuses: np.ndarray) -> PushRequest:
    """The blocks of a push whose part is applied. Every part stays, if need be without rows, for its learning rate."""
    parts, grads = [], []
    for part, these in zip(request.parts, request.grads, strict=True):
        new = statuses[part.blocks] == BlockStatus.APPLIED
        if new.all():
            parts.append(part)
            grads.append(these)
        else:
            kept, rows = part.select(new)
            parts.append(kept)
            grads.append(these[rows])
    return PushRequest(request.client, request.sequence, parts, grads, request.learning_rates, request.clock)


def _padding(size: int) -> list[np.ndarray]:
    return [np.zeros(-size % ALIGNMENT, np.uint8)] if size % ALIGNMENT else []
