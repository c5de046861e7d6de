"""The stream as a dataset of torch's, for a training loop with a `DataLoader`."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch.utils.data import IterableDataset, get_worker_info

from .schema import Batch
from .stream import ParquetStream


class ParquetDataset(IterableDataset[dict[str, Any]]):
    """Batches of a Parquet data set as tensors that share the stream's memory.

    path and arguments: as for `ParquetStream`; batch_size: rows per batch and rank. Use it with `DataLoader(dataset,
    batch_size=None)`; with worker processes, each reads its own windows, and together they yield every row of this
    rank's share once. `set_epoch` chooses the order.

    Yields:
        {labels float32 [B], dense float32 [B, D], ids {name: int64 [B]}}; with bags ids are {name: (values int64 [N],
        offsets int64 [B + 1])} and, if any bag has weights, weights {name: float32 [N]} comes along.
    """

    def __init__(self, path: str, *, batch_size: int, rank: int = 0, workers: int = 1, **arguments: Any) -> None:
        self._path, self._batch_size, self._arguments = path, batch_size, arguments
        self._rank, self._workers = rank, workers
        self._epoch = 0

    def set_epoch(self, epoch: int) -> None:
        """To be called before iterating; worker processes that persist do not hear of it."""
        self._epoch = epoch

    def __iter__(self) -> Iterator[dict[str, Any]]:
        info = get_worker_info()
        number, count = (info.id, info.num_workers) if info is not None else (0, 1)
        workers = self._workers * count
        stream = ParquetStream(
            self._path,
            batch_size=self._batch_size * workers,
            rank=self._rank * count + number,
            workers=workers,
            **self._arguments,
        )
        try:
            for batch in stream.batches(self._epoch):
                if batch.rows:
                    yield _tensors(batch)
        finally:
            stream.close()


def _tensors(batch: Batch) -> dict[str, Any]:
    ids, weights = {}, {}
    for f, name in enumerate(batch.ids.features):
        values, offsets = batch.ids[name]
        ids[name] = _tensor(values) if offsets is None else (_tensor(values), _tensor(offsets))
        if batch.ids.weights is not None and batch.ids.offsets is not None:
            begin = int(batch.ids.offsets[f * batch.rows])
            weights[name] = _tensor(batch.ids.weights[begin : begin + len(values)])
    tensors = {"labels": _tensor(batch.labels), "dense": _tensor(batch.dense), "ids": ids}
    return tensors | {"weights": weights} if weights else tensors


def _tensor(array: Any) -> torch.Tensor:
    return torch.from_numpy(array)
