"""What the store asks of a shard besides rows: tables, generations, checkpoints; in process and over gRPC alike."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterable, Mapping
from typing import Any

import numpy as np

from . import failpoints, restore
from .blocks import BlockMap
from .requests import Completed
from .shard import Shard
from .snapshot import Snapshot
from .store import StoreError
from .tables import TableSpec


class Administration:
    """Arguments and results are JSON values. `deliver` gets the waiting calls that an administrative call ends."""

    def __init__(self, shard: Shard, deliver: Callable[[list[Completed]], None]) -> None:
        self.shard = shard
        self._deliver = deliver
        self._cuts: dict[int, Snapshot] = {}  # waiting to be written
        self._written: dict[int, Snapshot] = {}  # being written
        self._numbers = itertools.count(1)
        self._methods: dict[str, Callable[..., Any]] = {
            "describe": self.describe,
            "set_block_map": self.set_block_map,
            "create_tables": self.create_tables,
            "begin": self.begin,
            "reset": self.shard.reset,
            "mark": self.mark,
            "write": self.write,
            "check_load": self.check_load,
            "load": self.load,
            "statistics": self.shard.statistics,
        }
        if failpoints.allowed():
            self._methods["arm"] = failpoints.arm

    def call(self, method: str, arguments: Mapping[str, Any]) -> Any:
        """Raises StoreError for an unknown method, and whatever the method raises."""
        if method not in self._methods:
            raise StoreError(f"a shard has no method {method!r}: it knows {', '.join(self._methods)}")
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
        self.shard.set_block_map(BlockMap(epoch, np.array(owners, np.uint16), tuple(addresses)))

    def create_tables(self, tables: list[dict[str, Any]]) -> None:
        self.shard.create_tables([TableSpec.model_validate(table) for table in tables])

    def begin(self, generation: int, workers: int, step: int) -> None:
        older = self.shard.clocks.generation != generation
        self._deliver(self.shard.begin(generation, workers, step))
        if older:  # whoever asked for these checkpoints is gone, or fenced
            self._give_up([*self._cuts.values(), *self._written.values()])

    def mark(self) -> int:
        self._give_up(self._cuts.values())  # nobody came to write it: its number was lost on the way
        number = next(self._numbers)
        self._cuts[number] = self.shard.mark()
        return number

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

    def check_load(self, directory: str, tables: dict[str, str]) -> None:
        restore.check_load(self.shard, directory, tables)

    def load(self, directory: str, tables: dict[str, str]) -> dict[str, list[str]]:
        return restore.load_blocks(self.shard, directory, tables)
