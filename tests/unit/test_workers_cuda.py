"""On a CUDA device: the same numbers as on the CPU, up to rounding."""

from __future__ import annotations

import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from embershard.datasets.schema import Batch
from embershard.parameter_server.requests import Clock
from embershard.parameter_server.store import Store
from embershard.parameter_server.tables import Optimizer
from embershard.workers.embeddings.planning import EmbeddingConfig
from embershard.workers.learner import Learner
from embershard.workers.models.build import ModelConfig
from embershard.workers.network import Network, NetworkSpec
from embershard.workers.optimizers import DenseConfig, OptimizerConfig, SparseConfig
from embershard.workers.pipeline import Pipeline

sys.path.insert(0, str(Path(__file__).parents[1] / "oracles"))
from workers_cases import DIM, HIDDEN, batches, schema, tables

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device"),
]
STEPS = 20


def trained(device: str) -> tuple[list[np.ndarray], list[float]]:
    with Store.open(shards=2, blocks=40, seed=5) as store:
        model = ModelConfig(bottom=[HIDDEN], top=[HIDDEN])
        spec = NetworkSpec.plan(schema(), EmbeddingConfig(dim=DIM), model, Optimizer(), 3)
        net = Network(spec, store, torch.device(device))
        store.begin(1, 1, 0)
        config = OptimizerConfig(
            sparse=SparseConfig(learning_rate=0.1), dense=DenseConfig(kind="adam", learning_rate=0.01)
        )
        learner = Learner(net, config, total_steps=STEPS)

        def clock(step: int) -> Clock:
            return Clock(1, step, staleness=2)

        made: list[Batch] = batches(STEPS, 300)
        pipeline = Pipeline(iter(made), net.embeddings, clock, depth=2)
        losses = []
        for step in range(1, STEPS + 1):
            batch, ticket = pipeline.next(STEPS)
            losses.append(learner.step(batch, ticket, clock(step), pipeline.settle).item())
        net.embeddings.drain()
        on_cpu = [table.copy() for table in tables(net.embeddings)]
    return on_cpu, losses


def test_training_on_cuda_equals_training_on_the_cpu() -> None:
    ours, losses = trained("cuda")
    expected, expected_losses = trained("cpu")
    np.testing.assert_allclose(losses, expected_losses, rtol=1e-3)
    for table, other in zip(ours, expected, strict=True):
        np.testing.assert_allclose(table, other, rtol=1e-2, atol=1e-4)
