"""Parquet files: finding them, reading their footers, and what their metadata says."""

from __future__ import annotations

import base64
import json
import os
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any

import fsspec
import pyarrow as pa
import pyarrow.parquet as pq
from pydantic import ValidationError

from .schema import METADATA_KEY, SKETCH_KEY, CategoricalColumn, DataConfig, DataError, DenseColumn, Schema
from .sketch import DistinctSketch

_FOOTER_THREADS = 8


@dataclass(frozen=True)
class DataFile:
    """One Parquet file. name: its path below the data set's, for messages and the order; rows: per row group."""

    name: str
    path: str
    fs: Any
    fingerprint: tuple[Any, ...]
    rows: tuple[int, ...]
    arrow_schema: pa.Schema
    metadata: dict[bytes, bytes]

    def open(self) -> pq.ParquetFile:
        """Raises DataError when the file has vanished or changed since its footer was first read."""
        if _fingerprint(self.fs, self.path) != self.fingerprint:
            raise DataError(f"{self.path}: the file vanished or changed while it was being read; start again")
        return _open(self.fs, self.path)


def _is_local(fs: Any) -> bool:
    return isinstance(fs, fsspec.implementations.local.LocalFileSystem)


def _fingerprint(fs: Any, path: str) -> tuple[Any, ...] | None:
    try:
        if _is_local(fs):
            stat = os.stat(path)
            return (stat.st_size, stat.st_mtime_ns)
        info = fs.info(path)
        return (info["size"], info.get("ETag"))
    except FileNotFoundError:
        return None


def _open(fs: Any, path: str) -> pq.ParquetFile:
    if _is_local(fs):
        return pq.ParquetFile(path, pre_buffer=False)
    return pq.ParquetFile(fs.open(path, "rb"), pre_buffer=True)


def list_files(path: str, suffix: str = ".parquet") -> tuple[Any, list[str]]:
    """The filesystem and the sorted full paths of a file, or of all files `*suffix` below a folder.

    Names that begin with `_` or `.` are skipped, folders too.

    Raises:
        DataError: nothing there, or no such file in the folder.
    """
    if not path:
        raise DataError("no path given: name a Parquet file, a folder of them or a URL")
    try:
        fs, root = fsspec.core.url_to_fs(path)
        if fs.isfile(root):
            return fs, [root]
        if not fs.isdir(root):
            raise DataError(f"{path}: no such file or folder")
        found = sorted(fs.find(root))
    except (ImportError, ValueError, OSError) as error:
        if isinstance(error, DataError):
            raise
        raise DataError(f"{path}: cannot be listed: {_line(error)}") from error
    visible = [f for f in found if f.endswith(suffix) and not _hidden(os.path.relpath(f, root))]
    if not visible:
        raise DataError(f"{path}: no *{suffix} files in this folder (raw logs go through `embershard convert` first)")
    return fs, visible


def _hidden(relative: str) -> bool:
    return any(part.startswith(("_", ".")) for part in relative.split("/"))


def read_footers(path: str) -> list[DataFile]:
    """The files of a data set, in the order of their paths.

    Raises:
        DataError: nothing there, or a file that is not Parquet or cut short.
    """
    fs, paths = list_files(path)
    root = os.path.dirname(paths[0]) if len(paths) == 1 else os.path.commonpath(paths)
    with ThreadPoolExecutor(min(_FOOTER_THREADS, len(paths))) as pool:
        return list(pool.map(lambda p: _read_footer(fs, p, os.path.relpath(p, root)), paths))


def _read_footer(fs: Any, path: str, name: str) -> DataFile:
    fingerprint = _fingerprint(fs, path)
    try:
        with _open(fs, path) as file:
            footer = file.metadata
            rows = tuple(footer.row_group(i).num_rows for i in range(footer.num_row_groups))
            return DataFile(name, path, fs, fingerprint or (), rows, file.schema_arrow, footer.metadata or {})
    except (pa.ArrowException, OSError) as error:
        raise DataError(f"{path}: not a Parquet file, or cut short: {_line(error)}") from error


def _line(error: Exception) -> str:
    return (str(error).splitlines() or [type(error).__name__])[0].rstrip(".")


def load_schema(path: str, config: DataConfig | None = None) -> Schema:
    """The schema of the data set at `path`, from its files' metadata; columns named in `config` take precedence.

    Raises:
        DataError: files of different columns, or files that were not written by embershard and no columns named.
    """
    return schema_of(path, read_footers(path), config)


def schema_of(path: str, files: Sequence[DataFile], config: DataConfig | None = None) -> Schema:
    """As `load_schema`, for footers that have been read."""
    config = config or DataConfig()
    schemas = [_embedded(file) for file in files]
    first = schemas[0]
    if first is None or any(schema is None for schema in schemas):
        bare = files[schemas.index(None)]
        return _foreign(path, bare, files, config)
    merged = _merge(files, [schema for schema in schemas if schema is not None])
    return _select(merged, files[0], config)


def _embedded(file: DataFile) -> Schema | None:
    if METADATA_KEY not in file.metadata:
        return None
    try:
        return Schema.model_validate_json(file.metadata[METADATA_KEY])
    except ValidationError as error:
        raise DataError(
            f"{file.path}: its embershard metadata cannot be read (written by another version?): convert it again"
        ) from error


def _foreign(path: str, bare: DataFile, files: Sequence[DataFile], config: DataConfig) -> Schema:
    if config.label is None or config.dense is None or config.categorical is None:
        raise DataError(
            f"{bare.path}: no embershard metadata, so name its columns: give data.label=..., data.dense=[...] and "
            f"data.categorical=[...] (`embershard inspect {path}` proposes them)"
        )
    names = [*config.dense]
    types = [file.arrow_schema.field(n).type for file in files for n in names if n in file.arrow_schema.names]
    return Schema(
        source="parquet",
        label=config.label,
        dense=[DenseColumn(name=name) for name in config.dense],
        categorical=[CategoricalColumn(name=name) for name in config.categorical],
        # A count is heavy-tailed; a float has usually been scaled by its owner.
        dense_transform="log1p" if all(pa.types.is_integer(t) for t in types) else "none",
        rows=sum(sum(file.rows) for file in files),
    )


def _select(schema: Schema, file: DataFile, config: DataConfig) -> Schema:
    """The schema with the columns that the settings name, in their order."""
    dense = {column.name: column for column in schema.dense}
    categorical = {column.name: column for column in schema.categorical}
    changes: dict[str, Any] = {}
    if config.label is not None and config.label != schema.label:
        changes |= {"label": config.label, "positives": None, "best_auc": None}
    if config.dense is not None:
        changes["dense"] = [dense.get(name, DenseColumn(name=name)) for name in config.dense]
    if config.categorical is not None:
        changes["categorical"] = [categorical.get(name, CategoricalColumn(name=name)) for name in config.categorical]
    return schema.model_copy(update=changes)


def _merge(files: Sequence[DataFile], schemas: Sequence[Schema]) -> Schema:
    """One schema for all files: rows and positives added, shares weighted, distinct counts from the merged sketches."""
    first = schemas[0]
    for file, schema in zip(files, schemas, strict=True):
        if schema.columns != first.columns or schema.dense_transform != first.dense_transform:
            raise DataError(
                f"{file.path}: its columns differ from those of {files[0].path}: give each kind of data a folder"
            )
    rows = sum(schema.rows for schema in schemas)
    positives = [schema.positives for schema in schemas]
    sketch = merged_sketch(files)
    distinct = sketch.estimates() if sketch is not None else {}
    dense = [
        DenseColumn(name=column.name, missing=_share([s.dense[i].missing for s in schemas], schemas))
        for i, column in enumerate(first.dense)
    ]
    cardinalities = [_common([s.categorical[i].cardinality for s in schemas]) for i in range(len(first.categorical))]
    categorical = [
        CategoricalColumn(
            name=column.name,
            distinct=min(rows, distinct[column.name], cardinalities[i] or rows) if column.name in distinct else None,
            cardinality=cardinalities[i],
            missing=_share([s.categorical[i].missing for s in schemas], schemas),
        )
        for i, column in enumerate(first.categorical)
    ]
    return first.model_copy(
        update={
            "rows": rows,
            "positives": None if None in positives else sum(p or 0 for p in positives),
            "dense": dense,
            "categorical": categorical,
            "best_auc": first.best_auc if len({s.best_auc for s in schemas}) == 1 else None,
        }
    )


def _share(shares: Sequence[float | None], schemas: Sequence[Schema]) -> float | None:
    rows = sum(schema.rows for schema in schemas)
    if rows == 0 or None in shares:
        return None
    return sum((share or 0.0) * schema.rows for share, schema in zip(shares, schemas, strict=True)) / rows


def _common(cardinalities: Sequence[int | None]) -> int | None:
    known = [n for n in cardinalities if n is not None]
    return max(known) if len(known) == len(cardinalities) and known else None


def merged_sketch(files: Sequence[DataFile]) -> DistinctSketch | None:
    """The distinct counts over all files, None where a file has none."""
    merged: DistinctSketch | None = None
    for file in files:
        if SKETCH_KEY not in file.metadata:
            return None
        sketch = DistinctSketch.from_bytes(base64.b64decode(file.metadata[SKETCH_KEY]))
        if merged is None:
            merged = sketch
        else:
            merged.merge(sketch)
    return merged


def file_metadata(schema: Schema, sketch: DistinctSketch) -> dict[str, str]:
    """What is written into a Parquet file's key-value metadata."""
    return {
        METADATA_KEY.decode(): json.dumps(schema.model_dump(exclude_none=True)),
        SKETCH_KEY.decode(): base64.b64encode(sketch.to_bytes()).decode(),
    }
