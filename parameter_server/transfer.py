"""Blocks on their way over gRPC: the shard that gets them asks the shard that has them (`Transfer` of shard.proto)."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import grpc
import numpy as np

from .protocol import shard_pb2 as pb
from .protocol.frames import Assembler, FrameError, encode
from .protocol.messages import SERVICE
from .records import JournalError, decode_tensors, encode_tensors
from .store import StoreError

METHOD = "Transfer"
SECONDS = 600.0  # for one call


def encode_block(call: int, tensors: Mapping[str, np.ndarray]) -> Iterator[bytes]:
    """The frames of one block. Rows are read when their frame is made, so that no copy of the block is held."""
    return encode(call, *encode_tensors({}, tensors))


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
                yield left.pop(0), decode_tensors(header, payload)[1], len(payload)
    except grpc.RpcError as error:
        raise StoreError(f"blocks from shard {address}: {error.code().name} {error.details()}") from None
    except (FrameError, JournalError) as error:
        raise StoreError(f"blocks from shard {address}: {error}") from None
    if left:
        raise StoreError(f"blocks from shard {address}: the answer ended before block {left[0]}")
