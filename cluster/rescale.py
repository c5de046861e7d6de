"""Carries out moves of blocks between running shards, group by group, over a store's administrative calls."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor, wait
from dataclasses import asdict, dataclass, field
from typing import Any

import numpy as np

from ..parameter_server.blocks import BlockMap
from ..parameter_server.sharded import ShardedStore
from ..parameter_server.store import StoreError
from ..parameter_server.tables import MAX_SHARDS
from .migration import Call, Commit, Migration, Move, plan_moves

ATTEMPTS = 5  # for a group of moves that is given up because a checkpoint is being written or a shard restarts
RETRY_SECONDS = 0.5
REPEAT_SECONDS = 300.0  # for what has been committed to become known to every shard


class RescaleError(StoreError):
    """Blocks could not be moved; what had moved before stays where it is, and every block has one owner."""


@dataclass
class Progress:
    """How far a rescale has come; bytes count copies and the changes sent after them."""

    blocks: int = 0
    blocks_moved: int = 0
    bytes_moved: int = 0
    groups: int = 0
    seconds: float = 0.0
    hold_seconds: list[float] = field(default_factory=list)
    cancelled: int = 0

    def summary(self) -> dict[str, Any]:
        """Flat numbers, the longest hold among them."""
        values = asdict(self)
        holds = values.pop("hold_seconds")
        return {**values, "longest_hold_seconds": max(holds, default=0.0)}


class Rescale:
    """Moves the blocks of a running store.

    store: connected to the shards, those that join included in no map yet. commit: writes a block map where it survives
    this process. group_bytes: how much is copied before the blocks of a group change hands together; what changes in
    the meantime is sent again, so smaller groups hold the workers shorter but more often.
    """

    def __init__(
        self,
        store: ShardedStore,
        commit: Callable[[BlockMap], None],
        *,
        group_bytes: int = 256 << 20,
        side_by_side: int = 4,
    ) -> None:
        self.store = store
        self.progress = Progress()
        self._addresses = list(store.block_map.addresses)  # by number; those that join or leave included
        self._commit = commit
        self._group_bytes = group_bytes
        self._fetching = ThreadPoolExecutor(side_by_side, thread_name_prefix="fetch")
        # A shard that is asked later than the others would keep them waiting: one thread for every shard there may be.
        self._asking = ThreadPoolExecutor(MAX_SHARDS, thread_name_prefix="ask")

    def run(self, addresses: Sequence[str]) -> dict[str, Any]:
        """Spreads all blocks over the shards at `addresses`: those of now, more of them at the end, or fewer.

        Returns `Progress.summary()`.

        Raises:
            RescaleError: a group of moves failed several times; names the last cause.
        """
        begin = time.monotonic()
        if len(addresses) > self.store.shards:
            self._join(addresses)
        moves = self._plan(len(addresses))
        self.progress.blocks = len(moves)
        for group in self._groups(moves):
            self._move(group, self._addresses)
            self.progress.seconds = time.monotonic() - begin
        if len(addresses) < self.store.shards:
            self._move([], addresses)
        self.progress.seconds = time.monotonic() - begin
        return self.progress.summary()

    def _join(self, addresses: Sequence[str]) -> None:
        """Gives shards that are new their tables and makes them known; they own nothing yet."""
        layout = self.store.control(0, "describe", {})["slabs"]
        self._addresses = list(addresses)
        for address in addresses[self.store.shards :]:
            for tables in layout:  # one call per slab, so that slabs have the same numbers everywhere
                self.store.control_at(address, "create_tables", {"tables": tables})
        self._move([], addresses)

    def _plan(self, shards: int) -> list[Move]:
        traffic = np.sum(self.store.control_all("traffic", {}), axis=0)
        load = traffic / max(1, int(traffic.sum())) + 1 / len(traffic)
        return plan_moves(self.store.block_map.owners, shards, load)

    def _groups(self, moves: list[Move]) -> Iterator[list[Move]]:
        held = [s for s in self.store.statistics() if s["blocks"]]
        block_bytes = max((s["table_bytes"] + s["state_bytes"]) / s["blocks"] for s in held)
        size = max(1, int(self._group_bytes / max(1.0, block_bytes)))
        for first in range(0, len(moves), size):
            yield moves[first : first + size]

    def _move(self, moves: list[Move], addresses: Sequence[str]) -> None:
        for _ in range(ATTEMPTS):
            migration = Migration(self.store.block_map, addresses, moves)
            self._drive(migration)
            if migration.committed:
                self.progress.blocks_moved += len(moves)
                self.progress.groups += bool(moves)
                return
            self.progress.cancelled += 1
            time.sleep(RETRY_SECONDS)
        raise RescaleError(f"moving {len(moves)} blocks was given up {ATTEMPTS} times: {migration.error}")

    def _drive(self, migration: Migration) -> None:
        began: float | None = None
        until = None
        while not migration.ended:
            if migration.holds and began is None:
                began = time.monotonic()
            try:
                migration.succeeded(self._perform(migration.calls()))
            except Exception as error:
                cancelled_before = migration.cancelling
                migration.failed(error)
                if migration.committed or cancelled_before:
                    until = until or time.monotonic() + REPEAT_SECONDS
                    if time.monotonic() > until:
                        raise RescaleError(f"after {REPEAT_SECONDS:g} s still: {error}") from error
                    time.sleep(RETRY_SECONDS)
        self.progress.bytes_moved += migration.copied_bytes
        if began is not None:
            self.progress.hold_seconds.append(time.monotonic() - began)

    def _perform(self, calls: Sequence[Call | Commit]) -> list[Any]:
        """Makes all calls, whatever becomes of some; raises the first error."""
        running = [self._pool(call).submit(self._perform_one, call) for call in calls]
        wait(running)
        return [call.result() for call in running]

    def _pool(self, call: Call | Commit) -> ThreadPoolExecutor:
        return self._fetching if isinstance(call, Call) and call.method == "fetch_block" else self._asking

    def _perform_one(self, call: Call | Commit) -> Any:
        if isinstance(call, Commit):
            self._commit(call.block_map)
            self.store.adopt(call.block_map)
            return None
        return self.store.control_at(self._addresses[call.shard], call.method, call.arguments)
