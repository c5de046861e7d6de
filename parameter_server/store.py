"""The store as its users see it: the same interface in this process and on a cluster."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import Future
from dataclasses import asdict, dataclass
from threading import Lock
from typing import TYPE_CHECKING, Any, Literal, Self

import numpy as np
from pydantic import BaseModel, ConfigDict, Field, SecretStr

from .blocks import BlockMap
from .requests import Clock, RowSet
from .tables import DEFAULT_BLOCKS, Layout, TableSpec

if TYPE_CHECKING:
    from .client import StoreClient
    from .local import LocalStore


DEFAULT_JOURNAL_BYTES = 1 << 30


class StoreError(RuntimeError):
    """The store refused or could not answer: one line with what, where and what to do."""


class FencedError(StoreError):
    """This worker belongs to an older generation: nothing it writes is taken any more."""


class ShardUnavailable(StoreError):
    """A shard cannot be reached; nothing of the call was done, or nobody knows."""


class BusyError(StoreError):
    """Something under way on a shard excludes this for a moment (a block that moves, a cut): try again."""


class StoreTimeout(StoreError):
    """A deadline passed; the message names the shard, and whom the shard was waiting for."""


class SecurityError(StoreError):
    """A certificate or token is missing, unreadable or refused: waiting does not help."""


class StoreConfig(BaseModel):
    """The `store` section of a run."""

    model_config = ConfigDict(extra="forbid")
    blocks: int = Field(
        DEFAULT_BLOCKS, ge=10, le=65536, description="blocks per table; fixed when the store is created"
    )
    timeout: float = Field(60.0, gt=0, description="seconds a pull or push may take before it fails")
    durability: Literal["none", "journal"] = Field(
        "none", description="journal: a shard that dies comes back on its node with every acknowledged push"
    )
    journal_dir: str | None = Field(
        None, description="local folder for the shards' journals, one folder each; by default in the run's folder"
    )
    journal_bytes: int = Field(
        DEFAULT_JOURNAL_BYTES, ge=1 << 20, description="a shard whose journal has grown by this much writes itself down"
    )
    memory_bytes: int | None = Field(
        None, gt=0, description="per shard: rows, their optimizer state, and what a checkpoint has yet to write"
    )


@dataclass
class Counters:
    """What went over the interface so far. Degraded paths (moved, retries) are counted, never silent."""

    pulls: int = 0
    pushes: int = 0
    rows_pulled: int = 0
    rows_pushed: int = 0
    wire_bytes: int = 0
    moved: int = 0
    retries: int = 0

    def __post_init__(self) -> None:
        self._lock = Lock()

    def add(self, name: str, amount: int) -> None:
        """Counts from any thread."""
        with self._lock:
            setattr(self, name, getattr(self, name) + amount)

    def as_dict(self) -> dict[str, float]:
        return asdict(self)


class Store(ABC):
    """Sharded embedding tables. `Store.open` in this process; `Store.connect` to shards that listen elsewhere.

    One thread drives a store; the futures complete on others.
    """

    layout: Layout
    block_map: BlockMap
    counters: Counters

    @staticmethod
    def open(shards: int = 1, *, blocks: int = DEFAULT_BLOCKS, seed: int = 0) -> LocalStore:
        """A store in this process, divided over `shards` shards (no network, no Ray)."""
        from .local import LocalStore

        return LocalStore(shards=shards, blocks=blocks, seed=seed)

    @staticmethod
    def connect(
        address: str | Sequence[str],
        *,
        timeout: float = 60.0,
        token: str | SecretStr | None = None,
        find_map: Callable[[], BlockMap | None] = lambda: None,
    ) -> StoreClient:
        """The store that the shard at `address` ("host:port") belongs to.

        token: the run's; by default that of EMBERSHARD_TOKEN or EMBERSHARD_TOKEN_FILE. TLS is used where RAY_USE_TLS
        says so, with Ray's certificates (docs/security.md). find_map: see `ShardedStore`.
        """
        from .client import StoreClient

        return StoreClient.connect(address, timeout=timeout, token=token, find_map=find_map)

    @abstractmethod
    def create_tables(self, tables: Sequence[TableSpec]) -> None:
        """Adds tables with their initial rows; those that exist with the same specification stay as they are.

        Raises:
            TableError: a table exists with another specification.
        """

    @abstractmethod
    def begin(self, generation: int, workers: int, step: int) -> None:
        """Starts a generation of `workers` workers whose next step is `step + 1`; fences all older generations."""

    @abstractmethod
    def reset(self) -> None:
        """Every row has its initial value again and no push is remembered: as if the tables had just been created."""

    @abstractmethod
    def pull(self, parts: Sequence[RowSet], clock: Clock | None = None) -> Future[list[np.ndarray]]:
        """Reads rows: float32 [U, width] per part, in the order of its index."""

    @abstractmethod
    def push(
        self,
        parts: Sequence[RowSet],
        grads: Sequence[np.ndarray],
        learning_rates: Sequence[float],
        clock: Clock | None = None,
    ) -> Future[None]:
        """Applies summed gradients, exactly once each; done when every block's part is acknowledged."""

    @abstractmethod
    def save(
        self,
        directory: str,
        *,
        step: int = 0,
        tensors: Mapping[str, np.ndarray] | None = None,
        state: Mapping[str, Any] | None = None,
    ) -> Future[dict[str, Any]]:
        """Checkpoint of this moment, called at a step boundary with every push acknowledged.

        Returns as soon as the cut stands on every shard; rows are written in the background and pushes may go on.
        `tensors` (the dense part) and `state` (JSON: cursor, ...) are stored beside. The manifest is written last, and
        the future then holds it.
        """

    @abstractmethod
    def load(self, directory: str, tables: Mapping[str, str] | None = None) -> dict[str, Any]:
        """Overwrites tables by name with those of a checkpoint that any number of shards wrote; returns its manifest.

        `tables`: table of this store -> table of the checkpoint; by default every table of this store, by its own name.

        Raises:
            CheckpointError: missing, damaged, or of another shape; nothing was changed.
        """

    @abstractmethod
    def statistics(self) -> list[dict[str, Any]]:
        """Per shard: shard, blocks, table_bytes, state_bytes, pulls, pushes, duplicates, refused, ..."""

    @abstractmethod
    def close(self) -> None: ...

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exc: object) -> Literal[False]:
        self.close()
        return False
