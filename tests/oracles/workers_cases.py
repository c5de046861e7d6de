"""Small networks and explicit batches that several tests of the workers train on."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from embershard.datasets.schema import Batch, CategoricalColumn, DenseColumn, Ids, Schema
from embershard.parameter_server.store import Store
from embershard.parameter_server.tables import Optimizer
from embershard.workers.embeddings.collection import EmbeddingBagCollection
from embershard.workers.embeddings.planning import EmbeddingConfig
from embershard.workers.models.build import ModelConfig
from embershard.workers.network import Network, NetworkSpec

CARDINALITIES = (3, 11, 40)
DENSE = 5
DIM = 4
HIDDEN = 7


def schema(cardinalities: tuple[int, ...] = CARDINALITIES) -> Schema:
    return Schema(
        source="test",
        label="label",
        dense=[DenseColumn(name=f"i{i}") for i in range(DENSE)],
        categorical=[CategoricalColumn(name=f"c{i}", cardinality=n) for i, n in enumerate(cardinalities)],
        rows=0,
    )


def network(store: Store, *, sparse: str = "rowwise_adagrad", seed: int = 3, **embedding: Any) -> Network:
    config = EmbeddingConfig(dim=DIM, **embedding)
    model = ModelConfig(bottom=[HIDDEN], top=[HIDDEN])
    spec = NetworkSpec.plan(schema(), config, model, Optimizer(kind=sparse), seed)
    return Network(spec, store, torch.device("cpu"))


def batches(steps: int, rows: int, *, seed: int = 0) -> list[Batch]:
    """Explicit batches; ids repeat within a batch and over batches."""
    rng = np.random.default_rng(seed)
    made = []
    for _ in range(steps):
        ids = np.concatenate([(rng.integers(0, n, rows) * rng.random(rows)).astype(np.int64) for n in CARDINALITIES])
        names = tuple(f"c{i}" for i in range(len(CARDINALITIES)))
        dense = rng.standard_normal((rows, DENSE), dtype=np.float32)
        labels = (rng.random(rows) < 0.4).astype(np.float32)
        made.append(Batch(labels, dense, Ids(names, ids), rows))
    return made


def share(batch: Batch, rank: int, workers: int) -> Batch:
    """The rows of one rank: a contiguous piece, possibly empty."""
    cut = np.array_split(np.arange(batch.rows), workers)[rank]
    ids = batch.ids.values.reshape(len(batch.ids), -1)[:, cut].reshape(-1)
    return Batch(batch.labels[cut], batch.dense[cut], Ids(batch.ids.features, ids.copy()), batch.global_rows)


def tables(embeddings: EmbeddingBagCollection) -> list[np.ndarray]:
    """Every row of the tables of `full` features with a cardinality, in row order."""
    sizes = [feature.cardinality or 0 for feature in embeddings.features]
    ids = Ids.from_dict(
        {f.name: (np.arange(n), np.array([0, n])) for f, n in zip(embeddings.features, sizes, strict=True)}
    )
    ticket = embeddings.prefetch(ids)
    rows = ticket.rows()[0].detach().cpu().numpy()[ticket.inverse[0]]
    return np.split(rows, np.cumsum(sizes)[:-1])
