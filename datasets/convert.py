"""Converting raw logs to Parquet: what all sources share."""

from __future__ import annotations

import gzip
import io
import json
import os
import re
import threading
import zlib
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import FIRST_EXCEPTION, ThreadPoolExecutor, wait
from dataclasses import dataclass
from typing import Any, BinaryIO, cast

from .footers import fingerprint, list_files
from .remote import RETRIES, RangeReader, is_local
from .schema import DataError
from .writer import Block, DatasetWriter, PartWriter, writing_behind

BLOCK_BYTES = 4 << 20
MAX_LINE_BYTES = 1 << 20
_EXAMPLES = 10
_EXTENSION = re.compile(r"(\.(tsv|txt|csv|dat|log))?(\.gz)?$")


class BadRows:
    """Rows that cannot be used: `fail` raises at the first, `skip` counts them and keeps some examples. Thread-safe."""

    def __init__(self, mode: str) -> None:
        if mode not in ("fail", "skip"):
            raise DataError(f"--on-bad-rows: {mode!r} is neither fail nor skip")
        self.mode = mode
        self.count = 0
        self.examples: list[str] = []
        self._skip = mode == "skip"
        self._lock = threading.Lock()

    def add(self, name: str, line: int, what: str) -> None:
        """Raises DataError unless bad rows are skipped."""
        message = f"{name}, line {line}: {what}"
        if not self._skip:
            raise DataError(f"{message} (--on-bad-rows skip leaves such rows out)")
        self.merge(1, [message])

    def merge(self, count: int, examples: Sequence[str]) -> None:
        """Adds what another one counted."""
        with self._lock:
            self.count += count
            self.examples += examples[: _EXAMPLES - len(self.examples)]


class LineBlocks:
    """A text file, plain or gzip, as byte blocks that end where a line ends.

    Whoever iterates must call `consumed` for each block and count `line` up. A line of more than MAX_LINE_BYTES is a
    bad row and never held in memory.
    """

    def __init__(self, raw: BinaryIO, name: str, bad: BadRows) -> None:
        self.name = name
        self.line = 0
        self._raw, self._bad = raw, bad
        zipped = raw.read(2) == b"\x1f\x8b"
        raw.seek(0)
        self._stream = cast(BinaryIO, gzip.GzipFile(fileobj=raw)) if zipped else raw
        self._rest = b""

    @property
    def position(self) -> int:
        """Bytes of the file read so far, compressed ones where it is compressed."""
        return self._raw.tell()

    def peek(self) -> bytes:
        """The first bytes, at most BLOCK_BYTES, without consuming them.

        Raises:
            DataError: an empty file.
        """
        self._rest = self._rest or self._read()
        if not self._rest:
            raise DataError(f"{self.name}: the file is empty")
        return self._rest

    def skip_line(self) -> None:
        """Consumes the first line of what `peek` returned."""
        self._rest = self._rest.partition(b"\n")[2]
        self.line += 1

    def consumed(self, size: int) -> None:
        """Of the block yielded last, what follows the first `size` bytes comes again, with more behind it."""
        self._rest = self._block[size:]

    def __iter__(self) -> Iterator[bytes]:
        skipping = False
        while True:
            data = self._read()
            if skipping:
                found = data.find(b"\n")
                if found < 0 and data:
                    continue
                data, skipping = data[found + 1 :] if data else data, False
            last = not data
            self._block = self._rest + (data if not last else b"\n" if self._ends_open() else b"")
            if self._block:
                yield self._block
            if last:
                return
            if len(self._rest) > MAX_LINE_BYTES:
                self.line += 1
                self._bad.add(self.name, self.line, f"a line of more than {MAX_LINE_BYTES} bytes")
                self._rest, skipping = b"", True

    def _ends_open(self) -> bool:
        return bool(self._rest) and not self._rest.endswith(b"\n")

    def _read(self) -> bytes:
        try:
            return self._stream.read(BLOCK_BYTES)
        except (EOFError, zlib.error, gzip.BadGzipFile) as error:
            raise DataError(f"{self.name}: damaged or incomplete gzip data after line {self.line}: {error}") from error


@dataclass(frozen=True)
class Source:
    """A kind of log: its name, its columns beside `label`, and how one file becomes blocks.

    options: what else the rows depend on; a conversion that was killed goes on only with the same.
    """

    name: str
    dense: Sequence[str]
    categorical: Sequence[str]
    parse: Callable[[LineBlocks, BadRows], Iterator[Block]]
    options: str = ""


@dataclass(frozen=True)
class Input:
    """A file to convert; part: the name of its Parquet file."""

    fs: Any
    path: str
    part: str
    size: int

    def open(self) -> BinaryIO:
        if is_local(self.fs):
            return cast(BinaryIO, self.fs.open(self.path, "rb"))
        return cast(BinaryIO, io.BufferedReader(RangeReader(self.fs, self.path), BLOCK_BYTES))

    def origin(self, source: Source, bad: BadRows) -> str:
        """Everything that its Parquet file depends on."""
        found = fingerprint(self.fs, self.path) or ()
        return json.dumps([source.name, source.options, bad.mode, self.path, *map(str, found)])


def convert(
    source: Source,
    inputs: Sequence[str],
    output: str,
    *,
    on_bad_rows: str = "fail",
    progress: Callable[[int, int], None] | None = None,
) -> dict[str, Any]:
    """Converts files to one Parquet file each below the folder `output`, which appears complete or not at all.

    inputs and output: local or fsspec URLs. Files are converted side by side, one per core, each in constant memory. A
    conversion that was killed goes on when it is started again: files that it had finished are not read again.
    progress(input bytes done, input bytes) is called from their threads, one at a time.

    Returns:
        {output, rows, positives, label_rate, files, files_kept (of a conversion that was killed), input_bytes,
        output_bytes, bad_rows, examples, retries (requests to an object store that were repeated)}.

    Raises:
        DataError: nothing to convert, an output that exists, bad rows unless skipped, or a full disk.
    """
    bad, retries = BadRows(on_bad_rows), RETRIES.count
    files = find_inputs(inputs)
    total = sum(file.size for file in files)
    tracker = _Progress(total, progress)
    with DatasetWriter(output) as target:
        try:
            origins = {file.part: file.origin(source, bad) for file in files}
            kept = target.keep(origins)
            for part in kept.values():
                bad.merge(part["count"], part["examples"])
            tracker.add(sum(file.size for file in files if file.part in kept))
            left = [file for file in files if file.part not in kept]
            with ThreadPoolExecutor(max(1, min(len(left), os.cpu_count() or 1))) as pool:
                jobs = [pool.submit(_convert_file, source, f, target, origins[f.part], bad, tracker) for f in left]
                done, _ = wait(jobs, return_when=FIRST_EXCEPTION)
                if any(job.exception() for job in done):
                    tracker.stopped.set()
                    pool.shutdown(cancel_futures=True)
                for job in done:
                    job.result()
            schema = target.finish()
        except OSError as error:
            raise target.failed(error) from error
    positives = schema.positives or 0
    return {
        "output": target.name,
        "rows": schema.rows,
        "positives": positives,
        "label_rate": positives / schema.rows,
        "files": len(files),
        "files_kept": len(kept),
        "input_bytes": total,
        "output_bytes": target.bytes,
        "bad_rows": bad.count,
        "examples": bad.examples,
        "retries": RETRIES.count - retries,
    }


def find_inputs(inputs: Sequence[str]) -> list[Input]:
    """The files to convert, each with the name of its Parquet file.

    Raises:
        DataError: none given, or one that is not there.
    """
    found = [(fs, path) for given in inputs for fs, paths in [list_files(given, suffix="")] for path in paths]
    if not found:
        raise DataError("nothing to convert: name at least one file or folder")
    stems = [_EXTENSION.sub("", os.path.basename(path)) for _, path in found]
    numbered = len(set(stems)) < len(stems)
    return [
        Input(fs, path, f"{number:05d}-{stem}.parquet" if numbered else f"{stem}.parquet", int(fs.size(path)))
        for number, ((fs, path), stem) in enumerate(zip(found, stems, strict=True))
    ]


class _Progress:
    """Adds up what the files' threads report, and tells them to stop."""

    def __init__(self, total: int, callback: Callable[[int, int], None] | None) -> None:
        self.stopped = threading.Event()
        self._total, self._callback = total, callback
        self._done = 0
        self._lock = threading.Lock()

    def add(self, size: int) -> None:
        with self._lock:
            self._done += size
            if self._callback is not None:
                self._callback(self._done, self._total)


def _convert_file(
    source: Source, file: Input, target: DatasetWriter, origin: str, bad: BadRows, tracker: _Progress
) -> None:
    """Parses on this thread and writes on another, so that one file alone keeps two cores busy."""
    reported, own, staged = 0, BadRows(bad.mode), target.staged(file.part)
    with (
        file.open() as raw,
        PartWriter(staged, source=source.name, dense=source.dense, categorical=source.categorical) as writer,
    ):
        text = LineBlocks(raw, file.path, own)
        with writing_behind(writer) as write:
            for block in source.parse(text, own):
                if tracker.stopped.is_set():
                    return
                write(block)
                tracker.add(text.position - reported)
                reported = text.position
        writer.state(origin, own.count, own.examples)
    bad.merge(own.count, own.examples)
    tracker.add(file.size - reported)
    if not writer.rows:
        raise DataError(f"{file.path}: no usable row in the whole file")
    target.publish(file.part)
