"""Training steps per second beside what a user would run instead: `python -m embershard.workers.bench CONTENDER JSON`.

All contenders share one dense module, loss, dense optimizer, dtype, number of threads and list of batches (from a
file); only the embedding differs. Each runs in a process of its own; `embershard bench train` alternates them.
"""

from __future__ import annotations

import json
import os
import resource
import sys
import tempfile
import time
from collections import defaultdict
from collections.abc import Callable, Iterator
from concurrent.futures import Future
from contextlib import ExitStack, contextmanager
from functools import wraps
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn
from torch.nn import functional as F

from ..datasets.schema import Batch, CategoricalColumn, DenseColumn, Ids, Schema
from ..datasets.synthetic import KAGGLE
from ..parameter_server import kernels
from ..parameter_server.allocator import keep_freed_memory
from ..parameter_server.requests import Clock
from ..parameter_server.rpc_bench import process_cpu, shard_processes
from ..parameter_server.store import Store
from ..parameter_server.tables import Optimizer
from .embeddings.base import Feature
from .learner import Learner
from .models.build import ModelConfig
from .models.dlrm import DLRM
from .network import Network, NetworkSpec, dense_tensors
from .optimizers import DenseConfig, OptimizerConfig, SparseConfig
from .pipeline import Pipeline

DENSE, WARM, LEARNING_RATE, EPS = 13, 5, 0.01, 1e-8


def write_batches(path: Path, *, batch: int, steps: int, row_cap: int) -> None:
    """The list of batches that every contender reads: Zipf(1.2) ids over Criteo Kaggle's cardinalities, capped."""
    rng = np.random.default_rng(0)
    rows = [min(n, row_cap) for n in KAGGLE]
    shape = (steps + WARM, len(rows), batch)
    ids = np.empty(shape, np.int64)
    for feature, n in enumerate(rows):
        ids[:, feature] = rng.zipf(1.2, (shape[0], batch)) * 2654435761 % n
    dense = rng.standard_normal((shape[0], batch, DENSE), dtype=np.float32)
    labels = (rng.random((shape[0], batch)) < 0.25).astype(np.float32)
    np.savez(path, ids=ids, dense=dense, labels=labels, rows=np.array(rows))


class _Task:
    """The batches and the dense part, the same for everybody."""

    def __init__(self, path: str, dim: int, threads: int) -> None:
        torch.set_num_threads(threads)
        with np.load(path) as file:
            self.ids, self.dense, self.labels = file["ids"], file["dense"], file["labels"]
            self.rows: list[int] = file["rows"].tolist()
        self.dim = dim
        self.collapsed: int | None = None
        self.batch = self.labels.shape[1]
        self.steps = len(self.ids) - WARM
        self.model_config = ModelConfig()

    def model(self) -> DLRM:
        config = self.model_config
        return DLRM(DENSE, len(self.rows), self.dim, bottom=config.bottom, top=config.top)

    def time(self, step: Callable[[int], Any]) -> dict[str, float]:
        """samples/s of `step(number)` over all batches but the first few."""
        for number in range(WARM):
            step(number)
        cpu = _own_cpu()
        start = time.perf_counter()
        for number in range(WARM, WARM + self.steps):
            step(number)
        seconds = time.perf_counter() - start
        return {
            "samples_per_second": self.steps * self.batch / seconds,
            "ms_per_step": seconds / self.steps * 1e3,
            "worker_cpu_ms_per_step": (_own_cpu() - cpu) / self.steps * 1e3,
        }

    def plain(self, embed: Callable[[torch.Tensor], torch.Tensor], *sparse: torch.optim.Optimizer) -> dict[str, float]:
        """A plain torch loop: `embed` turns ids [F, B] into vectors [B, F, d]."""
        model = self.model()
        optimizers = [*sparse, torch.optim.SGD(model.parameters(), lr=LEARNING_RATE)]
        tensors = [torch.from_numpy(array) for array in (self.ids, self.dense, self.labels)]

        def step(number: int) -> None:
            ids, dense, labels = (tensor[number] for tensor in tensors)
            logits = model(dense, embed(ids))
            loss = F.binary_cross_entropy_with_logits(logits, labels)
            for optimizer in optimizers:
                optimizer.zero_grad()
            loss.backward()  # type: ignore[no-untyped-call]
            for optimizer in optimizers:
                optimizer.step()

        return self.time(step)


def dense_only(path: str, dim: int, threads: int) -> dict[str, float]:
    """The dense part alone: what a free embedding would give."""
    task = _Task(path, dim, threads)
    vectors = torch.randn(task.batch, len(task.rows), dim, requires_grad=True)
    return task.plain(lambda ids: vectors)


def torch_adagrad(path: str, dim: int, threads: int) -> dict[str, float]:
    """nn.EmbeddingBag(sparse=True) with torch.optim.Adagrad."""
    task = _Task(path, dim, threads)
    bags = nn.ModuleList(nn.EmbeddingBag(n, dim, mode="sum", sparse=True) for n in task.rows)
    sparse = torch.optim.Adagrad(bags.parameters(), lr=LEARNING_RATE)
    return task.plain(
        lambda ids: torch.stack([bag(own.unsqueeze(1)) for bag, own in zip(bags, ids, strict=True)], 1), sparse
    )


def fbgemm(path: str, dim: int, threads: int) -> dict[str, float]:
    """FBGEMM's table-batched embeddings with row-wise Adagrad in the backward pass."""
    from fbgemm_gpu.split_embedding_configs import EmbOptimType
    from fbgemm_gpu.split_table_batched_embeddings_ops_common import EmbeddingLocation, PoolingMode
    from fbgemm_gpu.split_table_batched_embeddings_ops_training import (
        ComputeDevice,
        SplitTableBatchedEmbeddingBagsCodegen,
    )

    task = _Task(path, dim, threads)
    tables = SplitTableBatchedEmbeddingBagsCodegen(
        [(n, dim, EmbeddingLocation.HOST, ComputeDevice.CPU) for n in task.rows],
        optimizer=EmbOptimType.EXACT_ROWWISE_ADAGRAD,
        learning_rate=LEARNING_RATE,
        eps=EPS,
        pooling_mode=PoolingMode.SUM,
    )
    tables.init_embedding_weights_uniform(-0.05, 0.05)
    offsets = torch.arange(len(task.rows) * task.batch + 1)
    return task.plain(lambda ids: tables(ids.reshape(-1), offsets).view(task.batch, len(task.rows), dim))


def ours(
    path: str,
    dim: int,
    threads: int,
    shards: int,
    consistency: str,
    journal: bool = False,
    mtls: bool = False,
    checkpoints: bool = False,
    collapsed: int | None = None,
) -> dict[str, float]:
    """Our own training step over shards in processes of their own; `shards` 0: tables in this process.

    journal: the shards write every push to a temporary folder on disk before they acknowledge it. mtls: as RAY_USE_TLS
    says. checkpoints: one after the other is written meanwhile. collapsed: MLET with factors of width `dim` that give
    vectors of this width, in place of single-layer tables of width `dim`.
    """
    if not mtls:
        os.environ.pop("RAY_USE_TLS", None)
    if shards:
        keep_freed_memory()  # as in a worker of a run; a process of the user's own is left as it is
    kernels.warm_up()
    task = _Task(path, dim, threads)
    task.collapsed = collapsed
    with ExitStack() as stack:
        pids: list[int] = []
        if shards:
            folder = stack.enter_context(tempfile.TemporaryDirectory())
            addresses, pids = stack.enter_context(shard_processes(shards, journal=folder if journal else None))
            store: Store = stack.enter_context(Store.connect(addresses))
        else:
            store = stack.enter_context(Store.open())
        saved = stack.enter_context(tempfile.TemporaryDirectory()) if checkpoints else None
        return _train(task, store, consistency, pids, saved)


def _train(task: _Task, store: Store, consistency: str, pids: list[int], saved: str | None) -> dict[str, float]:
    empty = sum(_resident(pid) for pid in pids)
    network = Network(_spec(task), store, torch.device("cpu"))
    sparse = SparseConfig(kind="rowwise_adagrad", learning_rate=LEARNING_RATE, eps=EPS)
    config = OptimizerConfig(sparse=sparse, dense=DenseConfig(kind="sgd", learning_rate=LEARNING_RATE))
    learner = Learner(network, config, total_steps=task.steps + WARM)
    store.begin(1, 1, 0)
    lag = 1 if consistency == "bounded" else 0

    def clock(step: int) -> Clock:
        return Clock(1, step, staleness=lag, sync=consistency == "sync")

    parts = _Parts()
    pipeline = Pipeline(parts.each("reader", _batches(task)), network.embeddings, clock, depth=lag)
    before: dict[str, Any] = {}
    saves: list[Future[Any]] = []

    def step(number: int) -> None:
        if number == WARM:
            parts.clear()
            before.update(
                wire=store.counters.wire_bytes, cpu=[process_cpu(pid) for pid in pids], wait=pipeline.wait_seconds
            )
        if number == 1:
            before["startup"] = _seconds_since_start()
        batch, ticket = pipeline.next(task.steps + WARM)
        learner.step(batch, ticket, clock(number + 1), pipeline.settle)
        if saved is not None and all(save.done() for save in saves):
            network.embeddings.drain()
            saves.append(
                store.save(f"{saved}/{number}", step=number, tensors=dense_tensors(network, learner.optimizer))
            )
        if number == WARM + task.steps - 1:
            network.embeddings.drain()  # the last push belongs to the timed part

    parts.watch(network.embeddings, "prefetch", "ids_and_pull")
    parts.watch(network.embeddings, "step", "push")
    parts.watch(network.model, "forward", "dense_forward")
    parts.watch(network, "forward", "forward")
    parts.watch(torch.Tensor, "backward", "backward")
    parts.watch(learner.optimizer, "step", "dense_update")
    try:
        readings = task.time(step)
    finally:
        parts.unwatch()
    readings["checkpoints"] = sum(save.done() for save in saves)
    for save in saves:
        save.result()
    samples = task.steps * task.batch
    readings |= parts.per_step(task.steps)
    readings["pull_wait_ms_per_step"] = (pipeline.wait_seconds - before["wait"]) / task.steps * 1e3
    shard_cpu = sum(process_cpu(pid) - cpu for pid, cpu in zip(pids, before["cpu"], strict=True))
    readings["shard_cpu_ms_per_step"] = shard_cpu / task.steps * 1e3
    readings["wire_bytes_per_sample"] = (store.counters.wire_bytes - before["wire"]) / samples
    for kind in ("ms_per_step", "cpu_ms_per_step"):
        readings[f"compose_{kind}"] = readings.pop(f"forward_{kind}") - readings[f"dense_forward_{kind}"]
    readings["startup_seconds"] = before["startup"]
    tables = sum(shard["table_bytes"] + shard["state_bytes"] for shard in store.statistics())
    if pids:
        # Started from here, a shard has imported all that this process has; on Ray it has not.
        readings["empty_shard_gb"] = empty / len(pids) / 1e9
        readings["shard_growth_over_tables"] = (sum(_resident(pid) for pid in pids) - empty) / tables
    readings["worker_resident_gb"] = _resident("self") / 1e9
    return readings


def _batches(task: _Task) -> Iterator[Batch]:
    names = tuple(f"c{i}" for i in range(1, len(task.rows) + 1))
    for ids, dense, labels in zip(task.ids, task.dense, task.labels, strict=True):
        yield Batch(labels, dense, Ids(names, ids.reshape(-1), None), len(labels))


def _spec(task: _Task) -> NetworkSpec:
    names = [f"c{i}" for i in range(1, len(task.rows) + 1)]
    shape: dict[str, Any] = {"dim": task.dim}
    if task.collapsed is not None:
        shape = {"method": "mlet", "dim": task.collapsed, "inner_dim": task.dim}
    return NetworkSpec(
        features=[Feature(name=n, cardinality=r, **shape) for n, r in zip(names, task.rows, strict=True)],
        model=task.model_config,
        data=Schema(
            source="bench",
            label="label",
            dense=[DenseColumn(name=f"i{i}") for i in range(1, DENSE + 1)],
            categorical=[CategoricalColumn(name=n, cardinality=r) for n, r in zip(names, task.rows, strict=True)],
            rows=task.batch * task.steps,
        ),
        optimizer=Optimizer(kind="rowwise_adagrad", eps=EPS),
        seed=0,
    )


class _Parts:
    """What the worker's own thread takes for each part, and all of its process's threads meanwhile, in seconds."""

    def __init__(self) -> None:
        self._seconds: dict[str, float] = defaultdict(float)
        self._cpu: dict[str, float] = defaultdict(float)
        self._watched = ExitStack()

    def unwatch(self) -> None:
        self._watched.close()

    def clear(self) -> None:
        self._seconds.clear()
        self._cpu.clear()

    def per_step(self, steps: int) -> dict[str, float]:
        wall = {f"{part}_ms_per_step": total / steps * 1e3 for part, total in sorted(self._seconds.items())}
        return wall | {f"{part}_cpu_ms_per_step": total / steps * 1e3 for part, total in sorted(self._cpu.items())}

    def watch(self, owner: Any, method: str, part: str) -> None:
        original = getattr(owner, method)

        @wraps(original)
        def timed(*args: Any, **kwargs: Any) -> Any:
            with self._timed(part):
                return original(*args, **kwargs)

        setattr(owner, method, timed)
        self._watched.callback(setattr, owner, method, original)

    def each(self, part: str, batches: Iterator[Batch]) -> Iterator[Batch]:
        while True:
            with self._timed(part):
                batch = next(batches, None)
            if batch is None:
                return
            yield batch

    @contextmanager
    def _timed(self, part: str) -> Iterator[None]:
        start, cpu = time.perf_counter(), time.process_time()
        try:
            yield
        finally:
            self._seconds[part] += time.perf_counter() - start
            self._cpu[part] += time.process_time() - cpu


def _resident(pid: int | str) -> float:
    """Bytes of memory of a process."""
    with open(f"/proc/{pid}/statm") as file:
        return int(file.read().split()[1]) * resource.getpagesize()


def _seconds_since_start() -> float:
    """Of this process, imports included."""
    with open("/proc/self/stat") as file:
        started = int(file.read().rsplit(")", 1)[1].split()[19]) / os.sysconf("SC_CLK_TCK")
    return time.clock_gettime(time.CLOCK_BOOTTIME) - started


def _own_cpu() -> float:
    usage = resource.getrusage(resource.RUSAGE_SELF)
    return usage.ru_utime + usage.ru_stime


CONTENDERS: dict[str, Callable[..., dict[str, float]]] = {
    "dense": dense_only,
    "torch_adagrad": torch_adagrad,
    "fbgemm": fbgemm,
    "ours": ours,
}

if __name__ == "__main__":
    print(json.dumps(CONTENDERS[sys.argv[1]](**json.loads(sys.argv[2]))))
