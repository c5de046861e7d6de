"""Blocks on their way over gRPC: the shard that gets them asks the shard that has them (`Transfer` of shard.proto)."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import grpc
import numpy as np

from .protocol import shard_pb2 as pb
from .protocol.frames import Assembler, FrameError, encode
from .store import StoreError

METHOD = "Transfer"
SECONDS = 600.0  # for one call
SERVICE = pb.DESCRIPTOR.services_by_name["Shard"].full_name
_DTYPES = {name: np.dtype(name) for name in ("float32", "int64", "uint64")}


def encode_tensors(call: int, tensors: Mapping[str, np.ndarray]) -> Iterator[bytes]:
    """The frames of one block. Rows are read when their frame is made, so that no copy of the block is held."""
    ordered = sorted(tensors.items(), key=lambda item: -item[1].dtype.itemsize)  # keeps every tensor aligned
    header = pb.TransferHeader()
    for name, tensor in ordered:
        header.tensors.add(name=name, dtype=tensor.dtype.name, shape=tensor.shape)
    return encode(call, header.SerializeToString(), [np.ascontiguousarray(tensor) for _, tensor in ordered])


def decode_tensors(header: bytes, payload: np.ndarray) -> dict[str, np.ndarray]:
    """The tensors, viewing `payload`.

    Raises:
        FrameError: a header that cannot be read, or sizes that do not add up.
    """
    try:
        described = pb.TransferHeader.FromString(header).tensors
    except Exception as error:
        raise FrameError(f"a transfer header that cannot be read: {error}") from None
    tensors, at = {}, 0
    for tensor in described:
        if tensor.dtype not in _DTYPES:
            raise FrameError(f"tensor {tensor.name!r} is {tensor.dtype!r}, not one of {', '.join(_DTYPES)}")
        dtype, shape = _DTYPES[tensor.dtype], tuple(tensor.shape)
        size = math.prod(shape) * dtype.itemsize
        if size > len(payload) - at:
            raise FrameError(f"tensor {tensor.name!r} has {size} bytes, {len(payload) - at} bytes left in the payload")
        tensors[tensor.name] = payload[at : at + size].view(dtype).reshape(shape)
        at += size
    if at != len(payload):
        raise FrameError(f"a payload of {len(payload)} bytes where {at} were described")
    return tensors


def fetch(
    channel: grpc.Channel,
    address: str,
    blocks: Sequence[int],
    move: str,
    *,
    metadata: Any,
    changes: bool,
    seal: bool,
) -> Iterator[tuple[int, dict[str, np.ndarray], int]]:
    """Blocks of the shard at `address`, or what changed of them (and nothing after, with `seal`): each with its bytes.

    Raises:
        StoreError: that shard refuses, does not answer within `SECONDS`, or sends what cannot be read.
    """
    request = pb.TransferRequest(blocks=blocks, changes=changes, seal=seal, move=move).SerializeToString()
    assembler, left = Assembler(), list(blocks)
    try:
        call = channel.unary_stream(f"/{SERVICE}/{METHOD}")
        for frame in call(request, timeout=SECONDS, metadata=metadata):
            if (done := assembler.add(frame)) is not None:
                if not left:
                    raise FrameError("more blocks than were asked for")
                _, header, payload = done
                yield left.pop(0), decode_tensors(header, payload), len(payload)
    except grpc.RpcError as error:
        raise StoreError(f"blocks from shard {address}: {error.code().name} {error.details()}") from None
    except FrameError as error:
        raise StoreError(f"blocks from shard {address}: {error}") from None
    if left:
        raise StoreError(f"blocks from shard {address}: the answer ended before block {left[0]}")
