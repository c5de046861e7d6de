"""What a run will hold, send and take, before anything of its size exists: from its settings and some batches."""

from __future__ import annotations

import statistics
import time
from collections import Counter
from collections.abc import Mapping
from contextlib import closing
from dataclasses import dataclass
from itertools import islice
from typing import Any

import numpy as np
import torch

from ..datasets.files import load_schema
from ..datasets.schema import DataError
from ..datasets.stream import ParquetStream
from ..parameter_server import kernels
from ..parameter_server.blocks import BlockMap
from ..parameter_server.memory import SlabMemory
from ..parameter_server.optimizers import apply
from ..parameter_server.requests import Clock, PullReply, PullRequest, PushReply, PushRequest
from ..parameter_server.sharded import OnAnswer, ShardedStore
from ..parameter_server.tables import Layout, Slab, TableSpec
from .job import TrainingJob
from .learner import Learner
from .network import Network, NetworkSpec, dense_tensors, describe, methods_of
from .trainer import open_stream

BATCHES = 12
# Large enough that a row is rarely in the cache, small enough for any machine.
KERNEL_TABLE_BYTES = 1 << 27


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
    with _Outline(blocks, shards, job.seed) as store:
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
    schema = load_schema(job.data.path, job.data)
    spec = NetworkSpec.plan(schema, job.embedding, job.model, job.optimizer.sparse.update, job.seed)
    network = Network(spec, store, torch.device("cpu"))
    stream = open_stream(
        job, job.data.path, schema, job.data.batch_size, shuffle=job.data.shuffle, rank=0, workers=workers
    )
    with closing(stream):
        steps = job.train.epochs * stream.steps(0)
        learner = Learner(network, job.optimizer, total_steps=steps)
        samples, seconds = _first_steps(network, stream, learner)
    dense = sum(parameter.numel() for parameter in network.parameters())
    sizes = {**describe(network), "dense_parameters": dense, "method": methods_of(spec.features)}
    dense_bytes = sum(tensor.nbytes for tensor in dense_tensors(network, learner.optimizer).values())
    asked = [[store.rows[slab.id, shard] for shard in range(store.shards)] for slab in store.layout.slabs]
    rows = np.array(asked) / len(samples)
    # The first step loads what the others find loaded.
    median = statistics.median(seconds[1:] or seconds)
    return _Trial(sizes, rows, statistics.mean(samples), median, min(steps, job.train.max_steps or steps), dense_bytes)


def _first_steps(network: Network, stream: ParquetStream, learner: Learner) -> tuple[list[int], list[float]]:
    """Samples and seconds of each."""
    samples, seconds = [], []
    for step, batch in enumerate(islice(stream.batches(0), BATCHES), 1):
        begin, clock = time.perf_counter(), Clock(1, step)
        learner.step(batch, network.embeddings.prefetch(batch.ids, clock), clock)
        seconds.append(time.perf_counter() - begin)
        samples.append(len(batch.labels))
    return samples, seconds


def _wire_bytes(layout: Layout, rows: np.ndarray) -> float:
    """Of so many rows of each slab, [slabs], with their indices, one way."""
    return float(np.dot([slab.index_dtype.itemsize + 4 * slab.width for slab in layout.slabs], rows))


def _cells(layout: Layout) -> tuple[int, int]:
    """Floats of all rows, and of their optimizer state."""
    tables = list(layout.tables)
    state = sum(table.rows * table.optimizer.state_width(table.width) for table in tables)
    return sum(table.rows * table.width for table in tables), state


def _held(store: _Outline) -> np.ndarray:
    """int64 [2, shards]: bytes of rows and of optimizer state on each shard, rows that only fill up blocks included."""
    blocks = np.bincount(store.block_map.owners, minlength=store.shards)
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


class _Outline(ShardedStore):
    """Shards without rows: those asked for, counted by (slab, shard) in `rows`, are zeros; pushes are dropped."""

    def __init__(self, blocks: int, shards: int, seed: int) -> None:
        super().__init__(Layout(blocks, seed), BlockMap.initial(blocks, ("",) * shards), timeout=60.0)
        self.rows: Counter[tuple[int, int]] = Counter()

    def _send(self, shard: int, request: PullRequest | PushRequest, timeout: float, on_answer: OnAnswer) -> None:
        statuses = [np.zeros(len(part.blocks), np.uint8) for part in request.parts]
        if isinstance(request, PushRequest):
            on_answer(PushReply(statuses), None)
            return
        for part in request.parts:
            self.rows[part.slab, shard] += len(part.index)
        zeros = [np.zeros((len(part.index), self.widths[part.slab]), np.float32) for part in request.parts]
        on_answer(PullReply(statuses, zeros), None)

    def control_at(self, address: str, method: str, arguments: Mapping[str, Any], within: float = 0.0) -> None:
        """There is nobody to tell."""
