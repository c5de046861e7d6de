"""One training run of a comparison: trained in this process, measured on two halves of the evaluation rows, weighed."""

from __future__ import annotations

import tempfile
import time
from typing import Any

import numpy as np
import torch

from ..datasets.schema import DataError
from ..datasets.stream import ParquetStream
from ..parameter_server.store import Store
from .embeddings.base import Method
from .embeddings.planning import EmbeddingSize
from .evaluate import open_network, score
from .export import TIMED_CALLS, TIMED_ROWS, random_batch, single_ids
from .job import TrainingJob
from .network import Network
from .serving import ServingNetwork, embedding_parameters, load_tables, served_features
from .trainer import train


def run_trial(job: TrainingJob, blocks: int) -> dict[str, Any]:
    """Trains `job` with its tables in this process, divided into `blocks`; leaves nothing behind.

    Returns validation and test ({auc, logloss, normalized_entropy, calibration, samples}, of a ranker {ndcg_at_10,
    samples}: the even and the odd rows of data.eval_path), embedding_bytes (as exported), model_bytes (with the dense
    part), training_bytes (embeddings in training), steps, train_seconds and lookup_us (median of one thread composing
    the vectors of 64 samples).

    Raises:
        DataError: no evaluation data. And what `trainer.train` raises.
    """
    if job.data.eval_path is None:
        raise DataError("data.eval_path: nothing to compare on; give a Parquet file, a folder of them or a URL")
    quiet = job.model_copy(
        update={
            "data": job.data.model_copy(update={"eval_path": None}),
            "train": job.train.model_copy(update={"threads": 1}),
        }
    )
    with tempfile.TemporaryDirectory(prefix="embershard-trial-") as directory:
        with Store.open(blocks=blocks, seed=job.seed) as store:
            begin = time.perf_counter()
            summary = train(quiet, store, directory=directory)
            seconds = time.perf_counter() - begin
        with open_network(summary["checkpoint"]) as (network, _):
            validation, test = _measure(network, job)
            measured = {"steps": summary["steps"], "train_seconds": seconds, "lookup_us": _lookup_us(network)}
            return {"validation": validation, "test": test, **_weigh(network), **measured}


def _measure(network: Network, job: TrainingJob) -> tuple[dict[str, Any], dict[str, Any]]:
    """Of the even and of the odd rows."""
    data = job.data
    assert data.eval_path is not None
    stream = ParquetStream(
        data.eval_path,
        batch_size=data.eval_batch_size,
        schema=network.spec.data,
        missing_id=data.missing_id,
        shuffle=False,
    )
    halves = (network.objective.metrics(), network.objective.metrics())
    row = 0
    try:
        for answers, truth in score(network, stream.batches(0)):
            odd = (row + np.arange(len(truth))) % 2 == 1
            for half, chosen in zip(halves, (~odd, odd), strict=True):
                half.update(answers[chosen], truth[chosen])
            row += len(truth)
    finally:
        stream.close()
    return halves[0].compute(), halves[1].compute()


def _weigh(network: Network) -> dict[str, int]:
    methods = [method for method in network.embeddings.methods if isinstance(method, Method)]
    exported = 4 * embedding_parameters(served_features(network))
    dense = 4 * sum(p.numel() for p in network.model.parameters())
    return {
        "embedding_bytes": exported,
        "model_bytes": exported + dense,
        "training_bytes": EmbeddingSize.of(methods).bytes,
    }


def _lookup_us(network: Network) -> float:
    features = served_features(network)
    module = ServingNetwork(features, load_tables(features, network.embeddings.store), network.model).eval()
    ids = single_ids(random_batch(network.spec.features, 0, TIMED_ROWS))
    taken = []
    with torch.no_grad():
        for _ in range(TIMED_CALLS):
            begin = time.perf_counter()
            module.vectors(ids)
            taken.append(time.perf_counter() - begin)
    return float(np.median(taken)) * 1e6
