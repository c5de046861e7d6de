"""A trained network as one file: smallest form, checked against training, timed beside the uncompressed model."""

from __future__ import annotations

import os
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ..datasets.schema import MISSING_ID, Batch, Ids
from ..datasets.stream import ParquetStream
from ..parameter_server.tables import Optimizer
from .embeddings.base import SIZE_OPTIONS, Feature, Method
from .embeddings.planning import EmbeddingSize, build_method
from .evaluate import answer, open_network
from .export_files import (
    Answer,
    Entry,
    ExportDiffers,
    ExportError,
    check_onnx,
    description,
    entries,
    header_of,
    open_onnx,
    open_safetensors,
    open_torch,
    serving_network,
    write_onnx,
    write_safetensors,
    write_torch,
)
from .metrics import auc
from .models.base import Model
from .network import Network
from .serving import ServingNetwork, embedding_parameters, serve, served_features, served_tables

TOLERANCE = 1e-5
COMPARED_ROWS = 50_000
RANDOM_ROWS = 4096
TIMED_ROWS = 64
TIMED_CALLS = 200
# Uncompressed tables beyond this are not built only to be timed.
FULL_BYTES = 2_000_000_000


def export(
    checkpoint: str,
    output: str,
    *,
    format: str = "safetensors",
    data: str | None = None,
    missing_id: int = MISSING_ID,
) -> dict[str, Any]:
    """Writes the model of a checkpoint to `output`, opens it again and compares its answers with those of training.

    data: Parquet whose first rows are compared; without it, or where features are bags, random ids and no AUC.

    Returns output, format, step, file_bytes, full_file_bytes, embedding_bytes, full_embedding_bytes, rows_compared,
    largest_difference, auc, auc_in_training, latency_us and full_latency_us (median of one thread answering 64 rows by
    torch; None where the uncompressed tables would be larger than 2 GB).

    Raises:
        ExportError: the output exists, or the format cannot hold the model. ExportDiffers: what was written answers
            differently, by more than 1e-5 (relative to logits beyond 1). CheckpointError: missing or damaged.
        EmbeddingError: a method composes in a way that the format has no word for.
    """
    path = Path(output)
    if path.exists():
        raise ExportError(f"{output}: exists already; give another name or remove it")
    if not path.absolute().parent.is_dir():
        raise ExportError(f"{output}: there is no folder {path.absolute().parent}; create it first")
    with open_network(checkpoint) as (network, manifest), torch.no_grad(), _one_thread():
        exporter = _Exporter(network, format)
        if network.spec.data.has_bags:
            data = None
        batches = list(_batches(network, data, missing_id))
        temporary = path.with_name(f"{path.name}.tmp")
        try:
            exporter.write(temporary, batches[0])
            compared = _compare(exporter.open(temporary), network, batches, labelled=data is not None)
            os.replace(temporary, path)
        finally:
            temporary.unlink(missing_ok=True)
        sizes = {"file_bytes": path.stat().st_size, "full_file_bytes": exporter.full_file_bytes}
        latencies = exporter.latencies(batches[0])
        return {
            "output": output,
            "format": format,
            "step": manifest.step,
            **sizes,
            **exporter.sizes,
            **compared,
        } | latencies


class _Exporter:
    """One network in one format."""

    def __init__(self, network: Network, format: str) -> None:
        if generated := next((one for one in network.spec.features if one.column), None):
            raise ExportError(
                f"--format {format}: holds one vector per column, but column {generated.column!r} has one per "
                f"partition: train with embedding.operation mult, add or concat to export"
            )
        self.network, self.format, self.store = network, format, network.embeddings.store
        self.features = served_features(network)
        self.entries = entries(network, self.features, self.store)
        if format != "safetensors" and network.spec.data.has_bags:
            bag = next(column.name for column in network.spec.data.categorical if column.bag)
            raise ExportError(
                f"--format {format}: takes one id per feature, but feature {bag!r} is a bag: use --format safetensors"
            )
        if format == "onnx":
            check_onnx(sum(entry.bytes for entry in self.entries))
        self.described = description(network, self.features) if format == "safetensors" else {}

    def write(self, path: Path, example: Batch) -> None:
        if self.format == "safetensors":
            write_safetensors(path, self.entries, self.described)
        else:
            write = write_torch if self.format == "torch" else write_onnx
            write(path, self._module(), inputs(example))

    def open(self, path: Path) -> Answer:
        opened = {"safetensors": open_safetensors, "torch": open_torch, "onnx": open_onnx}[self.format]
        return opened(path, self.network)

    def _module(self) -> ServingNetwork:
        return serving_network(self.network, self.features, self.store)

    @property
    def sizes(self) -> dict[str, int]:
        size = EmbeddingSize.of([feature.method for feature in self.features])
        return {"embedding_bytes": 4 * embedding_parameters(self.features), "full_embedding_bytes": size.full_bytes}

    @property
    def full_file_bytes(self) -> int:
        """Of the safetensors file that the same model with `full` tables would be."""
        full = [serve(full_method(feature.method.feature)) for feature in self.features]
        model = [Entry(f"dense/model.{n}", tuple(p.shape), lambda: iter(())) for n, p in self._model.named_parameters()]
        tables = [Entry(f"table/{t.name}", (t.rows, t.width), lambda: iter(())) for t in served_tables(full)]
        found = [*tables, *model]
        described = self.described or {"model": self.network.spec.model.model_dump(mode="json")}
        return len(header_of(found, described)) + sum(entry.bytes for entry in found)

    @property
    def _model(self) -> Model:
        return self.network.model

    def latencies(self, example: Batch) -> dict[str, float | None]:
        full: float | None = None
        if self.sizes["full_embedding_bytes"] <= FULL_BYTES and self.network.embeddings.output == "feature":
            features = [serve(full_method(feature.method.feature)) for feature in self.features]
            tables = {table.name: torch.zeros(table.rows, table.width) for table in served_tables(features)}
            full = _microseconds(ServingNetwork(features, tables, self._model).eval(), example)
        return {"latency_us": _microseconds(self._module(), example), "full_latency_us": full}


def full_method(feature: Feature) -> Method:
    """The same feature uncompressed."""
    plain: dict[str, Any] = {**dict.fromkeys(SIZE_OPTIONS), "method": "full"}
    return build_method(Feature(**{**feature.model_dump(), **plain}), Optimizer())


def inputs(batch: Batch) -> tuple[Tensor, Tensor]:
    """(dense [B, D], ids [B, F]) of a batch with one id per feature."""
    return torch.from_numpy(batch.dense), single_ids(batch)


def single_ids(batch: Batch) -> Tensor:
    """int64 [B, F] of a batch with one id per feature."""
    return torch.from_numpy(batch.ids.values).view(len(batch.ids), -1).t().contiguous()


def _batches(network: Network, data: str | None, missing_id: int) -> Iterator[Batch]:
    """What is compared: the first rows of the data, or random ids without any."""
    if data is None:
        yield random_batch(network.spec.features, len(network.spec.data.dense), RANDOM_ROWS)
        return
    schema, rows = network.spec.data, 0
    stream = ParquetStream(data, batch_size=RANDOM_ROWS, schema=schema, missing_id=missing_id, shuffle=False)
    try:
        for batch in stream.batches(0):
            yield batch
            rows += batch.rows
            if rows >= COMPARED_ROWS:
                return
    finally:
        stream.close()


def random_batch(features: Sequence[Feature], dense: int, rows: int) -> Batch:
    """One id per feature, uniform over its cardinality."""
    rng = np.random.default_rng(0)
    ids = np.concatenate([rng.integers(0, feature.cardinality or 2**62, rows) for feature in features])
    names = tuple(feature.name for feature in features)
    return Batch(np.zeros(rows, np.float32), rng.random((rows, dense), np.float32), Ids(names, ids), rows)


def _compare(written: Answer, network: Network, batches: Sequence[Batch], *, labelled: bool) -> dict[str, Any]:
    """Logits of the written file beside those of training, and the AUC of both.

    Raises:
        ExportDiffers: beyond the tolerance.
    """
    labels = np.concatenate([batch.labels for batch in batches])
    trained = np.concatenate([outputs for outputs, _ in answer(network, iter(batches))])
    exported = np.concatenate([written(*inputs(batch)) for batch in batches])
    difference = np.abs(exported.astype(np.float64) - trained)
    worst = float(np.max(difference / np.maximum(1, np.abs(trained)), initial=0.0))
    if not worst <= TOLERANCE:
        raise ExportDiffers(
            f"the exported model answers differently from the trained one, by {worst:.1e} where {TOLERANCE:.0e} is "
            f"allowed; nothing was written: please report this with the run's config.yaml"
        )
    both = {"auc": auc(exported, labels), "auc_in_training": auc(trained, labels)} if labelled else {}
    return {"rows_compared": len(labels), "largest_difference": float(difference.max(initial=0.0)), **both}


def _microseconds(module: ServingNetwork, example: Batch) -> float:
    """Median time of one call with TIMED_ROWS samples."""
    dense, ids = (tensor[:TIMED_ROWS] for tensor in inputs(example))
    taken = []
    for _ in range(TIMED_CALLS):
        begin = time.perf_counter()
        module(dense, ids)
        taken.append(time.perf_counter() - begin)
    return float(np.median(taken)) * 1e6


@contextmanager
def _one_thread() -> Iterator[None]:
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(threads)
