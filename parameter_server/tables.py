"""Tables, slabs and the layout: which rows exist and where each one lives. Pure; no I/O.

A *table* is a set of named rows of one width. All tables of one width, dtype and optimizer form a *slab*, so that one
message and one kernel call serve every feature. A slab is addressed by *slab row*:

    slab row = block * rows_per_block + base[table] + place

where (block, place) come from a keyed bijection of the row within its own table (`kernels.locate`). The same number
addresses the row on the wire and in a shard's memory, so no map from row to address exists anywhere.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Literal

import numpy as np
from pydantic import BaseModel, ConfigDict, Field

DEFAULT_BLOCKS = 256
MIN_BLOCKS_PER_SHARD = 10
MAX_SHARDS = 65536 // MIN_BLOCKS_PER_SHARD


class TableError(ValueError):
    """A table that cannot be built: the message names the table and what would work."""


class Initializer(BaseModel):
    """How a row's initial values are drawn; they depend on (seed, table name, row) alone.

    `uniform`: U(-scale, scale); `normal`: N(0, scale^2); `constant`: scale in every coordinate.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")
    kind: Literal["uniform", "normal", "constant"] = "uniform"
    scale: float = 0.05


class Optimizer(BaseModel):
    """The update that a shard applies to a row, given the sum of the gradients of one push (or of one `sync` step).

    The learning rate is not here: it travels in every push. State per row: `sgd` none, `adagrad` width floats,
    `rowwise_adagrad` one float (mean of g^2, DLRM's form), `adam` 2 * width floats and the row's own step count.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")
    kind: Literal["sgd", "adagrad", "rowwise_adagrad", "adam"] = "rowwise_adagrad"
    eps: float = Field(1e-8, gt=0)
    initial_accumulator: float = Field(0.0, ge=0)
    beta1: float = Field(0.9, ge=0, lt=1)
    beta2: float = Field(0.999, ge=0, lt=1)

    def state_width(self, width: int) -> int:
        """Floats of optimizer state per row of `width` floats."""
        return {"sgd": 0, "adagrad": width, "rowwise_adagrad": 1, "adam": 2 * width + 1}[self.kind]


class TableSpec(BaseModel):
    """A named table of `rows` x `width`."""

    model_config = ConfigDict(frozen=True, extra="forbid")
    name: str = Field(min_length=1, max_length=512)
    rows: int = Field(gt=0, le=2**48)
    width: int = Field(gt=0, le=4096)
    dtype: Literal["float32"] = "float32"
    initializer: Initializer = Initializer()
    optimizer: Optimizer = Optimizer()

    @cached_property
    def key(self) -> int:
        """64-bit key of the placement bijection: a digest of the table's *name* alone."""
        return int.from_bytes(hashlib.blake2b(self.name.encode(), digest_size=8).digest(), "little")


@dataclass(frozen=True)
class Slab:
    """All tables of one width, dtype and optimizer, block by block, one table's share after another."""

    id: int
    tables: tuple[TableSpec, ...]
    blocks: int

    @property
    def width(self) -> int:
        return self.tables[0].width

    @property
    def optimizer(self) -> Optimizer:
        return self.tables[0].optimizer

    @property
    def state_width(self) -> int:
        return self.optimizer.state_width(self.width)

    @cached_property
    def rows(self) -> np.ndarray:
        """int64 [T]: rows of each table."""
        return np.array([t.rows for t in self.tables], np.int64)

    @cached_property
    def keys(self) -> np.ndarray:
        """uint64 [T]: placement key of each table."""
        return np.array([t.key for t in self.tables], np.uint64)

    @cached_property
    def base(self) -> np.ndarray:
        """int64 [T + 1]: where a table's share of a block begins, in rows; the last entry is rows_per_block."""
        share = -(-self.rows // self.blocks)
        return np.concatenate([np.zeros(1, np.int64), np.cumsum(share)])

    @cached_property
    def rows_per_block(self) -> int:
        return int(self.base[-1])

    @cached_property
    def index_dtype(self) -> np.dtype[np.unsignedinteger]:
        """uint32 wherever every slab row fits, uint64 beyond."""
        return np.dtype(np.uint32 if self.blocks * self.rows_per_block < 2**32 else np.uint64)


@dataclass(frozen=True)
class TableRef:
    """Where a table stands in a layout."""

    slab: int
    table: int


class Layout:
    """The slabs of a store. Tables are only ever added, in groups; a group never joins the slab of an older one."""

    def __init__(self, blocks: int = DEFAULT_BLOCKS, seed: int = 0) -> None:
        if not 1 <= blocks <= 65536:
            raise TableError(f"store.blocks: {blocks} is not between 1 and 65536")
        self.blocks = blocks
        self.seed = seed
        self.slabs: list[Slab] = []
        self._refs: dict[str, TableRef] = {}

    def add(self, tables: Sequence[TableSpec]) -> list[Slab]:
        """Adds tables that are new, one slab per (width, dtype, optimizer); returns the new slabs.

        A table that exists with the same specification is left as it is.

        Raises:
            TableError: a table exists with another specification, or a name stands twice.
        """
        new: dict[tuple[int, str, Optimizer], list[TableSpec]] = {}
        names: set[str] = set()
        for spec in tables:
            if spec.name in names:
                raise TableError(f"table {spec.name!r} is declared twice: give each table a name of its own")
            names.add(spec.name)
            if (existing := self.find(spec.name)) is None:
                new.setdefault((spec.width, spec.dtype, spec.optimizer), []).append(spec)
            elif existing != spec:
                raise TableError(
                    f"table {spec.name!r} exists as {existing.rows} x {existing.width} with another specification: "
                    f"use the same one, or another name"
                )
        added = []
        for specs in new.values():
            slab = Slab(len(self.slabs), tuple(specs), self.blocks)
            self.slabs.append(slab)
            added.append(slab)
            self._refs |= {spec.name: TableRef(slab.id, i) for i, spec in enumerate(specs)}
        return added

    def find(self, name: str) -> TableSpec | None:
        ref = self._refs.get(name)
        return None if ref is None else self.slabs[ref.slab].tables[ref.table]

    def ref(self, name: str) -> TableRef:
        """Raises TableError for an unknown table."""
        if name not in self._refs:
            known = ", ".join(sorted(self._refs)[:8]) or "none"
            raise TableError(f"unknown table {name!r}: the store holds {known}")
        return self._refs[name]

    @property
    def tables(self) -> Iterable[TableSpec]:
        return (spec for slab in self.slabs for spec in slab.tables)
