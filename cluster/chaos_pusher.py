"""Pushes whole-numbered gradients and writes down what was issued and what was acknowledged."""

from __future__ import annotations

from collections import deque
from concurrent.futures import Future

import numpy as np

from ..parameter_server.kernels import locate
from ..parameter_server.requests import Clock, RowSet
from ..parameter_server.store import Store
from .chaos_history import VALUES, Recorder, Workload

STALENESS = 1


class Pusher:
    """One worker of `workers`; its `client` number in the history is its rank. Without workers its calls have no clock.

    generation: see `Clock`; the gradients of a step are the same in every generation.
    """

    def __init__(
        self, store: Store, workload: Workload, recorder: Recorder, *, client: int, workers: int, generation: int
    ) -> None:
        self._store = store
        self._workload = workload
        self._recorder = recorder
        self._client = client
        self._workers = workers
        self._generation = generation

    def run(self, first: int, steps: int, *, sync: bool) -> None:
        """Pulls and pushes for `steps` steps from step `first`; returns when all of them are acknowledged.

        Raises:
            StoreError: a call was refused, or not answered before its deadline.
        """
        open_pushes: deque[Future[None]] = deque()
        for step in range(first, first + steps):
            rows, _ = self._workload.gradients(self._client, step)
            parts = [part for part, _ in self._locate(rows)]
            self._store.pull(parts, self._clock(step, sync)).result()
            open_pushes.append(self.push(step, sync=sync))
            while len(open_pushes) > (0 if sync else STALENESS):
                open_pushes.popleft().result()
        for push in open_pushes:
            push.result()

    def push(self, step: int, *, sync: bool = False) -> Future[None]:
        """One push; written down before it is sent, and before the future completes."""
        name = {"generation": self._generation, "client": self._client, "step": step}
        rows, grads = self._workload.gradients(self._client, step)
        parts, ordered = [], []
        for part, inverse in self._locate(rows):
            parts.append(part)
            ordered.append(np.empty_like(grads))
            ordered[-1][inverse] = grads
        self._recorder.write("issued", **name, sync=sync)
        push = self._store.push(parts, ordered, [1.0] * len(parts), self._clock(step, sync))
        done: Future[None] = Future()

        def finish(ended: Future[None]) -> None:
            if (error := ended.exception()) is not None:
                done.set_exception(error)
                return
            self._recorder.write("acknowledged", **name)
            done.set_result(None)

        push.add_done_callback(finish)
        return done

    def _clock(self, step: int, sync: bool) -> Clock | None:
        if not self._workers:
            return None
        staleness = 0 if sync else STALENESS
        return Clock(self._generation, step, self._client, self._workers, staleness, sync)

    def _locate(self, rows: np.ndarray) -> list[tuple[RowSet, np.ndarray]]:
        layout, rank = self._store.layout, self._store.block_map.rank()
        segments = np.array([0, len(rows)])
        refs = [layout.ref(name) for name in VALUES]
        return [locate(layout.slabs[ref.slab], np.array([ref.table], np.int32), segments, rows, rank) for ref in refs]


def read_items(store: Store, workload: Workload) -> np.ndarray:
    """Every row of `items` as it is pulled now: float32 [rows, width]. Raises StoreError: see `Pusher.run`."""
    rows = np.arange(workload.rows)
    ref = store.layout.ref("items")
    part, inverse = locate(
        store.layout.slabs[ref.slab],
        np.array([ref.table], np.int32),
        np.array([0, len(rows)]),
        rows,
        store.block_map.rank(),
    )
    values: np.ndarray = store.pull([part]).result()[0][inverse]
    return values
