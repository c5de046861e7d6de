"""Carries out moves of blocks between running shards, group by group, over a store's administrative calls."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor, wait
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import asdict, dataclass, field
from functools import partial
from typing import Any

import numpy as np

from ..parameter_server import failpoints
from ..parameter_server.blocks import BlockMap
from ..parameter_server.sharded import ShardedStore
from ..parameter_server.store import StoreError
from ..parameter_server.tables import MAX_SHARDS
from .migration import SETTLE_SECONDS, Call, Commit, Migration, Move, plan_moves

ATTEMPTS = 20  # for a group of moves that is given up because a checkpoint is being written or a shard restarts
RETRY_SECONDS = 0.5
# For what has been decided to become known to every shard. Whoever replaces a shard that died tells it then.
REPEAT_SECONDS = 5.0
# A shard that does not answer must not keep a move going: nobody can replace it meanwhile.
CALL_SECONDS = 10.0
SLOWEST_BYTES_PER_SECOND = 10e6
FETCHES = 4  # at a time: each holds one block at its target


class RescaleError(StoreError):
    """Blocks could not be moved; what had moved before stays where it is, and every block has one owner."""


@dataclass
class Progress:
    """How far a rescale has come. bytes_moved counts copies and the changes sent after them.

    hold_seconds: how long pulls were kept back, for each group and for shards that join or leave.
    """

    blocks: int = 0
    blocks_moved: int = 0
    bytes_moved: int = 0
    groups: int = 0
    cancelled: int = 0
    seconds: float = 0.0
    hold_seconds: list[float] = field(default_factory=list)

    def summary(self) -> dict[str, Any]:
        """Flat numbers, the longest hold among them."""
        values = asdict(self)
        holds = values.pop("hold_seconds")
        return {**values, "longest_hold_seconds": max(holds, default=0.0)}


class Rescale:
    """Moves the blocks of a running store.

    store: knows the block map in force. addresses: where the shards listen now, by number, those that join included.
    commit: writes a block map where it survives this process. alone: held while a group moves, so that nobody else
    changes the block map or replaces a shard meanwhile. group_bytes: how much is copied before the blocks of a group
    change hands together; what changes in the meantime is sent again, so smaller groups hold the workers shorter but
    more often.
    """

    def __init__(
        self,
        store: ShardedStore,
        addresses: Callable[[], Sequence[str]],
        commit: Callable[[BlockMap], None],
        *,
        alone: AbstractContextManager[Any] | None = None,
        group_bytes: int = 256 << 20,
    ) -> None:
        self.store = store
        self.progress = Progress()
        self._addresses = addresses
        self._commit = commit
        self._alone = alone or nullcontext()
        self._given_up = threading.Event()
        self._group_bytes = group_bytes
        self._seconds = {
            "settle": SETTLE_SECONDS + CALL_SECONDS,
            "fetch_blocks": CALL_SECONDS + group_bytes / SLOWEST_BYTES_PER_SECOND,
        }
        self._fetching = ThreadPoolExecutor(FETCHES, thread_name_prefix="fetch")
        # A shard that is asked later than the others would keep them waiting: one thread for every shard there may be.
        self._asking = ThreadPoolExecutor(MAX_SHARDS, thread_name_prefix="ask")

    def run(self, shards: int) -> dict[str, Any]:
        """Spreads all blocks over the first `shards` shards, once; returns `Progress.summary()`.

        Raises:
            RescaleError: a group of moves failed several times (names the last cause), or the rest was given up.
        """
        with self._fetching, self._asking:
            return self._run(shards)

    def give_up(self) -> None:
        """Undoes the moves under way, unless they are committed, and begins no others; `run` then raises."""
        self._given_up.set()

    def _run(self, shards: int) -> dict[str, Any]:
        begin = time.monotonic()
        if shards > self.store.shards or self._idle():
            self.join(max(shards, self.store.shards))
        while not self._spread(shards):
            pass  # shards that were lost and began afresh own blocks again
        self.progress.seconds = time.monotonic() - begin
        return self.progress.summary()

    def _spread(self, shards: int) -> bool:
        """Moves what there is to move, then takes the shards that own nothing out of the map; False: one does again."""
        while moves := self._plan(shards):  # anew for every group: a shard that was lost may have changed the map
            self.progress.blocks = self.progress.blocks_moved + len(moves)
            self._move(partial(self._next_group, moves))
        if shards < self.store.shards:
            try:
                self._move(lambda known: Migration(known, known.addresses[:shards], []))
            except ValueError:
                return False
        return True

    def _idle(self) -> list[int]:
        """The shards in the block map that own nothing."""
        return sorted(set(range(self.store.shards)) - set(self.store.block_map.owners.tolist()))

    def join(self, shards: int) -> None:
        """Gives shards that own nothing their tables, tells them how far the workers are, and makes them known."""
        owners = set(self.store.block_map.owners.tolist())
        layout = self.store.control(min(owners), "describe", {})["slabs"]
        for address in [self._addresses()[shard] for shard in range(shards) if shard not in owners]:
            for tables in layout:  # one call per slab, so that slabs have the same numbers everywhere
                self.store.control_at(address, "create_tables", {"tables": tables})
        self._move(lambda known: Migration(known, self._addresses()[:shards], []))

    def _plan(self, shards: int) -> list[Move]:
        traffic = np.sum(self.store.control_all("traffic", {}), axis=0)
        load = traffic / max(1, int(traffic.sum())) + 1 / len(traffic)
        return plan_moves(self.store.block_map.owners, shards, load)

    def _group_of(self, moves: list[Move]) -> list[Move]:
        held = [s for s in self.store.statistics() if s["blocks"]]
        block_bytes = max((s["table_bytes"] + s["state_bytes"]) / s["blocks"] for s in held)
        return moves[: max(1, int(self._group_bytes / max(1.0, block_bytes)))]

    def _next_group(self, moves: list[Move], known: BlockMap) -> Migration:
        return Migration(known, known.addresses, self._group_of(moves))

    def _move(self, migration_from: Callable[[BlockMap], Migration]) -> None:
        for _ in range(ATTEMPTS):
            if self._given_up.is_set():
                raise RescaleError("scaling was given up: what had moved stays where it is; scale again at any time")
            with self._alone:
                migration = migration_from(self.store.block_map)
                self._drive(migration)
            if migration.committed:
                self.progress.blocks_moved += len(migration.moves)
                self.progress.groups += bool(migration.moves)
                return
            self.progress.cancelled += 1
            time.sleep(RETRY_SECONDS)
        raise RescaleError(f"blocks could not be moved, tried {ATTEMPTS} times: {migration.error}")

    def _drive(self, migration: Migration) -> None:
        with self._timing(migration):
            until = float("inf")
            while not migration.ended and time.monotonic() < until:
                if self._given_up.is_set():
                    migration.cancel()
                decided = migration.committed or migration.cancelling
                try:
                    migration.succeeded(self._perform(migration.calls()))
                except Exception as error:
                    migration.failed(error)
                    if decided:
                        until = min(until, time.monotonic() + REPEAT_SECONDS)
                        time.sleep(RETRY_SECONDS)

    @contextmanager
    def _timing(self, migration: Migration) -> Iterator[None]:
        began: list[float] = []
        migration.on_hold = lambda: began.append(time.monotonic())
        yield
        self.progress.bytes_moved += migration.copied_bytes
        self.progress.hold_seconds += [time.monotonic() - begin for begin in began]

    def _perform(self, calls: Sequence[Call | Commit]) -> list[Any]:
        """Makes all calls, whatever becomes of some; raises the first error."""
        running = [self._pool(call).submit(self._perform_one, call) for call in calls]
        wait(running)
        return [call.result() for call in running]

    def _pool(self, call: Call | Commit) -> ThreadPoolExecutor:
        return self._fetching if isinstance(call, Call) and call.method == "fetch_blocks" else self._asking

    def _perform_one(self, call: Call | Commit) -> Any:
        if isinstance(call, Commit):
            forward = call.block_map.epoch > self.store.block_map.epoch
            if forward:
                failpoints.hit("move.commit")
            self._commit(call.block_map)
            if forward:
                failpoints.hit("move.committed")
            self.store.adopt(call.block_map)
            return None
        within = self._seconds.get(call.method, CALL_SECONDS)
        return self.store.control_at(self._addresses()[call.shard], call.method, call.arguments, within)
