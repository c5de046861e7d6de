"""What the store asks of a shard besides rows: tables, generations, checkpoints; in process and over gRPC alike."""

from __future__ import annotations

import itertools
import threading
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, Protocol

import numpy as np

from . import failpoints, restore
from .blocks import BlockMap
from .pull_times import PullTimes
from .requests import Completed
from .shard import Shard
from .snapshot import Snapshot
from .store import BusyError, FencedError, StoreError
from .tables import TableSpec

SETTLE_POLL_SECONDS = 0.001
# What a shard does also when its lease has ended: say what it knows, and hear what has been decided.
WITHOUT_LEASE = {"describe", "statistics", "traffic", "pull_times", "set_block_map", "cancel_moves", "arm"}

Fetched = tuple[int, dict[str, np.ndarray], int]  # a block, its tensors, their bytes


class Fetch(Protocol):
    """Gets blocks, or what changed of them, from shard `source`."""

    def __call__(
        self, blocks: Sequence[int], source: int, move: str, *, changes: bool, seal: bool
    ) -> Iterable[Fetched]: ...


class Administration:
    """Arguments and results are JSON values.

    deliver: gets the waiting calls that an administrative call ends. fetch: asks another shard for a block.
    """

    def __init__(self, shard: Shard, deliver: Callable[[list[Completed]], None], fetch: Fetch) -> None:
        self.shard = shard
        self._deliver = deliver
        self._fetch = fetch
        self.pull_times = PullTimes()
        self._cuts: dict[int, Snapshot] = {}  # waiting to be written
        self._written: dict[int, Snapshot] = {}  # being written
        self._numbers = itertools.count(1)
        self._loading = threading.Lock()
        self._methods: dict[str, Callable[..., Any]] = {
            "describe": self.describe,
            "set_block_map": self.set_block_map,
            "create_tables": self.create_tables,
            "begin": self.begin,
            "join": self.join,
            "reset": self.reset,
            "mark": self.mark,
            "write": self.write,
            "check_load": self.check_load,
            "load": self.load,
            "close_gate": self.close_gate,
            "settle": self.settle,
            "fetch_blocks": self.fetch_blocks,
            "cancel_moves": self.cancel_moves,
            "traffic": lambda: self.shard.traffic.tolist(),
            "pull_times": self.pull_times.take,
            "statistics": self.shard.statistics,
        }
        if failpoints.allowed():
            self._methods["arm"] = failpoints.arm

    def call(self, method: str, arguments: Mapping[str, Any]) -> Any:
        """Raises StoreError for an unknown method, BusyError after the lease, and whatever the method raises."""
        if method not in self._methods:
            raise StoreError(f"a shard has no method {method!r}: it knows {', '.join(self._methods)}")
        if method not in WITHOUT_LEASE and self.shard.lease.ended:
            raise BusyError(f"shard {self.shard.number}: its lease has ended: {method} has to wait for another")
        return self._methods[method](**arguments)

    def describe(self) -> dict[str, Any]:
        layout, block_map = self.shard.layout, self.shard.block_map
        return {
            "shard": self.shard.number,
            "blocks": layout.blocks,
            "seed": layout.seed,
            "slabs": [[table.model_dump() for table in slab.tables] for slab in layout.slabs],
            "epoch": block_map.epoch,
            "owners": block_map.owners.tolist(),
            "addresses": list(block_map.addresses),
        }

    def set_block_map(self, epoch: int, owners: list[int], addresses: list[str]) -> None:
        """Takes over a map; a newer one also opens the gate that was closed for its sake."""
        newer = epoch > self.shard.block_map.epoch
        self.shard.set_block_map(BlockMap(epoch, np.array(owners, np.uint16), tuple(addresses)))
        if newer:
            self._deliver(self.shard.open_gate())

    def create_tables(self, tables: list[dict[str, Any]]) -> None:
        self.shard.create_tables([TableSpec.model_validate(table) for table in tables])

    def join(self, generation: int, workers: int, step: int) -> None:
        self._deliver(self.shard.join(generation, workers, step))

    def begin(self, generation: int, workers: int, step: int) -> None:
        older = self.shard.clocks.generation != generation
        self._deliver(self.shard.begin(generation, workers, step))
        if older:  # whoever asked for these checkpoints is gone, or fenced
            self._give_up([*self._cuts.values(), *self._written.values()])

    def reset(self, epoch: int, generation: int | None = None) -> None:
        self._fence(generation)
        self._expect(epoch)
        self.shard.reset()

    def mark(self, epoch: int, generation: int | None = None) -> int:
        """Cuts, if the caller's block map is this shard's own: otherwise a block might be in no cut, or in two."""
        self._fence(generation)
        self._give_up(self._cuts.values())  # nobody came to write it: its number was lost on the way
        number = next(self._numbers)
        with self.shard.lock:
            self._expect(epoch)
            self._cuts[number] = self.shard.mark()
        return number

    def _fence(self, generation: int | None) -> None:
        """Nobody of another generation changes what the running one has loaded, nor takes away its cut."""
        running = self.shard.clocks.generation
        if generation not in (None, running) and not failpoints.active("fence"):
            raise FencedError(f"shard {self.shard.number}: generation {generation} is refused: {running} is running")

    def _expect(self, epoch: int) -> None:
        if (own := self.shard.block_map.epoch) != epoch:
            raise BusyError(f"shard {self.shard.number} has a block map of epoch {own}, not {epoch}")

    def write(self, cut: int, directory: str) -> list[dict[str, Any]]:
        snapshot = self._cuts.pop(cut, None)
        if snapshot is None:
            raise StoreError(f"shard {self.shard.number}: cut {cut} is unknown: mark again, then write")
        self._written[cut] = snapshot
        try:
            return [entry.model_dump() for entry in restore.write_blocks(snapshot, directory)]
        except KeyError:
            raise StoreError(f"shard {self.shard.number}: the checkpoint {directory} was given up") from None
        finally:
            del self._written[cut]

    @staticmethod
    def _give_up(cuts: Iterable[Snapshot]) -> None:
        for snapshot in list(cuts):
            snapshot.close()

    def check_load(self, directory: str, tables: dict[str, str], epoch: int, generation: int | None = None) -> None:
        self._fence(generation)
        self._expect(epoch)
        restore.check_load(self.shard, directory, tables)

    def load(
        self, directory: str, tables: dict[str, str], epoch: int, generation: int | None = None
    ) -> dict[str, list[str]]:
        with self._loading:  # one that is asked for again because its connection broke ends after the first
            self._fence(generation)
            self._expect(epoch)
            return restore.load_blocks(self.shard, directory, tables)

    def close_gate(self, after: int, lag: int, seconds: float) -> dict[str, int]:
        """Keeps calls back for at most so long; returns the last step that is pulled, and how far ahead of pushes."""
        gate, released = self.shard.close_gate(after, lag, time.monotonic() + seconds)
        self._deliver(released)
        return {"step": gate.step, "lag": gate.lag}

    def settle(self, step: int, lag: int, hold: float, seconds: float) -> dict[str, Any]:
        """Lets the pulls up to `step` through, and waits up to `seconds` for the pushes; see `Shard.settled`."""
        self.close_gate(step, lag, hold)
        deadline = time.monotonic() + seconds
        while not (state := self.shard.settled(step - lag))["settled"] and time.monotonic() < deadline:
            time.sleep(SETTLE_POLL_SECONDS)
        return state

    def cancel_moves(self, epoch: int, move: str | None = None) -> None:
        """Ends `move`, or whatever move is under way; one that has been committed since is not ended."""
        self._expect(epoch)
        self.shard.cancel_moves(move)
        self._deliver(self.shard.open_gate())

    def fetch_blocks(
        self, blocks: list[int], source: int, move: str, epoch: int, changes: bool = False, seal: bool = False
    ) -> int:
        """Asks shard `source` for blocks, or for what changed of them; returns the bytes that came."""
        self._expect(epoch)  # what an older move brought may be this shard's own by the map that it has not heard of
        total = 0
        for block, tensors, size in self._fetch(blocks, source, move, changes=changes, seal=seal):
            self.shard.receive_block(block, move, tensors)
            total += size
        return total
