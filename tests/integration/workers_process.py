"""One worker of `test_workers_distributed.py`, in a process of its own: python workers_process.py TASK.json RANK."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from embershard.parameter_server.requests import Clock
from embershard.parameter_server.store import Store
from embershard.workers.embeddings.gradients import GradientError
from embershard.workers.group import Group
from embershard.workers.job import TrainingJob
from embershard.workers.learner import Learner
from embershard.workers.network import dense_tensors
from embershard.workers.optimizers import OptimizerConfig
from embershard.workers.pipeline import Pipeline
from embershard.workers.replicated import ReplicatedStore, all_gather_bytes
from embershard.workers.trainer import train
from torch.nn.parallel import DistributedDataParallel

sys.path.insert(0, str(Path(__file__).parents[1] / "oracles"))
from workers_cases import batches, network, share, tables


def explicit(task: dict[str, Any], store: Store, rank: int, workers: int) -> None:
    """Steps on explicit batches; rank 0 writes what came out."""
    if rank:
        dist.barrier()
    net = network(store, sparse=task["sparse"], **task["embedding"])
    if not rank or "addresses" not in task:
        store.begin(1, workers, 0)
    if not rank:
        dist.barrier()
    dist.barrier()
    config = OptimizerConfig.model_validate(task["optimizer"])
    steps = task["steps"]
    learner = Learner(net, config, total_steps=steps, wrap=DistributedDataParallel)
    own = [share(batch, rank, workers) for batch in batches(steps, task["rows"])]
    pipeline = Pipeline(iter(own), net.embeddings, lambda s: Clock(1, s, rank, workers, 0, True), depth=0)
    for step in range(1, steps + 1):
        batch, ticket = pipeline.next(steps)
        learner.step(batch, ticket, Clock(1, step, rank, workers, 0, True), pipeline.settle)
    net.embeddings.drain()
    dist.barrier()
    if not rank:
        found = {f"table {i}": table for i, table in enumerate(tables(net.embeddings))}
        np.savez(task["output"], **found, **dense_tensors(net, learner.optimizer))


def poisoned(task: dict[str, Any], store: Store, rank: int, workers: int) -> None:
    """One step whose dense column is NaN for rank 1 alone; every rank writes what it was told."""
    net = network(store, sparse="sgd")
    if not rank:
        store.begin(1, workers, 0)
    dist.barrier()
    learner = Learner(
        net,
        OptimizerConfig(),
        total_steps=1,
        wrap=DistributedDataParallel,
        group=Group(rank, workers, torch.device("cpu")),
    )
    batch = share(batches(1, task["rows"])[0], rank, workers)
    if rank == 1:
        batch.dense[0, 0] = np.nan
    clock = Clock(1, 1, rank, workers)
    message = ""
    try:
        learner.step(batch, net.embeddings.prefetch(batch.ids), clock)
    except GradientError as error:
        message = str(error)
    dist.barrier()
    pushed = sum(shard["rows_pushed"] for shard in store.statistics())
    Path(f"{task['output']}.{rank}").write_text(json.dumps({"message": message, "rows_pushed": pushed}))


def whole(task: dict[str, Any], store: Store, rank: int, workers: int) -> None:
    """`train` over the stream; rank 0 writes its summary and records."""
    records: list[dict[str, Any]] = []
    summary = train(
        TrainingJob.model_validate(task["job"]),
        store,
        rank=rank,
        workers=workers,
        generation=task["generation"],
        directory=task["directory"],
        report=records.append,
        # Asked of one rank alone: the others have to be told.
        stop_requested=lambda: rank == 1 and task["stop"],
        wrap=DistributedDataParallel,
    )
    if not rank:
        Path(task["output"]).write_text(json.dumps({"summary": summary, "records": records}))


def open_store(part: dict[str, Any]) -> Store:
    """The shards of a part, or all tables in this process."""
    if "addresses" in part:
        return Store.connect(part["addresses"], timeout=60)
    return ReplicatedStore(blocks=40, seed=5, exchange=all_gather_bytes())


def main() -> None:
    task, rank = json.loads(Path(sys.argv[1]).read_text()), int(sys.argv[2])
    torch.set_num_threads(1)
    workers = task["workers"]
    dist.init_process_group("gloo", init_method=f"file://{task['rendezvous']}", rank=rank, world_size=workers)
    for part in task["parts"]:
        with open_store(part) as store:
            {"explicit": explicit, "poisoned": poisoned, "whole": whole}[part["kind"]](part, store, rank, workers)
            dist.barrier()
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
