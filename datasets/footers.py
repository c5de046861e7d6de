"""Parquet files: finding them, reading their footers, noticing that they changed."""

from __future__ import annotations

import os
import re
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field, replace
from glob import has_magic
from typing import Any
from urllib.parse import unquote

import pyarrow as pa
import pyarrow.parquet as pq

from .remote import RETRIES, RangeReader, filesystem, is_local
from .schema import DataError

INCOMPLETE = "_incomplete"  # lies in a folder of an object store until all its files are there
_FOOTER_THREADS = 8
_PARTITION = re.compile(r"([^=/]+)=([^/]*)")
_NULL_PARTITION = "__HIVE_DEFAULT_PARTITION__"


@dataclass(frozen=True)
class DataFile:
    """One Parquet file. name: its path below the data set's, for messages and the order; rows: per row group.

    arrow_schema: its columns, then those that its folders name (`day=3/`). partitions: the values of the latter. cells:
    of each column of lists, the values per row group, nulls and empty lists counted as one each.
    """

    name: str
    path: str
    fs: Any
    fingerprint: tuple[Any, ...]
    rows: tuple[int, ...]
    arrow_schema: pa.Schema
    metadata: dict[bytes, bytes]
    partitions: Mapping[str, int | str | None] = field(default_factory=dict)
    cells: Mapping[str, tuple[int, ...]] = field(default_factory=dict)

    def open(self, dictionaries: Sequence[str] = ()) -> pq.ParquetFile:
        """dictionaries: columns of strings to be read as a dictionary each.

        Raises:
            DataError: the file has vanished or changed since its footer was first read.
        """
        self.check()
        return _open(self.fs, self.path, dictionaries)

    def check(self) -> None:
        """Raises DataError when the file has vanished or changed since its footer was first read."""
        if fingerprint(self.fs, self.path) != self.fingerprint:
            raise DataError(f"{self.path}: the file vanished or changed while it was being read; start again")

    @property
    def size(self) -> int:
        """Bytes on disk."""
        return int(self.fingerprint[0])

    @property
    def is_local(self) -> bool:
        return is_local(self.fs)


def fingerprint(fs: Any, path: str) -> tuple[Any, ...] | None:
    """What changes when a file changes; None when there is none."""
    try:
        if is_local(fs):
            stat = os.stat(path)
            return (stat.st_size, stat.st_mtime_ns)
        info = RETRIES.call(lambda: fs.info(path), path)
        return (info["size"], info.get("ETag"))
    except FileNotFoundError:
        return None


def _open(fs: Any, path: str, dictionaries: Sequence[str] = ()) -> pq.ParquetFile:
    if is_local(fs):
        return pq.ParquetFile(path, pre_buffer=False, read_dictionary=list(dictionaries))
    return pq.ParquetFile(RangeReader(fs, path), pre_buffer=True, read_dictionary=list(dictionaries))


def list_files(path: str, suffix: str = ".parquet") -> tuple[Any, list[str]]:
    """The filesystem and the sorted full paths of a file, of all files `*suffix` below a folder, or of a pattern's.

    Below a folder, names that begin with `_` or `.` are skipped, folders too.

    Raises:
        DataError: nothing there, or no such file in the folder.
    """
    fs, _, paths = _find(path, suffix)
    return fs, paths


def _find(path: str, suffix: str, unfinished: bool = False) -> tuple[Any, str, list[str]]:
    """(filesystem, the folder that names are relative to, sorted paths)."""
    if not path:
        raise DataError("no path given: name a Parquet file, a folder of them, a pattern or a URL")
    try:
        fs, root = filesystem(path)
        fs.invalidate_cache()
        kind = _kind(fs, root)
        if kind == "file":
            return fs, os.path.dirname(root), [root]
        if kind == "directory":
            found = RETRIES.call(lambda: fs.find(root), path)
        elif has_magic(root):
            matched = RETRIES.call(lambda: fs.glob(root, detail=True), path)
            if not matched:
                raise DataError(f"{path}: no file or folder matches this pattern")
            root = re.split(r"[^/]*[*?\[]", root)[0].rstrip("/") or "/"
            found = [f for m, info in matched.items() for f in (fs.find(m) if info["type"] == "directory" else [m])]
        else:
            raise DataError(f"{path}: no such file or folder")
    except (ImportError, ValueError, OSError) as error:
        if isinstance(error, DataError):
            raise
        raise DataError(f"{path}: cannot be listed: {first_line(error)}") from error
    if not unfinished and any(os.path.basename(f) == INCOMPLETE for f in found):
        raise DataError(f"{path}: not complete: the command that writes it was stopped or still runs; run it again")
    visible = sorted({f for f in found if f.endswith(suffix) and not _hidden(os.path.relpath(f, root))})
    if not visible:
        raise DataError(f"{path}: no *{suffix} files in this folder (raw logs go through `embershard convert` first)")
    return fs, root, visible


def _kind(fs: Any, root: str) -> str | None:
    try:
        return str(RETRIES.call(lambda: fs.info(root), root)["type"])
    except FileNotFoundError:
        return None


def _hidden(relative: str) -> bool:
    return any(part.startswith(("_", ".")) for part in relative.split("/"))


def read_footers(path: str, unfinished: bool = False) -> list[DataFile]:
    """The files of a data set, in the order of their paths. Folders `name=value/` below `path` are columns too.

    unfinished: also where not all files are there yet.

    Raises:
        DataError: nothing there, or a file that is not Parquet or cut short.
    """
    fs, root, paths = _find(path, ".parquet", unfinished)
    with ThreadPoolExecutor(min(_FOOTER_THREADS, len(paths))) as pool:
        return _with_partitions(list(pool.map(lambda p: _read_footer(fs, p, os.path.relpath(p, root)), paths)))


def _read_footer(fs: Any, path: str, name: str) -> DataFile:
    found = fingerprint(fs, path)
    try:
        with _open(fs, path) as file:
            footer = file.metadata
            groups = range(footer.num_row_groups)
            rows = tuple(footer.row_group(i).num_rows for i in groups)
            lists = {f.name for f in file.schema_arrow if is_list(f.type)}
            places = (
                [(n, footer.schema.column(n).path.split(".")[0]) for n in range(footer.num_columns)] if lists else []
            )
            cells = {
                c: tuple(footer.row_group(i).column(n).num_values for i in groups) for n, c in places if c in lists
            }
            return DataFile(name, path, fs, found or (), rows, file.schema_arrow, footer.metadata or {}, cells=cells)
    except (pa.ArrowException, OSError) as error:
        raise DataError(f"{path}: not a Parquet file, or cut short: {first_line(error)}") from error


def is_list(found: pa.DataType) -> bool:
    return bool(pa.types.is_list(found) or pa.types.is_large_list(found) or pa.types.is_fixed_size_list(found))


def is_string(found: pa.DataType) -> bool:
    """Text or bytes, also where each different value is stored once (dictionary)."""
    if pa.types.is_dictionary(found):
        return is_string(found.value_type)
    kinds = (pa.types.is_string, pa.types.is_large_string, pa.types.is_binary, pa.types.is_large_binary)
    return any(kind(found) for kind in kinds)


def _with_partitions(files: list[DataFile]) -> list[DataFile]:
    """Adds the columns that folders name: integers where all their values are, otherwise strings."""
    raw = [dict(_PARTITION.findall(os.path.dirname(file.name) + "/")) for file in files]
    whole = {
        name: all(_is_whole(values[name]) for values in raw if name in values) for values in raw for name in values
    }
    result = []
    for file, values in zip(files, raw, strict=True):
        own = {n: _partition(v, whole[n]) for n, v in values.items() if n not in file.arrow_schema.names}
        fields = [pa.field(name, pa.int64() if whole[name] else pa.string()) for name in own]
        schema = pa.schema([*file.arrow_schema, *fields])
        result.append(replace(file, arrow_schema=schema, partitions=own) if own else file)
    return result


def _is_whole(text: str) -> bool:
    return text == _NULL_PARTITION or re.fullmatch(r"-?\d{1,18}", text) is not None


def _partition(text: str, whole: bool) -> int | str | None:
    if text == _NULL_PARTITION:
        return None
    return int(text) if whole else unquote(text)


def check_unchanged(path: str, files: Sequence[DataFile]) -> None:
    """Lists the data set again.

    Raises:
        DataError: a file appeared, vanished or changed since `files` were read; it is named.
    """
    fs, _, paths = _find(path, ".parquet")
    known = {file.path for file in files}
    for appeared in (found for found in paths if found not in known):
        raise DataError(f"{appeared}: the file appeared while {path} was being read; its rows were not, start again")
    there = set(paths)
    for file in files:
        if file.path not in there or fingerprint(fs, file.path) != file.fingerprint:
            raise DataError(f"{file.path}: the file vanished or changed while it was being read; start again")


def first_line(error: Exception) -> str:
    return (str(error).splitlines() or [type(error).__name__])[0].rstrip(".")
