"""One pull or push on its way: spread over shards, answered in pieces, done when every block is answered."""

from __future__ import annotations

import threading
from abc import ABC, abstractmethod
from collections.abc import Sequence
from concurrent.futures import Future
from typing import Any

import numpy as np

from .requests import BlockStatus, Clock, PullReply, PullRequest, PushReply, PushRequest, RowSet
from .routing import Share


class Operation(ABC):
    """Counts the calls that are still open; `future` completes with the last one, or with the first error."""

    def __init__(self, clock: Clock | None, deadline: float) -> None:
        self.clock = clock
        self.deadline = deadline
        self.future: Future[Any] = Future()
        self.waiting_for: dict[int, int] = {}  # shard -> calls not answered yet
        self.sent_again = ""  # why the last call that had to be
        self._lock = threading.Lock()

    def sent(self, shards: Sequence[int]) -> None:
        with self._lock:
            for shard in shards:
                self.waiting_for[shard] = self.waiting_for.get(shard, 0) + 1

    def answered(self, shard: int) -> bool:
        """One call to `shard` is settled; True if it was the last one of all."""
        with self._lock:
            self.waiting_for[shard] -= 1
            if self.waiting_for[shard] == 0:
                del self.waiting_for[shard]
            return not self.waiting_for

    def fail(self, error: Exception) -> None:
        with self._lock:
            if self.future.done():
                return
            self.future.set_exception(error)

    def succeed(self) -> None:
        with self._lock:
            if not self.future.done():
                self.future.set_result(self.result())

    def result(self) -> Any:
        return None

    @abstractmethod
    def request(self, shares: list[Share], epoch: int) -> PullRequest | PushRequest:
        """The call that carries `shares`."""

    def accept(self, shares: list[Share], reply: PullReply | PushReply) -> list[Share]:
        """Takes in an answer; returns the shares whose blocks live elsewhere now."""
        moved = [
            share.select(status == BlockStatus.MOVED)
            for share, status in zip(shares, reply.statuses, strict=True)
            if status.any() and (status == BlockStatus.MOVED).any()
        ]
        if isinstance(reply, PullReply):
            for share, status, rows in zip(shares, reply.statuses, reply.rows, strict=True):
                self._fill(share if not moved else share.select(status != BlockStatus.MOVED), rows)
        return moved

    @abstractmethod
    def _fill(self, share: Share, rows: np.ndarray) -> None:
        """Takes in the rows of a pull's answer."""


class Pull(Operation):
    """Result: float32 [U, width] per part, filled as the shards answer."""

    def __init__(self, parts: Sequence[RowSet], widths: Sequence[int], clock: Clock | None, deadline: float) -> None:
        super().__init__(clock, deadline)
        self.out = [np.empty((len(part.index), widths[part.slab]), np.float32) for part in parts]

    def request(self, shares: list[Share], epoch: int) -> PullRequest:
        return PullRequest([share.rows for share in shares], self.clock, epoch)

    def _fill(self, share: Share, rows: np.ndarray) -> None:
        whole = len(rows) == len(self.out[share.part])
        if whole and rows.flags.writeable and isinstance(share.where, slice):
            self.out[share.part] = rows  # one shard answers for all: nothing to put together
        else:
            self.out[share.part][share.where] = rows

    def result(self) -> list[np.ndarray]:
        return self.out


class Push(Operation):
    """Keeps the gradients until every block's part is acknowledged; a repetition carries the same sequence number."""

    def __init__(
        self,
        client: int,
        sequence: int,
        parts: Sequence[RowSet],
        grads: Sequence[np.ndarray],
        learning_rates: Sequence[float],
        clock: Clock | None,
        deadline: float,
    ) -> None:
        super().__init__(clock, deadline)
        self.client = client
        self.sequence = sequence
        self.parts = parts
        self.grads = grads
        self.learning_rates = learning_rates
        self._told: set[int] = set()

    def sent(self, shards: Sequence[int]) -> None:
        with self._lock:
            self._told.update(shards)
        super().sent(shards)

    def not_told(self, shards: int) -> list[int]:
        """Those of the first `shards` shards that no call of this push was sent to."""
        with self._lock:
            return [shard for shard in range(shards) if shard not in self._told]

    def request(self, shares: list[Share], epoch: int) -> PushRequest:
        return PushRequest(
            self.client,
            self.sequence,
            [share.rows for share in shares],
            [self.grads[share.part][share.where] for share in shares],
            [self.learning_rates[share.part] for share in shares],
            self.clock,
            epoch,
        )

    def _fill(self, share: Share, rows: np.ndarray) -> None:
        raise TypeError("a push is never answered with rows")
