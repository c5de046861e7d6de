"""Writing data sets: one Parquet file at a time with its schema and counts, and a folder that is complete or absent."""

from __future__ import annotations

import errno
import fcntl
import hashlib
import json
import math
import os
import shutil
import socket
import tempfile
import uuid
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from .files import file_metadata, frequent_ids, join_moments, schema_of
from .footers import INCOMPLETE, read_footers
from .remote import RETRIES, RangeReader, filesystem, is_local
from .schema import CategoricalColumn, DataError, DenseColumn, Schema
from .sketch import IdSketch

ROW_GROUP_ROWS = 32_768
SUMMARY = "_embershard.json"  # readers of Parquet folders pass over names that begin with `_`
ORIGIN_KEY = b"embershard.origin"
_LOCK, _OWNER = "lock", "owner"
_NO_ROOM = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)


@dataclass(slots=True)
class Block:
    """Rows on their way to disk: labels int8 [B], dense int32 [D, B], ids int64 [F, B], and bool masks of the nulls.

    bags: per column of lists, offsets int32 [B + 1] and ids int64 [offsets[B]].
    """

    labels: np.ndarray
    dense: np.ndarray
    dense_null: np.ndarray
    ids: np.ndarray
    ids_null: np.ndarray
    bags: Sequence[tuple[np.ndarray, np.ndarray]] = ()


class PartWriter:
    """One Parquet file: counts what it writes and states it in the file's metadata. Use as a context manager.

    bags: the columns of lists; they stand behind the others. cardinalities: of categorical, then of bags.
    """

    def __init__(
        self,
        path: Path,
        *,
        source: str,
        dense: Sequence[str],
        categorical: Sequence[str],
        bags: Sequence[str] = (),
        cardinalities: Sequence[int] | None = None,
        best_auc: float | None = None,
    ) -> None:
        self.rows = self.positives = 0
        self._source, self._dense, self._bags = source, dense, frozenset(bags)
        self._categorical = [*categorical, *bags]
        self._cardinalities, self._best_auc = cardinalities, best_auc
        self._nulls = np.zeros(len(dense) + len(categorical), np.int64)
        self._sketch = IdSketch(self._categorical)
        self._moments = [(0, 0.0, 0.0) for _ in dense]
        self._origin: str | None = None
        self._schema = pa.schema(
            [
                ("label", pa.int8()),
                *((n, pa.int32()) for n in dense),
                *((n, pa.int64()) for n in categorical),
                *((n, pa.list_(pa.int64())) for n in bags),
            ]
        )
        self._writer = pq.ParquetWriter(path, self._schema, compression="zstd", compression_level=1)

    def write(self, block: Block) -> None:
        """Appends rows, in row groups of ROW_GROUP_ROWS (a block ends the last one short)."""
        columns = [pa.array(block.labels)]
        columns += [pa.array(v, mask=null) for v, null in zip(block.dense, block.dense_null, strict=True)]
        columns += [pa.array(v, mask=null) for v, null in zip(block.ids, block.ids_null, strict=True)]
        columns += [pa.ListArray.from_arrays(offsets, values) for offsets, values in block.bags]
        self._writer.write_table(pa.Table.from_arrays(columns, schema=self._schema), row_group_size=ROW_GROUP_ROWS)
        self.rows += len(block.labels)
        self.positives += int(block.labels.sum(dtype=np.int64))
        self._nulls += np.concatenate([block.dense_null.sum(axis=1), block.ids_null.sum(axis=1)])
        for k, (values, null) in enumerate(zip(block.dense, block.dense_null, strict=True)):
            present = values[~null]
            if len(present):
                one = (len(present), float(present.mean()), float(present.var(dtype=np.float64)) * len(present))
                self._moments[k] = join_moments(self._moments[k], one)
        for f, (values, null) in enumerate(zip(block.ids, block.ids_null, strict=True)):
            self._sketch.add(f, values[~null] if null.any() else values)
        for f, (_, values) in enumerate(block.bags, len(block.ids)):
            self._sketch.add(f, values)

    def state(self, origin: str, count: int, examples: Sequence[str]) -> None:
        """What the file is made from, and its bad rows: for the conversion that goes on after this one was killed."""
        self._origin = json.dumps({"origin": origin, "count": count, "examples": list(examples)})

    def _describe(self) -> Schema:
        missing = [float(share) for share in self._nulls / max(1, self.rows)] + [0.0] * len(self._bags)
        distinct, frequent = self._sketch.distinct(), frequent_ids(self._sketch)
        cardinalities: Sequence[int | None] = self._cardinalities or [None] * len(self._categorical)
        return Schema(
            source=self._source,
            label="label",
            dense=[
                DenseColumn(name=n, missing=m, mean=mean, deviation=math.sqrt(squares / max(1, count)))
                for n, m, (count, mean, squares) in zip(self._dense, missing, self._moments, strict=False)
            ],
            categorical=[
                CategoricalColumn(
                    name=n,
                    distinct=min(distinct[n], c or distinct[n], distinct[n] if n in self._bags else self.rows),
                    frequent=frequent[n],
                    cardinality=c,
                    missing=m,
                    bag=n in self._bags,
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
        if kind is not None:
            with suppress(OSError):  # on a full disk, where the first failure says it
                self._writer.close()
            return
        stated = {} if self._origin is None else {ORIGIN_KEY.decode(): self._origin}
        self._writer.add_key_value_metadata(file_metadata(self._describe(), self._sketch) | stated)
        self._writer.close()


@contextmanager
def writing_behind(writer: PartWriter) -> Iterator[Callable[[Block], None]]:
    """A function that writes a block on another thread while its caller makes the next one.

    When the context ends, all are written. A failure is raised by the call that follows, or at the end.
    """
    under_way: Future[None] | None = None

    def write(block: Block) -> None:
        nonlocal under_way
        if under_way is not None:
            under_way.result()
        under_way = behind.submit(writer.write, block)

    with ThreadPoolExecutor(1, thread_name_prefix="parquet-write") as behind:
        yield write
        if under_way is not None:
            under_way.result()


class DatasetWriter:
    """A folder that appears complete or not at all. Use as a context manager.

    A local one is written to `.NAME.incomplete` beside it and appears by one rename. In an object store, which has no
    rename, it holds a file `_incomplete` until all is there, and no reader takes it before; the file names who writes,
    so that a second machine is refused, or noticed by the first one's next part. A failure removes what was written;
    what a killed process left is taken up by the next one on this machine that writes the same (`keep`).

    Raises:
        DataError: the output exists, or another process is writing it.
    """

    def __init__(self, output: str) -> None:
        self._fs, self._root = filesystem(output)
        self._local = is_local(self._fs)
        self.output = Path(os.path.abspath(self._root)) if self._local else Path(self._root)
        self.name = str(self.output) if self._local else output
        self._marker = f"{self._root}/{INCOMPLETE}"
        self._owner = b""  # what the marker holds while this writer owns the output
        self._parts: set[str] = set()
        if self._local:
            exists = self.output.exists() and (not self.output.is_dir() or any(self.output.iterdir()))
            self.folder = self.output.parent / f".{self.output.name}.incomplete"
        else:
            there = _find_all(self._fs, self._root)
            exists = bool(there) and self._marker not in there
            digest = hashlib.blake2b(output.encode(), digest_size=8).hexdigest()
            self.folder = Path(tempfile.gettempdir(), f"embershard-{digest}.incomplete")
        if exists:
            raise DataError(f"{output}: exists already; remove it or name another output")

    def __enter__(self) -> DatasetWriter:
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            self._lock = os.open(self.folder / _LOCK, os.O_CREAT | os.O_RDWR)
        except OSError as error:
            raise self.failed(error) from error
        try:
            fcntl.flock(self._lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            os.close(self._lock)
            raise DataError(f"{self.name}: another process is writing it") from error
        if not self._local:
            try:
                self._claim()
            except BaseException:
                os.close(self._lock)
                raise
        return self

    def _claim(self) -> None:
        """Makes the output this writer's, unless it is that of another machine."""
        note = self.folder / _OWNER
        self._owner = note.read_bytes() if note.exists() else b""  # of a killed process of this machine
        if self._found_owner() is None:
            who = f"process {os.getpid()} on {socket.gethostname()}, {uuid.uuid4().hex[:8]}"
            self._owner = who.encode()
            note.write_bytes(self._owner)
            RETRIES.call(lambda: self._fs.pipe_file(self._marker, self._owner), self._marker)
        self._check_owner()

    def _found_owner(self) -> bytes | None:
        self._fs.invalidate_cache()
        try:
            return bytes(RETRIES.call(lambda: self._fs.cat_file(self._marker), self._marker))
        except FileNotFoundError:
            return None

    def _check_owner(self) -> None:
        found = self._found_owner()
        if found != self._owner:
            self._owner = b""
            who = "another process" if found is None else found.decode(errors="replace")
            raise DataError(
                f"{self.name}: {who} is writing it, or was stopped; remove the folder if it no longer runs, or name "
                "another output"
            )

    def failed(self, error: OSError) -> DataError:
        """What to raise where writing failed, within the context, which then removes all."""
        if error.errno not in _NO_ROOM:
            return DataError(f"{self.name}: cannot be written: {error.strerror or error}")
        return DataError(
            f"{self.name}: cannot be written, the disk of {self.folder.parent} is full ({os.strerror(error.errno)}): "
            "make room there and start again, nothing of it was left"
        )

    def staged(self, part: str) -> Path:
        """Where a part is written before it is published."""
        return self.folder / f"_{part}"

    def keep(self, origins: Mapping[str, str]) -> dict[str, dict[str, Any]]:
        """Of `origins` (part: what it is made from) those that are there already, with their bad rows; the rest goes.

        Returns:
            {part: {count, examples}}.
        """
        kept = {}
        for path in self._found_parts():
            stated = _stated(self._fs, path)
            part = os.path.basename(path)
            if stated is not None and origins.get(part) == stated["origin"]:
                kept[part] = stated
                self._parts.add(part)
            else:
                self._remove(path)
        for staged in self.folder.glob("_*"):
            staged.unlink()
        return kept

    def publish(self, part: str) -> None:
        """A staged part is complete."""
        self._parts.add(part)
        if self._local:
            os.rename(self.staged(part), self.folder / part)
            return
        self._check_owner()
        RETRIES.call(lambda: self._fs.put_file(str(self.staged(part)), f"{self._root}/{part}"), part)
        self.staged(part).unlink()

    def finish(self) -> Schema:
        """Writes the summary, last, and lets the output appear. Returns the schema of the whole.

        Raises:
            DataError: another process wrote to it too.
        """
        if not self._local:
            self._check_owner()
        if strange := sorted({os.path.basename(path) for path in self._found_parts()} - self._parts):
            raise DataError(f"{self.name}: {strange[0]} came from another process that writes it too; start again")
        where = str(self.folder) if self._local else self.name
        files = read_footers(where, unfinished=True)
        schema = schema_of(where, files)
        self.bytes = sum(file.size for file in files)
        summary = (schema.model_dump_json(indent=1, exclude_none=True) + "\n").encode()
        if self._local:
            (self.folder / SUMMARY).write_bytes(summary)
            (self.folder / _LOCK).unlink()
            os.rename(self.folder, self.output)
        else:
            RETRIES.call(lambda: self._fs.pipe_file(f"{self._root}/{SUMMARY}", summary), SUMMARY)
            self._remove(self._marker)
            shutil.rmtree(self.folder)
        return schema

    def _found_parts(self) -> list[str]:
        if self._local:
            return [str(path) for path in self.folder.glob("[!_]*.parquet")]
        return [path for path in _find_all(self._fs, self._root) if path.endswith(".parquet")]

    def _remove(self, path: str) -> None:
        RETRIES.call(lambda: self._fs.rm_file(path), path)

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if kind is not None and issubclass(kind, Exception):
            shutil.rmtree(self.folder, ignore_errors=True)
            if self._owner:
                for path in sorted(_find_all(self._fs, self._root), key=lambda path: path == self._marker):
                    self._remove(path)  # the marker last: without it the rest would look complete
        os.close(self._lock)


def _find_all(fs: Any, root: str) -> list[str]:
    fs.invalidate_cache()
    try:
        return list(RETRIES.call(lambda: fs.find(root), root))
    except FileNotFoundError:
        return []


def _stated(fs: Any, path: str) -> dict[str, Any] | None:
    """What `PartWriter.state` wrote into a Parquet file; None where it did not, or the file is not whole."""
    try:
        with pq.ParquetFile(RangeReader(fs, path)) as file:
            stated: dict[str, Any] = json.loads((file.metadata.metadata or {})[ORIGIN_KEY])
            return stated
    except (pa.ArrowException, OSError, KeyError, ValueError):
        return None
