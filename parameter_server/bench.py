"""Kernels beside torch and FBGEMM: `python -m embershard.parameter_server.bench CONTENDER JSON`.

Every function below measures one contender and returns {reading: value}; `embershard bench kernels` alternates them and
takes paired ratios.
"""

from __future__ import annotations

import json
import statistics
import sys
import time
from collections.abc import Callable
from typing import Any

import numpy as np

from . import kernels
from .jit import jit
from .memory import SlabMemory
from .optimizers import apply
from .tables import Layout, Optimizer, TableSpec

TABLE_BYTES = 1 << 30  # weights alone; far beyond any last-level cache
UPDATES = ("sgd", "rowwise_adagrad", "adagrad", "adam")
UNIQUE_IDS, UNIQUE_TABLES = 53_248, 26


def timed(action: Callable[[], Any], repeat: int = 7) -> float:
    """Median seconds of `action`, after one call that does not count."""
    action()
    seconds = []
    for _ in range(repeat):
        start = time.perf_counter()
        action()
        seconds.append(time.perf_counter() - start)
    return statistics.median(seconds)


def rows_and_grads(width: int, calls: int, bytes_per_call: int = 1 << 24) -> tuple[int, np.ndarray, list[np.ndarray]]:
    """(rows of the table, gradients, distinct random indices per call): the same for every contender."""
    rng = np.random.default_rng(0)
    rows = TABLE_BYTES // (4 * width)
    count = min(bytes_per_call // (4 * width), 1 << 18)
    indices = [np.unique(rng.integers(0, rows, count + count // 50)) for _ in range(calls)]
    for index in indices:
        rng.shuffle(index)
    grads = rng.standard_normal((count, width), dtype=np.float32)
    return rows, grads, [index[:count] for index in indices]


def cycle(action: Callable[[np.ndarray], Any], indices: list[np.ndarray]) -> Callable[[], None]:
    """Calls `action` with another index every time, so that no call finds its rows in the cache."""
    state = iter(indices * 4)
    return lambda: action(next(state))


@jit
def _touch(weights: np.ndarray, index: np.ndarray) -> np.float32:
    """Reads one word of every cache line of the rows and writes nothing: what random reads cost at the least."""
    total = np.float32(0.0)
    lines = max(1, weights.shape[1] // 16)
    for i in range(len(index)):
        row = index[i]
        for line in range(lines):
            total += weights[row, line * 16]
    return total


def ours(width: int) -> dict[str, float]:
    """Our kernels on one thread, in million rows per second, and the random-read limit of this machine."""
    rows, grads, indices = rows_and_grads(width, 8)
    indices = [index.astype(np.uint32) for index in indices]
    out = np.empty_like(grads)
    readings = {}
    for kind in UPDATES:
        optimizer = Optimizer(kind=kind)
        weights, state = _filled(rows, width, optimizer)

        def update(
            index: np.ndarray, optimizer: Optimizer = optimizer, of: tuple[np.ndarray, np.ndarray] = (weights, state)
        ) -> None:
            apply(optimizer, *of, index, grads, 1e-3)

        readings[kind] = timed(cycle(update, indices))
    readings["random_read"] = timed(cycle(lambda index: _touch(weights, index), indices))
    readings["gather"] = timed(cycle(lambda index: kernels.gather(weights, index, out), indices))
    return {name: len(grads) / seconds / 1e6 for name, seconds in readings.items()}


def _filled(rows: int, width: int, optimizer: Optimizer) -> tuple[np.ndarray, np.ndarray]:
    """A table and its optimizer state, in the memory that a shard uses."""
    (slab,) = Layout(256).add([TableSpec(name="bench", rows=rows, width=width, optimizer=optimizer)])
    memory = SlabMemory(slab)
    memory.weights[:] = 0.01
    memory.state[:] = 0.0
    return memory.weights, memory.state


def torch_kernels(width: int) -> dict[str, float]:
    """torch on one thread: index_select, index_add_ and the sparse optimizers with coalesced gradients."""
    import torch

    torch.set_num_threads(1)
    rows, grads_np, indices_np = rows_and_grads(width, 8)
    indices = [torch.from_numpy(index) for index in indices_np]
    grads = torch.from_numpy(grads_np)
    weights = torch.nn.Parameter(torch.full((rows, width), 0.01))
    out = torch.empty_like(grads)
    table = weights.data
    readings = {
        "gather": timed(_cycle_torch(lambda index: torch.index_select(table, 0, index, out=out), indices)),
        "sgd": timed(_cycle_torch(lambda index: table.index_add_(0, index, grads, alpha=-1e-3), indices)),
    }
    for kind, optimizer_class in (("adagrad", torch.optim.Adagrad), ("adam", torch.optim.SparseAdam)):
        optimizer = optimizer_class([weights], lr=1e-3)

        def step(index: Any, optimizer: Any = optimizer) -> None:
            weights.grad = torch.sparse_coo_tensor(index[None], grads, (rows, width), is_coalesced=True)
            optimizer.step()

        readings[kind] = timed(_cycle_torch(step, indices))
        optimizer.state.clear()
    return {name: len(grads) / seconds / 1e6 for name, seconds in readings.items()}


def _cycle_torch(action: Callable[[Any], Any], indices: list[Any]) -> Callable[[], None]:
    state = iter(indices * 4)
    return lambda: action(next(state))


def fbgemm_kernels(width: int) -> dict[str, float]:
    """FBGEMM's table-batched embeddings on one thread: bags of one id, and the update fused into backward."""
    import torch
    from fbgemm_gpu.split_embedding_configs import EmbOptimType
    from fbgemm_gpu.split_table_batched_embeddings_ops_common import EmbeddingLocation, PoolingMode
    from fbgemm_gpu.split_table_batched_embeddings_ops_training import (
        ComputeDevice,
        SplitTableBatchedEmbeddingBagsCodegen,
    )

    torch.set_num_threads(1)
    rows, grads_np, indices_np = rows_and_grads(width, 8)
    indices = [torch.from_numpy(index) for index in indices_np]
    grads = torch.from_numpy(grads_np)
    offsets = torch.arange(len(grads) + 1)
    readings = {}
    kinds = {
        "rowwise_adagrad": EmbOptimType.EXACT_ROWWISE_ADAGRAD,
        "adagrad": EmbOptimType.EXACT_ADAGRAD,
        "sgd": EmbOptimType.EXACT_SGD,
    }
    for kind, optimizer in kinds.items():
        tables = SplitTableBatchedEmbeddingBagsCodegen(
            [(rows, width, EmbeddingLocation.HOST, ComputeDevice.CPU)],
            optimizer=optimizer,
            learning_rate=1e-3,
            eps=1e-8,
            pooling_mode=PoolingMode.SUM,
        )
        forward, backward = [], []
        for index in indices:
            start = time.perf_counter()
            out = tables(index, offsets)
            middle = time.perf_counter()
            out.backward(grads)
            forward.append(middle - start)
            backward.append(time.perf_counter() - middle)
        readings["gather"] = statistics.median(forward[1:])
        readings[kind] = statistics.median(backward[1:])
        del tables, out
    return {name: len(grads) / seconds / 1e6 for name, seconds in readings.items()}


def _zipf_batch() -> tuple[np.ndarray, np.ndarray, int]:
    """A batch of 2,048 samples in 26 tables of 1 M rows, Zipf(1.2): (rows int64 [N], segments, rows per table)."""
    rng = np.random.default_rng(0)
    rows = (rng.zipf(1.2, UNIQUE_IDS) * 2654435761 % 1_000_000).astype(np.int64)
    return rows, np.arange(UNIQUE_TABLES + 1) * (UNIQUE_IDS // UNIQUE_TABLES), 1_000_000


def ours_unique() -> dict[str, float]:
    """`locate`: distinct rows, inverse, placement and grouping by block; million ids per second."""
    rows, segments, size = _zipf_batch()
    layout = Layout()
    (slab,) = layout.add([TableSpec(name=f"t{i}", rows=size, width=16) for i in range(UNIQUE_TABLES)])
    tables, rank = np.arange(UNIQUE_TABLES, dtype=np.int32), np.arange(256, dtype=np.uint16)
    return {"unique": UNIQUE_IDS / timed(lambda: kernels.locate(slab, tables, segments, rows, rank), 31) / 1e6}


def torch_unique() -> dict[str, float]:
    """torch.unique with inverse over the same ids, one thread; it neither mixes nor places them."""
    import torch

    torch.set_num_threads(1)
    rows, segments, size = _zipf_batch()
    keys = torch.from_numpy(rows + np.repeat(np.arange(UNIQUE_TABLES) * size, np.diff(segments)))
    return {"unique": UNIQUE_IDS / timed(lambda: torch.unique(keys, return_inverse=True), 31) / 1e6}


CONTENDERS: dict[str, Callable[..., dict[str, float]]] = {
    "ours": ours,
    "torch": torch_kernels,
    "fbgemm": fbgemm_kernels,
    "ours_unique": ours_unique,
    "torch_unique": torch_unique,
}

if __name__ == "__main__":
    print(json.dumps(CONTENDERS[sys.argv[1]](**json.loads(sys.argv[2]))))
