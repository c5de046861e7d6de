"""The store over several shards, whatever lies between: routing, repetition, redirection, deadlines.

Two kinds of link exist: calls inside this process (`local.py`) and gRPC streams (`client.py`).
"""

from __future__ import annotations

import heapq
import itertools
import secrets
import threading
import time
from abc import abstractmethod
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor, wait
from contextlib import suppress
from functools import partial
from typing import Any, TypeVar

import numpy as np

from . import checkpoint
from .blocks import BlockMap
from .operations import Operation, Pull, Push
from .requests import FENCED, LATER, TIMEOUT, Clock, PullRequest, PushRequest, Refusal, Reply, RowSet
from .routing import Share, regroup, split
from .store import BusyError, Counters, FencedError, ShardUnavailable, Store, StoreError, StoreTimeout
from .tables import Layout, TableSpec

# The newest push is at most so many after the oldest that is unanswered: well below the ledger's window of 64, so that
# a repeated push is always still inside it, however many later ones were quicker.
MAX_OPEN_PUSHES = 32
RETRY_SECONDS = 0.05
# Table creation and checkpoints move whole shards; their deadline is not that of a pull.
CONTROL_SECONDS = 3600.0
FIND_SECONDS = 1.0  # between two questions for a newer block map

T = TypeVar("T")
Answer = Reply | ConnectionError
OnAnswer = Callable[[Answer, BlockMap | None], None]


class ShardedStore(Store):
    """Everything of a store but the link to its shards.

    find_map: asked, on a thread of the background and now and then, for the present block map while a shard does not
    answer or does not serve: it may have been replaced at another address. None is no news.
    """

    def __init__(
        self,
        layout: Layout,
        block_map: BlockMap,
        timeout: float,
        find_map: Callable[[], BlockMap | None] = lambda: None,
    ) -> None:
        self.layout = layout
        self.block_map = block_map
        self.timeout = timeout
        self.counters = Counters()
        self.client = secrets.randbits(63)
        self._sequence = itertools.count(1)
        self._generation: int | None = None  # that this store began
        self._unanswered: set[int] = set()  # sequence numbers
        self._answered_one = threading.Condition()
        self._background = ThreadPoolExecutor(max_workers=len(block_map.addresses) + 2)
        self._timer = _Timer()
        self._find_map = find_map
        self._next_find = 0.0
        self._adopting = threading.Lock()

    @abstractmethod
    def _send(self, shard: int, request: PullRequest | PushRequest, timeout: float, on_answer: OnAnswer) -> None:
        """Starts a call; `on_answer` is called once, on any thread."""

    @abstractmethod
    def control_at(
        self, address: str, method: str, arguments: Mapping[str, Any], within: float = CONTROL_SECONDS
    ) -> Any:
        """One administrative call; arguments and result are JSON values. within: seconds, where there is a network.

        Raises:
            StoreError, TableError, ...: what the shard raised; StoreError also where it did not answer.
        """

    def control(self, shard: int, method: str, arguments: Mapping[str, Any]) -> Any:
        """`control_at` the address of a shard."""
        return self.control_at(self.block_map.addresses[shard], method, arguments)

    def control_all(self, method: str, arguments: Mapping[str, Any]) -> list[Any]:
        """The call to every shard; one that cannot be reached is tried again until `timeout`: it may be restarting."""
        deadline = time.monotonic() + self.timeout

        def call(shard: int) -> Any:
            while True:
                try:
                    return self.control(shard, method, arguments)
                except ShardUnavailable:
                    if time.monotonic() > deadline:
                        raise
                self.counters.add("retries", 1)
                self._look_for_map()
                time.sleep(RETRY_SECONDS)

        return list(self._background.map(call, range(self.shards)))

    @property
    def shards(self) -> int:
        return len(self.block_map.addresses)

    @property
    def widths(self) -> list[int]:
        return [slab.width for slab in self.layout.slabs]

    def create_tables(self, tables: Sequence[TableSpec]) -> None:
        trial = Layout(self.layout.blocks, self.layout.seed)
        trial.add([*self.layout.tables])
        trial.add(tables)  # refuses here, before any shard has heard of it
        self._when_free(lambda: self.control_all("create_tables", {"tables": [t.model_dump() for t in tables]}))
        self.layout.add(tables)

    def begin(self, generation: int, workers: int, step: int) -> None:
        arguments = {"generation": generation, "workers": workers, "step": step}
        self._when_free(lambda: self.control_all("begin", arguments))
        self._generation = generation

    def reset(self) -> None:
        self._when_free(lambda: self.control_all("reset", self._stand()))

    def pull(self, parts: Sequence[RowSet], clock: Clock | None = None) -> Future[list[np.ndarray]]:
        self.counters.pulls += 1
        self.counters.rows_pulled += sum(len(part.index) for part in parts)
        pull = Pull(parts, self.widths, clock, time.monotonic() + self.timeout)
        self._start(pull, split(parts, self.block_map.owners))
        return pull.future

    def push(
        self,
        parts: Sequence[RowSet],
        grads: Sequence[np.ndarray],
        learning_rates: Sequence[float],
        clock: Clock | None = None,
    ) -> Future[None]:
        sequence = next(self._sequence)
        with self._answered_one:
            if not self._answered_one.wait_for(lambda: self._is_next(sequence), self.timeout):
                raise StoreTimeout(
                    f"push {sequence}: push {min(self._unanswered)} is unanswered after {self.timeout:g} s more"
                )
            self._unanswered.add(sequence)
        deadline = time.monotonic() + self.timeout
        self.counters.pushes += 1
        self.counters.rows_pushed += sum(len(part.index) for part in parts)
        push = Push(self.client, sequence, parts, grads, learning_rates, clock, deadline)
        push.future.add_done_callback(lambda _: self._is_answered(sequence))
        shares = split(parts, self.block_map.owners)
        if clock is not None:  # every shard keeps every rank's clock, so it hears of pushes without rows for it
            for shard in range(self.shards):
                shares.setdefault(shard, [])
        self._start(push, shares)
        return push.future

    def _is_next(self, sequence: int) -> bool:
        return sequence - min(self._unanswered, default=sequence) < MAX_OPEN_PUSHES

    def _is_answered(self, sequence: int) -> None:
        with self._answered_one:
            self._unanswered.discard(sequence)
            self._answered_one.notify_all()

    def _start(self, operation: Operation, shares: dict[int, list[Share]]) -> None:
        if not shares:
            operation.succeed()
            return
        self._timer.watch(operation)
        operation.sent(list(shares))
        for shard in sorted(shares):
            self._call(operation, shard, shares[shard])

    def _call(self, operation: Operation, shard: int, shares: list[Share]) -> None:
        request = operation.request(shares, self.block_map.epoch)
        left = operation.deadline - time.monotonic()

        def on_answer(answer: Answer, newer: BlockMap | None) -> None:
            try:
                self._answered(operation, shard, shares, answer, newer)
            except Exception as error:
                operation.fail(error)

        # A shard gives up earlier than we do, so that it can still say whom it waited for, also on a busy machine.
        spare = max(left / 20, min(1.0, left / 2))
        self._send(shard, request, max(0.001, left - spare), on_answer)

    def _answered(
        self, operation: Operation, shard: int, shares: list[Share], answer: Answer, newer: BlockMap | None
    ) -> None:
        if operation.future.done():
            return
        if newer is not None:
            self.adopt(newer)
        if isinstance(answer, ConnectionError) or (isinstance(answer, Refusal) and answer.code == LATER):
            self.counters.add("retries", 1)
            operation.sent_again = answer.message if isinstance(answer, Refusal) else str(answer)
            self._look_for_map()
            self._timer.later(RETRY_SECONDS, partial(self._recall, operation, shard, shares))
            return
        if isinstance(answer, Refusal):
            operation.fail(_refused(self.block_map.addresses[shard], answer))
            return
        if moved := operation.accept(shares, answer):
            self.counters.add("moved", sum(len(share.rows.blocks) for share in moved))
            self._reroute(operation, moved, shard)
        if isinstance(operation, Push):
            self._tell_new_shards(operation)
        self._settle(operation, shard)

    def _settle(self, operation: Operation, shard: int) -> None:
        if operation.answered(shard):
            operation.succeed()

    def _reroute(self, operation: Operation, shares: list[Share], refused_by: int) -> None:
        """Sends shares that `refused_by` did not take to those who own their blocks now."""
        by_owner = regroup(shares, self.block_map.owners)
        operation.sent(list(by_owner))
        for shard, theirs in by_owner.items():
            # Told to go back to the shard that refused: nobody has told us of the new owner yet.
            delay = RETRY_SECONDS if shard == refused_by else 0.0
            self._timer.later(delay, partial(self._recall, operation, shard, theirs))

    def _recall(self, operation: Operation, shard: int, shares: list[Share]) -> None:
        if operation.future.done():
            return
        if shard < self.shards:
            self._call(operation, shard, shares)
            return
        self._reroute(operation, shares, shard)  # the shard has left the store meanwhile
        self._settle(operation, shard)

    def _tell_new_shards(self, push: Push) -> None:
        """A shard that joined while a push was under way hears of it, too: it keeps every rank's clock."""
        if push.clock is None:
            return
        for shard in push.not_told(self.shards):
            push.sent([shard])
            self._timer.later(0.0, partial(self._recall, push, shard, []))

    def adopt(self, newer: BlockMap) -> None:
        with self._adopting:
            if newer.epoch > self.block_map.epoch:
                self.block_map = newer

    def _look_for_map(self) -> None:
        if time.monotonic() < self._next_find:
            return
        self._next_find = time.monotonic() + FIND_SECONDS

        def find() -> None:
            newer = self._find_map()
            if newer is not None:
                self.adopt(newer)

        with suppress(RuntimeError):  # the store is being closed
            self._background.submit(find)

    def save(
        self,
        directory: str,
        *,
        step: int = 0,
        tensors: Mapping[str, np.ndarray] | None = None,
        state: Mapping[str, Any] | None = None,
    ) -> Future[dict[str, Any]]:
        cuts = self._when_free(lambda: self.control_all("mark", self._stand()))
        dense = {name: np.array(tensor) for name, tensor in (tensors or {}).items()}

        where = {"directory": directory}

        def write() -> dict[str, Any]:
            calls = [
                self._background.submit(self._when_free, partial(self.control, shard, "write", where | {"cut": cut}))
                for shard, cut in enumerate(cuts)
            ]
            try:
                dense_entry = checkpoint.write_dense(directory, dense)
            finally:
                wait(calls)  # whatever fails, no shard is left writing when the next cut is made
            blocks = [entry for call in calls for entry in call.result()]
            return checkpoint.commit(directory, self.layout, step, blocks, dense_entry, dict(state or {}))

        done: Future[dict[str, Any]] = Future()

        def run() -> None:
            try:
                done.set_result(write())
            except Exception as error:
                done.set_exception(error)

        threading.Thread(target=run, name="checkpoint", daemon=True).start()
        return done

    def _load(self, arguments: dict[str, Any]) -> None:
        """Every shard verifies before any changes a row; again from the start if blocks change hands meanwhile."""
        arguments = arguments | self._stand()
        self.control_all("check_load", arguments)
        self.control_all("load", arguments)

    def _stand(self) -> dict[str, Any]:
        """By what a shard knows that this store speaks of the same blocks and belongs to the running generation."""
        return {"epoch": self.block_map.epoch, "generation": self._generation}

    def _when_free(self, action: Callable[[], T]) -> T:
        """Repeats what a shard is too busy for, until this store's timeout."""
        deadline = time.monotonic() + self.timeout
        while True:
            try:
                return action()
            except BusyError as error:
                if time.monotonic() > deadline:
                    raise StoreTimeout(f"after {self.timeout:g} s still: {error}") from error
                self._learn_map()
                time.sleep(RETRY_SECONDS)

    def _learn_map(self) -> None:
        """Takes over the newest map that a shard tells of."""
        described = self.control(0, "describe", {})
        owners = np.array(described["owners"], np.uint16)
        self.adopt(BlockMap(described["epoch"], owners, tuple(described["addresses"])))

    def load(self, directory: str, tables: Mapping[str, str] | None = None) -> dict[str, Any]:
        names = dict(tables) if tables is not None else {table.name: table.name for table in self.layout.tables}
        manifest = checkpoint.read_manifest(directory)
        arguments = {"directory": directory, "tables": names}
        self._when_free(lambda: self._load(arguments))
        return manifest.model_dump()

    def statistics(self) -> list[dict[str, Any]]:
        return self.control_all("statistics", {})

    def close(self) -> None:
        self._timer.close()
        self._background.shutdown(wait=False, cancel_futures=True)


def _refused(shard: str, refusal: Refusal) -> StoreError:
    kind = {FENCED: FencedError, TIMEOUT: StoreTimeout}.get(refusal.code, StoreError)
    return kind(f"shard {shard} refused: {refusal.message}")


class _Timer:
    """One thread that fails operations at their deadlines and starts postponed calls."""

    def __init__(self) -> None:
        self._wake = threading.Condition()
        self._due: list[tuple[float, int, Callable[[], None]]] = []
        self._order = itertools.count()
        self._watched: dict[int, Operation] = {}
        self._closed = False
        threading.Thread(target=self._run, name="store-timer", daemon=True).start()

    def watch(self, operation: Operation) -> None:
        # The heap holds a number, not the operation: its arrays are freed as soon as it is done.
        number = next(self._order)
        self._watched[number] = operation
        operation.future.add_done_callback(lambda _: self._watched.pop(number, None))
        self._add(operation.deadline, lambda: self._expire(number))

    def later(self, seconds: float, action: Callable[[], None]) -> None:
        self._add(time.monotonic() + seconds, action)

    def _expire(self, number: int) -> None:
        operation = self._watched.get(number)
        if operation is not None:
            shards = ", ".join(str(shard) for shard in sorted(operation.waiting_for))
            what = type(operation).__name__.lower()
            why = f" ({operation.sent_again})" if operation.sent_again else ""
            operation.fail(StoreTimeout(f"{what}: no answer from shard {shards} within the deadline{why}"))

    def _add(self, when: float, action: Callable[[], None]) -> None:
        with self._wake:
            heapq.heappush(self._due, (when, next(self._order), action))
            if self._due[0][0] == when:
                self._wake.notify()

    def _run(self) -> None:
        while True:
            with self._wake:
                while not self._closed and (not self._due or self._due[0][0] > time.monotonic()):
                    self._wake.wait(self._due[0][0] - time.monotonic() if self._due else None)
                if self._closed:
                    return
                action = heapq.heappop(self._due)[2]
            action()

    def close(self) -> None:
        with self._wake:
            self._closed = True
            self._wake.notify()
