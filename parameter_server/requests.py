"""What a pull and a push say, independent of how they travel."""

from __future__ import annotations

from dataclasses import dataclass, field
from enum import IntEnum

import numpy as np


class BlockStatus(IntEnum):
    """What became of one block's part of a call. APPLIED and DUPLICATE acknowledge; MOVED applied nothing."""

    APPLIED = 0
    DUPLICATE = 1
    MOVED = 2


@dataclass(frozen=True, slots=True)
class Clock:
    """Where in training a call stands. A call without a clock (evaluation, tools) is never held back.

    A pull for `step` sees every worker's pushes up to `step - 1 - staleness`. With `sync` the pushes of a step are
    added in rank order and applied as one.
    """

    generation: int
    step: int
    rank: int = 0
    workers: int = 1
    staleness: int = 0
    sync: bool = False


@dataclass(slots=True)
class RowSet:
    """Distinct rows of one slab, grouped by block.

    index: slab rows, uint32 or uint64 [U]; blocks: uint16 [K], distinct; counts: uint32 [K], summing to U; the first
    counts[0] entries of index lie in blocks[0], and so on.
    """

    slab: int
    index: np.ndarray
    blocks: np.ndarray
    counts: np.ndarray

    def select(self, keep: np.ndarray) -> tuple[RowSet, np.ndarray]:
        """The blocks where `keep` (bool [K]) is true, and the mask (bool [U]) of their rows."""
        rows = np.repeat(keep, self.counts)
        return RowSet(self.slab, self.index[rows], self.blocks[keep], self.counts[keep]), rows


@dataclass(slots=True)
class PullRequest:
    """Read rows. One per shard and step, for all slabs."""

    parts: list[RowSet]
    clock: Clock | None = None
    epoch: int = 0


@dataclass(slots=True)
class PullReply:
    """statuses: uint8 [K] per part; rows: float32 [rows of the owned blocks, width] per part, in the order asked."""

    statuses: list[np.ndarray]
    rows: list[np.ndarray]


@dataclass(slots=True)
class PushRequest:
    """Summed gradients of distinct rows. The unit of refusal, deduplication and application is one block's part.

    client: 64-bit number of one worker incarnation; sequence: grows by one per push of a client, the same on every
    shard and in every repetition; grads: float32 [U, width] per part; learning_rates: one per part.
    """

    client: int
    sequence: int
    parts: list[RowSet]
    grads: list[np.ndarray]
    learning_rates: list[float]
    clock: Clock | None = None
    epoch: int = 0

    def touched(self, blocks: int) -> np.ndarray:
        """int64 [K]: those of `blocks` blocks that any part holds, each once."""
        if len(self.parts) == 1:
            return self.parts[0].blocks.astype(np.int64)
        touched = np.zeros(blocks, np.bool_)
        for part in self.parts:
            touched[part.blocks] = True
        return touched.nonzero()[0]


@dataclass(slots=True)
class PushReply:
    """statuses: uint8 [K] per part (BlockStatus)."""

    statuses: list[np.ndarray]


@dataclass(slots=True)
class Refusal:
    """The whole call was refused and nothing of it applied. `code` is one of the constants below."""

    code: str
    message: str


FENCED = "FENCED"  # an older generation, or one the shard has not been told of
INVALID = "INVALID"  # sizes, rows or values that cannot be right
TOO_OLD = "TOO_OLD"  # a sequence number below the ledger's window: neither new nor provably a duplicate
NOT_WRITTEN = "NOT_WRITTEN"  # the journal cannot be written, so nothing may be acknowledged
TIMEOUT = "TIMEOUT"  # the call waited for others until its deadline; the message names them
LATER = "LATER"  # not now: the same call is sent again after a moment

Reply = PullReply | PushReply | Refusal


@dataclass(slots=True)
class Completed:
    """A call that can be answered now. `token` is what the server handed in with the call."""

    token: object
    reply: Reply = field(repr=False)
