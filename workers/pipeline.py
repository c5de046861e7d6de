"""Batches whose rows were asked for ahead of time, and never further ahead than consistency and checkpoints allow."""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable, Iterator

from ..datasets.schema import Batch
from ..parameter_server.requests import Clock
from .embeddings.collection import EmbeddingBagCollection
from .embeddings.ticket import Ticket


class Pipeline:
    """Draws batches and pulls their rows up to `depth` steps ahead of the one in hand.

    clock: of a step. step: the last step that is done; the first batch belongs to step + 1.
    """

    def __init__(
        self,
        batches: Iterator[Batch],
        embeddings: EmbeddingBagCollection,
        clock: Callable[[int], Clock],
        *,
        depth: int,
        step: int = 0,
    ) -> None:
        self.wait_seconds = 0.0
        self.issued = step  # the last step whose pull was issued
        self._batches = batches
        self._embeddings = embeddings
        self._clock = clock
        self._depth = depth
        self._step = step
        self._open: deque[tuple[Batch, Ticket]] = deque()

    def next(self, until: int) -> tuple[Batch, Ticket]:
        """The next step's batch, its rows here. Issues the pull of the step `depth` ahead, never one beyond `until`.

        Raises:
            StopIteration: no batch is left. StoreError, EmbeddingError, DataError: as they come.
        """
        self._step += 1
        while self.issued < max(self._step, min(until, self._step + self._depth)):
            batch = next(self._batches)
            self.issued += 1
            self._open.append((batch, self._embeddings.prefetch(batch.ids, self._clock(self.issued))))
        batch, ticket = self._open.popleft()
        self._wait(ticket)
        return batch, ticket

    def settle(self) -> None:
        """Until every pull issued so far is answered. Called before a push: what a pull saw then depends on no race."""
        for _, ticket in self._open:
            self._wait(ticket)

    def _wait(self, ticket: Ticket) -> None:
        begin = time.perf_counter()
        ticket.wait()
        self.wait_seconds += time.perf_counter() - begin
