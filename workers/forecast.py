"""What a run will hold, send and take, before anything of its size exists: from its settings and some batches."""

from __future__ import annotations

import statistics
import time
from collections.abc import Mapping, Sequence
from concurrent.futures import Future
from contextlib import closing
from dataclasses import dataclass
from itertools import islice
from typing import Any, NoReturn, TypeVar

import numpy as np
import torch

from ..datasets.files import load_schema
from ..datasets.schema import DataError
from ..datasets.stream import ParquetStream
from ..parameter_server import kernels
from ..parameter_server.blocks import BlockMap
from ..parameter_server.memory import SlabMemory
from ..parameter_server.optimizers import apply
from ..parameter_server.requests import Clock, RowSet
from ..parameter_server.store import Counters, Store, StoreError
from ..parameter_server.tables import Layout, Slab, TableSpec
from .job import TrainingJob
from .learner import Learner
from .network import Network, NetworkSpec, dense_tensors, describe, methods_of

BATCHES = 12
# Large enough that a row is rarely in the cache, small enough for any machine.
KERNEL_TABLE_BYTES = 1 << 27

T = TypeVar("T")


def forecast(job: TrainingJob, *, blocks: int, shards: int, workers: int) -> dict[str, Any]:
    """The first BATCHES batches of rank 0, trained over a store without rows, and the shards' kernels on as many rows.

    Returns the sizes of `network.describe`, and
        method, placement, shards, workers, steps; optimizer_state_bytes, dense_parameters, checkpoint_bytes;
        worker: samples_per_step, rows_per_step, wire_bytes_per_step, ms_per_step (in `threads` threads here; rows of
            shards are there at once), table_bytes and state_bytes (0 unless tables are replicated);
        shard: of the busiest, table_bytes, state_bytes, rows_per_step, wire_bytes_per_step and ms_per_step (one thread
            here, for all workers), and busiest_over_mean of the rows per step;
        seconds: of all steps, if every worker and shard has a machine like this one, and no network is in their way.
    Wire bytes are rows, gradients and indices both ways; headers add a few per cent.

    Raises:
        DataError, EmbeddingError, TableError: the input cannot be right.
    """
    store = _Outline(blocks, shards, job.seed)
    trial = _train_a_little(job, store, workers)
    layout, all_rows, busiest = store.layout, trial.rows.sum(1), trial.rows[:, trial.rows.sum(0).argmax()]
    held = _held(store)
    worker = {"samples_per_step": trial.samples, "rows_per_step": float(all_rows.sum())}
    if job.embedding.placement == "replicated":
        # Every worker applies what all of them send.
        seconds, shard_seconds = trial.seconds + workers * _kernel_seconds(layout, all_rows), 0.0
        worker |= {"wire_bytes_per_step": (workers - 1) * _wire_bytes(layout, all_rows), **_sizes(held.sum(1))}
        shard = {"rows_per_step": 0.0, "wire_bytes_per_step": 0.0, **_sizes(np.zeros(2))}
    else:
        seconds, shard_seconds = trial.seconds, workers * _kernel_seconds(layout, busiest)
        worker |= {"wire_bytes_per_step": 2 * _wire_bytes(layout, all_rows), **_sizes(np.zeros(2))}
        wire = workers * 2 * _wire_bytes(layout, busiest)
        shard = {"rows_per_step": workers * float(busiest.sum()), "wire_bytes_per_step": wire, **_sizes(held.max(1))}
    together = seconds + shard_seconds if job.train.consistency == "sync" else max(seconds, shard_seconds)
    cells, state_cells = _cells(layout)
    return {
        **trial.sizes,
        "placement": job.embedding.placement,
        "shards": shards,
        "workers": workers,
        "steps": trial.steps,
        "seconds": trial.steps * together,
        "threads": torch.get_num_threads(),
        "optimizer_state_bytes": 4 * state_cells,
        "checkpoint_bytes": 4 * (cells + state_cells) + trial.dense_bytes,
        "worker": worker | {"ms_per_step": 1e3 * seconds},
        "shard": shard
        | {
            "ms_per_step": 1e3 * shard_seconds,
            "busiest_over_mean": float(busiest.sum() / all_rows.sum() * shards),
        },
    }


@dataclass
class _Trial:
    """What some steps of one worker showed. rows: distinct ones a step, float64 [slabs, shards]; samples and seconds: a
    step; steps: of the whole run."""

    sizes: dict[str, Any]
    rows: np.ndarray
    samples: float
    seconds: float
    steps: int
    dense_bytes: int


def _train_a_little(job: TrainingJob, store: _Outline, workers: int) -> _Trial:
    if job.data.path is None:
        raise DataError("data.path: nothing to plan for; give a Parquet file, a folder of them or a URL")
    if job.train.threads is not None:
        torch.set_num_threads(job.train.threads)
    data, schema = job.data, load_schema(job.data.path, job.data)
    spec = NetworkSpec.plan(schema, job.embedding, job.model, job.optimizer.sparse.update, job.seed)
    network = Network(spec, store, torch.device("cpu"))
    stream = ParquetStream(
        job.data.path,
        batch_size=data.batch_size,
        schema=schema,
        window_bytes=data.window_bytes,
        read_ahead_bytes=data.read_ahead_bytes,
        missing_id=data.missing_id,
        workers=workers,
        seed=job.seed,
        shuffle=data.shuffle,
    )
    with closing(stream):
        steps = job.train.epochs * stream.steps(0)
        learner = Learner(network, job.optimizer, total_steps=steps)
        rows, samples, seconds = _first_steps(network, stream, learner)
    dense = sum(parameter.numel() for parameter in network.parameters())
    sizes = {**describe(network), "dense_parameters": dense, "method": methods_of(spec.features)}
    dense_bytes = sum(tensor.nbytes for tensor in dense_tensors(network, learner.optimizer).values())
    return _Trial(sizes, rows, samples, seconds, min(steps, job.train.max_steps or steps), dense_bytes)


def _first_steps(network: Network, stream: ParquetStream, learner: Learner) -> tuple[np.ndarray, float, float]:
    """rows, samples and seconds of a `_Trial`."""
    store = network.embeddings.store
    rows = np.zeros((len(store.layout.slabs), len(store.block_map.addresses)))
    samples, seconds = [], []
    for step, batch in enumerate(islice(stream.batches(0), BATCHES), 1):
        begin, clock = time.perf_counter(), Clock(1, step)
        ticket = network.embeddings.prefetch(batch.ids, clock)
        learner.step(batch, ticket, clock)
        seconds.append(time.perf_counter() - begin)
        samples.append(len(batch.labels))
        for part in ticket.parts:
            owners = store.block_map.owners[part.blocks]
            rows[part.slab] += np.bincount(owners, weights=part.counts, minlength=rows.shape[1])
    # The first step loads what the others find loaded.
    return rows / len(samples), statistics.mean(samples), statistics.median(seconds[1:] or seconds)


def _wire_bytes(layout: Layout, rows: np.ndarray) -> float:
    """Of so many rows of each slab, [slabs], with their indices, one way."""
    return float(np.dot([slab.index_dtype.itemsize + 4 * slab.width for slab in layout.slabs], rows))


def _cells(layout: Layout) -> tuple[int, int]:
    """Floats of all rows, and of their optimizer state."""
    sizes = [(table.rows * slab.width, table.rows * slab.state_width) for slab in layout.slabs for table in slab.tables]
    return sum(size for size, _ in sizes), sum(state for _, state in sizes)


def _held(store: _Outline) -> np.ndarray:
    """int64 [2, shards]: bytes of rows and of optimizer state on each shard, rows that only fill up blocks included."""
    blocks = np.bincount(store.block_map.owners, minlength=len(store.block_map.addresses))
    slabs = store.layout.slabs
    rows = sum(slab.rows_per_block * slab.width for slab in slabs)
    state = sum(slab.rows_per_block * slab.state_width for slab in slabs)
    return np.outer((4 * rows, 4 * state), blocks)


def _sizes(held: np.ndarray) -> dict[str, int]:
    return {"table_bytes": int(held[0]), "state_bytes": int(held[1])}


def _kernel_seconds(layout: Layout, rows: np.ndarray) -> float:
    """What reading and updating so many rows of each slab takes one thread here, in tables of at most
    KERNEL_TABLE_BYTES. rows: [slabs]."""
    return sum(_slab_seconds(slab, round(count)) for slab, count in zip(layout.slabs, rows, strict=True) if count >= 1)


def _slab_seconds(slab: Slab, count: int) -> float:
    size = max(count, min(slab.blocks * slab.rows_per_block, KERNEL_TABLE_BYTES // (4 * slab.width)))
    spec = TableSpec(name="forecast", rows=size, width=slab.width, optimizer=slab.optimizer)
    memory = SlabMemory(Layout(1).add([spec])[0])
    memory.weights[:], memory.state[:] = 0.01, 0.01
    index = np.random.default_rng(0).permutation(size)[:count].astype(slab.index_dtype)
    grads, out = np.full((count, slab.width), 1e-3, np.float32), np.empty((count, slab.width), np.float32)
    seconds = []
    for _ in range(BATCHES):
        begin = time.perf_counter()
        kernels.gather(memory.weights, index, out)
        apply(slab.optimizer, memory.weights, memory.state, index, grads, 1e-3)
        seconds.append(time.perf_counter() - begin)
    return statistics.median(seconds[1:])


class _Outline(Store):
    """Where each row would be, and no row: what is read is zeros, what is pushed is dropped."""

    def __init__(self, blocks: int, shards: int, seed: int) -> None:
        self.layout = Layout(blocks, seed)
        self.block_map = BlockMap.initial(blocks, ("",) * shards)
        self.counters = Counters()

    def create_tables(self, tables: Sequence[TableSpec]) -> None:
        self.layout.add(tables)

    def begin(self, generation: int, workers: int, step: int) -> None: ...

    def reset(self) -> None: ...

    def pull(self, parts: Sequence[RowSet], clock: Clock | None = None) -> Future[list[np.ndarray]]:
        widths = [self.layout.slabs[part.slab].width for part in parts]
        return _done(
            [np.zeros((len(part.index), width), np.float32) for part, width in zip(parts, widths, strict=True)]
        )

    def push(
        self,
        parts: Sequence[RowSet],
        grads: Sequence[np.ndarray],
        learning_rates: Sequence[float],
        clock: Clock | None = None,
    ) -> Future[None]:
        return _done(None)

    def save(
        self,
        directory: str,
        *,
        step: int = 0,
        tensors: Mapping[str, np.ndarray] | None = None,
        state: Mapping[str, Any] | None = None,
    ) -> NoReturn:
        raise StoreError("there are no rows to save")

    def load(self, directory: str, tables: Mapping[str, str] | None = None) -> NoReturn:
        raise StoreError("there are no rows to load into")

    def statistics(self) -> list[dict[str, Any]]:
        return []

    def close(self) -> None: ...


def _done(result: T) -> Future[T]:
    future: Future[T] = Future()
    future.set_result(result)
    return future
