"""TorchRec over two CPU processes on the same batches: `python -m embershard.workers.torchrec_bench JSON`.

Runs in an environment of its own (`embershard bench train --with-torchrec` builds it). Tables are sharded table-wise,
the only way TorchRec's planner offers on CPU; the dense module, loss and dense optimizer are those of `bench.py`.
"""

from __future__ import annotations

import json
import multiprocessing
import os
import sys
import time
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from torch import nn
from torch.nn import functional as F

from .models.build import ModelConfig
from .models.dlrm import DLRM

RANKS, WARM, LEARNING_RATE = 2, 5, 0.01


def _train(rank: int, path: str, dim: int, port: int, result: Any) -> None:
    from torch.distributed.optim import _apply_optimizer_in_backward  # type: ignore[attr-defined]
    from torchrec import EmbeddingBagCollection, EmbeddingBagConfig, KeyedJaggedTensor
    from torchrec.distributed import DistributedModelParallel
    from torchrec.distributed.embeddingbag import EmbeddingBagCollectionSharder
    from torchrec.distributed.planner import EmbeddingShardingPlanner, Topology
    from torchrec.distributed.planner.types import ParameterConstraints
    from torchrec.distributed.types import ShardingType
    from torchrec.optim.rowwise_adagrad import RowWiseAdagrad

    os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port), RANK=str(rank), WORLD_SIZE=str(RANKS))
    os.environ["LOCAL_RANK"] = str(rank)
    torch.set_num_threads(1)
    torch.manual_seed(0)
    dist.init_process_group("gloo", rank=rank, world_size=RANKS)
    with np.load(path) as file:
        ids, dense, labels, rows = file["ids"], file["dense"], file["labels"], file["rows"].tolist()
    names = [f"c{i}" for i in range(1, len(rows) + 1)]
    tables = EmbeddingBagCollection(
        device=torch.device("meta"),
        tables=[
            EmbeddingBagConfig(name=f"t_{n}", embedding_dim=dim, num_embeddings=r, feature_names=[n])
            for n, r in zip(names, rows, strict=True)
        ],
    )
    config = ModelConfig()

    class Network(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.embeddings = tables
            self.model = DLRM(dense.shape[2], len(rows), dim, bottom=config.bottom, top=config.top)

        def forward(self, x: torch.Tensor, sparse: Any) -> torch.Tensor:
            vectors = self.embeddings(sparse).values().view(len(x), len(rows), dim)
            logits: torch.Tensor = self.model(x, vectors)
            return logits

    module = Network()
    _apply_optimizer_in_backward(RowWiseAdagrad, module.embeddings.parameters(), {"lr": LEARNING_RATE})
    constraints = {f"t_{n}": ParameterConstraints(sharding_types=[ShardingType.TABLE_WISE.value]) for n in names}
    planner = EmbeddingShardingPlanner(
        topology=Topology(world_size=RANKS, compute_device="cpu"), constraints=constraints
    )
    sharders = [EmbeddingBagCollectionSharder()]
    plan = planner.collective_plan(module, sharders, dist.group.WORLD)
    model = DistributedModelParallel(module, device=torch.device("cpu"), sharders=sharders, plan=plan)
    parameters = [p for n, p in model.named_parameters() if "embedding_bags" not in n]
    optimizer = torch.optim.SGD(parameters, lr=LEARNING_RATE)
    local = labels.shape[1] // RANKS
    own = slice(rank * local, (rank + 1) * local)
    lengths = torch.ones(len(rows) * local, dtype=torch.int32)

    def step(number: int) -> None:
        values = torch.from_numpy(np.ascontiguousarray(ids[number, :, own]).reshape(-1))
        sparse = KeyedJaggedTensor(names, values, lengths=lengths)
        logits = model(torch.from_numpy(dense[number, own]), sparse)
        loss = F.binary_cross_entropy_with_logits(logits, torch.from_numpy(labels[number, own]))
        optimizer.zero_grad()
        loss.backward()  # type: ignore[no-untyped-call]
        optimizer.step()

    for number in range(WARM):
        step(number)
    dist.barrier()
    start = time.perf_counter()
    for number in range(WARM, len(ids)):
        step(number)
    dist.barrier()
    seconds = time.perf_counter() - start
    if rank == 0:
        steps = len(ids) - WARM
        result["samples_per_second"] = steps * local * RANKS / seconds
        result["ms_per_step"] = seconds / steps * 1e3
    dist.destroy_process_group()


def torchrec(path: str, dim: int, port: int) -> dict[str, float]:
    """samples/s of two ranks together. Raises RuntimeError: a rank failed."""
    context = multiprocessing.get_context("spawn")
    with context.Manager() as manager:
        result = manager.dict()
        ranks = [context.Process(target=_train, args=(rank, path, dim, port, result)) for rank in range(RANKS)]
        for process in ranks:
            process.start()
        for process in ranks:
            process.join()
        if failed := [rank for rank, process in enumerate(ranks) if process.exitcode]:
            raise RuntimeError(f"rank {failed[0]} ended with exit code {ranks[failed[0]].exitcode}")
        return dict(result)


if __name__ == "__main__":
    print(json.dumps(torchrec(**json.loads(sys.argv[1]))))
