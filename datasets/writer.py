"""Writing data sets: one Parquet file at a time with its schema and counts, and a folder that is complete or absent."""

from __future__ import annotations

import fcntl
import os
import shutil
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from .files import file_metadata, load_schema
from .schema import CategoricalColumn, DataError, DenseColumn, Schema
from .sketch import DistinctSketch

ROW_GROUP_ROWS = 32_768
SUMMARY = "_embershard.json"  # readers of Parquet folders pass over names that begin with `_`
_LOCK = "lock"


@dataclass(slots=True)
class Block:
    """Rows on their way to disk: labels int8 [B], dense int32 [D, B], ids int64 [F, B], and bool masks of the nulls."""

    labels: np.ndarray
    dense: np.ndarray
    dense_null: np.ndarray
    ids: np.ndarray
    ids_null: np.ndarray


class PartWriter:
    """One Parquet file: counts what it writes and states it in the file's metadata. Use as a context manager."""

    def __init__(
        self,
        path: Path,
        *,
        source: str,
        dense: Sequence[str],
        categorical: Sequence[str],
        cardinalities: Sequence[int] | None = None,
        best_auc: float | None = None,
    ) -> None:
        self.rows = self.positives = 0
        self._source, self._dense, self._categorical = source, dense, categorical
        self._cardinalities, self._best_auc = cardinalities, best_auc
        self._nulls = np.zeros(len(dense) + len(categorical), np.int64)
        self._sketch = DistinctSketch(categorical)
        self._schema = pa.schema(
            [("label", pa.int8()), *((n, pa.int32()) for n in dense), *((n, pa.int64()) for n in categorical)]
        )
        self._writer = pq.ParquetWriter(path, self._schema, compression="zstd", compression_level=1)

    def write(self, block: Block) -> None:
        """Appends rows, in row groups of ROW_GROUP_ROWS (a block ends the last one short)."""
        columns = [pa.array(block.labels)]
        columns += [pa.array(v, mask=null) for v, null in zip(block.dense, block.dense_null, strict=True)]
        columns += [pa.array(v, mask=null) for v, null in zip(block.ids, block.ids_null, strict=True)]
        self._writer.write_table(pa.Table.from_arrays(columns, schema=self._schema), row_group_size=ROW_GROUP_ROWS)
        self.rows += len(block.labels)
        self.positives += int(block.labels.sum(dtype=np.int64))
        self._nulls += np.concatenate([block.dense_null.sum(axis=1), block.ids_null.sum(axis=1)])
        self._sketch.add(np.ascontiguousarray(block.ids), ~block.ids_null)

    def _describe(self) -> Schema:
        missing = [float(share) for share in self._nulls / max(1, self.rows)]
        distinct = self._sketch.estimates()
        cardinalities: Sequence[int | None] = self._cardinalities or [None] * len(self._categorical)
        return Schema(
            source=self._source,
            label="label",
            dense=[DenseColumn(name=n, missing=m) for n, m in zip(self._dense, missing, strict=False)],
            categorical=[
                CategoricalColumn(
                    name=n, distinct=min(distinct[n], self.rows, c or self.rows), cardinality=c, missing=m
                )
                for n, c, m in zip(self._categorical, cardinalities, missing[len(self._dense) :], strict=True)
            ],
            rows=self.rows,
            positives=self.positives,
            best_auc=self._best_auc,
        )

    def __enter__(self) -> PartWriter:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if kind is None:
            self._writer.add_key_value_metadata(file_metadata(self._describe(), self._sketch))
        self._writer.close()


class DatasetWriter:
    """A folder that appears complete, by one rename, or not at all. Use as a context manager.

    Files are written to `.NAME.incomplete` beside it, which a failure removes and a later writer replaces.

    Raises:
        DataError: the output exists, is not on a local disk, or another process is writing it.
    """

    def __init__(self, output: str) -> None:
        if "://" in output:
            raise DataError(f"{output}: the output must be a local folder")
        self.output = Path(os.path.abspath(output))
        if self.output.exists() and (not self.output.is_dir() or any(self.output.iterdir())):
            raise DataError(f"{output}: exists already; remove it or name another output")
        self.folder = self.output.parent / f".{self.output.name}.incomplete"

    def __enter__(self) -> DatasetWriter:
        self.folder.mkdir(parents=True, exist_ok=True)
        self._lock = os.open(self.folder / _LOCK, os.O_CREAT | os.O_RDWR)
        try:
            fcntl.flock(self._lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            os.close(self._lock)
            raise DataError(f"{self.output}: another process is writing it") from error
        for left_over in self.folder.iterdir():
            if left_over.name != _LOCK:
                left_over.unlink()
        return self

    def finish(self) -> Schema:
        """Writes the summary, last, and lets the output appear. Returns the schema of the whole."""
        schema = load_schema(str(self.folder))
        (self.folder / SUMMARY).write_text(schema.model_dump_json(indent=1, exclude_none=True) + "\n")
        (self.folder / _LOCK).unlink()
        os.rename(self.folder, self.output)
        return schema

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if kind is not None:
            shutil.rmtree(self.folder, ignore_errors=True)
        os.close(self._lock)
