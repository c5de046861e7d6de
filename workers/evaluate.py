"""Scoring: of the network in training, and of a checkpoint on its own."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import fsspec
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import torch

from ..datasets.files import load_schema
from ..datasets.schema import MISSING_ID, Batch, DataError
from ..datasets.stream import ParquetStream
from ..parameter_server.checkpoint import CheckpointError, Manifest, read_dense, read_manifest
from ..parameter_server.store import Store
from .embeddings.ticket import Ticket
from .network import Network, NetworkSpec, dense_inputs, load_dense
from .objectives import Metrics


def score(network: Network, batches: Iterator[Batch]) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """Of each batch (logits, labels) [B], or of a ranker (nDCG, items to find) [B]."""
    for outputs, batch in answer(network, batches):
        yield network.objective.answers(outputs, batch)


def answer(network: Network, batches: Iterator[Batch]) -> Iterator[tuple[np.ndarray, Batch]]:
    """(outputs float32 [B] or [B, items], batch) of each batch; the next one's rows are pulled meanwhile.

    The tables must not be changing: no push may be open.
    """
    device = network.embeddings.device
    pending: tuple[Batch, Ticket] | None = None
    with torch.inference_mode():
        for batch in batches:
            ahead = (batch, network.embeddings.prefetch(batch.ids))
            if pending is not None:
                yield _outputs(network, *pending, device)
            pending = ahead
        if pending is not None:
            yield _outputs(network, *pending, device)


def _outputs(network: Network, batch: Batch, ticket: Ticket, device: torch.device) -> tuple[np.ndarray, Batch]:
    dense, _ = dense_inputs(batch, device)
    return network(dense, ticket).float().cpu().numpy(), batch


def measure(network: Network, batches: Iterator[Batch]) -> Metrics:
    """Metrics of the network on the batches; in evaluation mode meanwhile."""
    metrics = network.objective.metrics()
    was_training = network.training
    network.eval()
    for answers, truth in score(network, batches):
        metrics.update(answers, truth)
    network.train(was_training)
    return metrics


@contextmanager
def open_network(checkpoint: str, device: torch.device | str = "cpu") -> Iterator[tuple[Network, Manifest]]:
    """A trained network, ready to answer, its tables in a store in this process while the block runs.

    Raises:
        CheckpointError: missing, damaged, or not written by `train`.
    """
    manifest = read_manifest(checkpoint)
    if "network" not in manifest.state:
        raise CheckpointError(f"checkpoint {checkpoint}: it holds tables but no model; it was not written by `train`")
    spec = NetworkSpec.model_validate(manifest.state["network"])
    with Store.open(blocks=manifest.blocks, seed=manifest.seed) as store:
        network = Network(spec, store, torch.device(device)).eval()
        store.load(checkpoint)
        load_dense(network, read_dense(checkpoint, manifest))
        yield network, manifest


def evaluate(
    checkpoint: str,
    data: str,
    *,
    batch_size: int = 4096,
    missing_id: int = MISSING_ID,
    predictions: str | None = None,
    device: torch.device | str = "cpu",
) -> dict[str, Any]:
    """Scores a checkpoint on a Parquet dataset, its tables in this process.

    predictions: a Parquet file to write, one row per row of the data, in its order: label, prediction (probability).

    Returns auc, logloss, normalized_entropy, calibration, samples (a ranker: ndcg_at_10, samples), seconds, step,
    checkpoint, and best_auc where the data states it.

    Raises:
        CheckpointError: missing, damaged, or not written by `train`. DataError: data without the columns it needs, or
            predictions of a ranker.
    """
    begin = time.perf_counter()
    with open_network(checkpoint, device) as (network, manifest):
        if predictions is not None and network.spec.model.ranks:
            raise DataError(f"--predictions: model {network.spec.model.name} ranks items, it predicts no label")
        schema, metrics = network.spec.data, network.objective.metrics()
        stream = ParquetStream(data, batch_size=batch_size, schema=schema, missing_id=missing_id, shuffle=False)
        writer = None if predictions is None else _Predictions(predictions)
        try:
            for answers, truth in score(network, stream.batches(0)):
                metrics.update(answers, truth)
                if writer is not None:
                    writer.add(answers, truth)
        finally:
            stream.close()
            if writer is not None:
                writer.close()
    result = metrics.compute() | {"seconds": time.perf_counter() - begin, "step": manifest.step}
    return result | {"checkpoint": checkpoint, "best_auc": best_auc(data)}


def best_auc(data: str) -> float | None:
    """The best AUC that any model can reach on generated data; None where nobody knows."""
    try:
        return load_schema(data).best_auc
    except DataError:  # files of somebody else, without metadata
        return None


class _Predictions:
    """A Parquet file of labels and probabilities, written batch by batch."""

    _SCHEMA = pa.schema([("label", pa.float32()), ("prediction", pa.float32())])

    def __init__(self, path: str) -> None:
        fs, inside = fsspec.core.url_to_fs(path)
        try:
            self._file = fs.open(inside, "wb")
        except OSError as error:
            raise DataError(f"{path}: predictions cannot be written there: {error.strerror or error}") from error
        self._writer = pq.ParquetWriter(self._file, self._SCHEMA)

    def add(self, logits: np.ndarray, labels: np.ndarray) -> None:
        probabilities = (1 / (1 + np.exp(-logits.astype(np.float64)))).astype(np.float32)
        self._writer.write_table(pa.table([labels, probabilities], schema=self._SCHEMA))

    def close(self) -> None:
        self._writer.close()
        self._file.close()
