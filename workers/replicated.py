"""Placement `replicated`: every worker holds all tables, and applies the gradients of all workers itself."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import Future
from dataclasses import replace
from typing import Any

import numpy as np
import torch
import torch.distributed as dist

from ..parameter_server.blocks import BlockMap
from ..parameter_server.local import LocalStore
from ..parameter_server.requests import Clock, RowSet
from ..parameter_server.store import Counters, Store
from ..parameter_server.tables import DEFAULT_BLOCKS, Layout, TableSpec

# Every worker's bytes (uint8 [n], n may differ) to those of all, in rank order.
Exchange = Callable[[np.ndarray], Sequence[np.ndarray]]
_HEADER = 5  # int64 words per part


class ReplicatedStore(Store):
    """A store in this process like those of all other workers; a push is exchanged and applied in rank order by each.

    The shard's own code applies it, in `sync` as in `bounded`, so the numbers are those of a sharded store, and so are
    the checkpoints: one worker saves, any placement loads. All workers create the same tables, begin and load alike;
    each push is one of all workers, in the same order.

    exchange: see `all_gather_bytes`; by default there are no other workers.
    """

    def __init__(
        self,
        *,
        blocks: int = DEFAULT_BLOCKS,
        seed: int = 0,
        timeout: float = 60.0,
        exchange: Exchange = lambda own: [own],
    ) -> None:
        self._own = LocalStore(blocks=blocks, seed=seed, timeout=timeout)
        self._exchange = exchange
        self._ranks: list[LocalStore] = []  # each worker's view of the shard here

    @property
    def layout(self) -> Layout:  # type: ignore[override]
        return self._own.layout

    @property
    def block_map(self) -> BlockMap:  # type: ignore[override]
        return self._own.block_map

    @property
    def counters(self) -> Counters:  # type: ignore[override]
        return self._own.counters

    def create_tables(self, tables: Sequence[TableSpec]) -> None:
        self._own.create_tables(tables)
        for view in self._ranks:
            view.layout.add(tables)

    def begin(self, generation: int, workers: int, step: int) -> None:
        self._own.begin(generation, workers, step)

    def reset(self) -> None:
        self._own.reset()

    def pull(self, parts: Sequence[RowSet], clock: Clock | None = None) -> Future[list[np.ndarray]]:
        return self._own.pull(parts, clock)

    def push(
        self,
        parts: Sequence[RowSet],
        grads: Sequence[np.ndarray],
        learning_rates: Sequence[float],
        clock: Clock | None = None,
    ) -> Future[None]:
        mine = _pack(parts, grads, learning_rates)
        every = self._exchange(mine)
        while len(self._ranks) < len(every):
            self._ranks.append(self._own.attach())
        counters = self._own.counters
        counters.pushes += 1
        counters.rows_pushed += sum(len(part.index) for part in parts)
        counters.wire_bytes += sum(len(packed) for packed in every) - len(mine)
        done: Future[None] = Future()
        try:
            pushes = [
                view.push(*_unpack(packed), None if clock is None else replace(clock, rank=rank))
                for rank, (view, packed) in enumerate(zip(self._ranks, every, strict=True))
            ]
            for push in pushes:
                push.result()
        except Exception as error:
            done.set_exception(error)
        else:
            done.set_result(None)
        return done

    def save(
        self,
        directory: str,
        *,
        step: int = 0,
        tensors: Mapping[str, np.ndarray] | None = None,
        state: Mapping[str, Any] | None = None,
    ) -> Future[dict[str, Any]]:
        return self._own.save(directory, step=step, tensors=tensors, state=state)

    def load(self, directory: str, tables: Mapping[str, str] | None = None) -> dict[str, Any]:
        return self._own.load(directory, tables)

    def statistics(self) -> list[dict[str, Any]]:
        return self._own.statistics()

    def close(self) -> None:
        for view in self._ranks:
            view.close()
        self._own.close()


def all_gather_bytes() -> Exchange:
    """The exchange over torch.distributed, on a gloo group of its own: called by all workers alike."""
    group = dist.new_group(backend="gloo")
    workers = dist.get_world_size(group)

    def exchange(own: np.ndarray) -> list[np.ndarray]:
        sizes = [torch.zeros(1, dtype=torch.int64) for _ in range(workers)]
        dist.all_gather(sizes, torch.tensor([len(own)]), group=group)
        most = max(int(size) for size in sizes)
        padded = torch.zeros(most, dtype=torch.uint8)
        padded[: len(own)] = torch.from_numpy(own)
        every = [torch.empty(most, dtype=torch.uint8) for _ in range(workers)]
        dist.all_gather(every, padded, group=group)
        return [packed[: int(size)].numpy() for packed, size in zip(every, sizes, strict=True)]

    return exchange


def _pack(parts: Sequence[RowSet], grads: Sequence[np.ndarray], learning_rates: Sequence[float]) -> np.ndarray:
    """One buffer: the number of parts, per part a header, then per part rates, gradients, rows, counts, blocks."""
    headers = [
        [part.slab, len(part.index), len(part.blocks), grad.shape[1], part.index.itemsize]
        for part, grad in zip(parts, grads, strict=True)
    ]
    arrays: list[np.ndarray] = [np.array([len(parts)], np.int64), np.array(headers, np.int64)]
    for part, grad, rate in zip(parts, grads, learning_rates, strict=True):
        arrays += [np.array([rate]), part.index, grad, part.counts, part.blocks]
    return np.concatenate([np.ascontiguousarray(array).reshape(-1).view(np.uint8) for array in arrays])


def _unpack(packed: np.ndarray) -> tuple[list[RowSet], list[np.ndarray], list[float]]:
    place = 0

    def take(dtype: Any, count: int) -> np.ndarray:
        nonlocal place
        begin, place = place, place + np.dtype(dtype).itemsize * count
        return np.frombuffer(packed[begin:place].tobytes(), dtype)

    (number,) = take(np.int64, 1)
    parts: list[RowSet] = []
    grads: list[np.ndarray] = []
    rates: list[float] = []
    for slab, rows, blocks, width, itemsize in take(np.int64, number * _HEADER).reshape(-1, _HEADER).tolist():
        rates.append(float(take(np.float64, 1)[0]))
        index = take(np.uint32 if itemsize == 4 else np.uint64, rows)
        grads.append(take(np.float32, rows * width).reshape(rows, width))
        counts = take(np.uint32, blocks)
        parts.append(RowSet(slab, index, take(np.uint16, blocks), counts))
    return parts, grads, rates
