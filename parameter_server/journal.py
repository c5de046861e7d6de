"""The journal of one shard: records in files of a folder that one process alone may write.

    FOLDER/lock                          held while the shard lives; names the process that holds it
    FOLDER/port                          where the shard listened last
    FOLDER/segment-00000003.journal      records (`segments.py`), the newest last
    FOLDER/snapshot-00000003/            the shard as it was before segment 3, or nothing without its manifest

Written, not synchronised: what was acknowledged survives the process, not the power.
"""

from __future__ import annotations

import fcntl
import os
import shutil
import socket
from collections.abc import Callable, Iterator, Sequence
from contextlib import suppress
from dataclasses import replace
from pathlib import Path

import numpy as np

from . import failpoints
from .files import MANIFEST
from .records import JournalError, Kind
from .segments import HEADER_BYTES, Identity, Record, Segment, encode_header, encode_record

_BUFFERS_PER_CALL = 512  # Linux takes 1024
_PORT = "port"


class FileJournal:
    """Locks `folder` (made if need be) until `close`. `replay` all of it before the first `append`.

    on_growth: called after a record with the bytes of all segments since the newest snapshot; it must not block.

    Raises:
        JournalError: another process holds the journal, or the folder cannot be written.
    """

    def __init__(self, folder: str | Path, identity: Identity) -> None:
        self.folder = Path(folder)
        self.torn_bytes = 0
        self.failures = 0
        self.snapshots = 0
        self.snapshot_failures = 0
        self.on_growth: Callable[[int], None] = lambda _: None
        self._identity = identity
        self._older: dict[int, int] = {}  # bytes of the segments before the one that is written
        self._file = -1
        self._end = 0
        self._next = 1
        self._broken = False
        self._lock = self._take_lock()

    def _take_lock(self) -> int:
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            lock = os.open(self.folder / "lock", os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
        except OSError as error:
            raise JournalError(f"journal {self.folder}: cannot be opened: {error.strerror}") from error
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            holder = os.pread(lock, 200, 0).decode(errors="replace").strip() or "another process"
            os.close(lock)
            raise JournalError(f"journal {self.folder} is being written by {holder}: end it first") from None
        with suppress(OSError):  # a full disk keeps nobody from holding it
            os.ftruncate(lock, 0)
            os.pwrite(lock, f"process {os.getpid()} on {socket.gethostname()}\n".encode(), 0)
        return lock

    @property
    def size(self) -> int:
        """Bytes of all segments that a recovery would read."""
        return sum(self._older.values()) + self._end

    def statistics(self) -> dict[str, int]:
        return {
            "journal_bytes": self.size,
            "journal_failures": self.failures,
            "journal_torn_bytes": self.torn_bytes,
            "local_snapshots": self.snapshots,
            "local_snapshot_failures": self.snapshot_failures,
        }

    def snapshot(self) -> int:
        """The number of the newest local snapshot that is whole; 0 without one."""
        return max((n for n, path in self._numbered("snapshot-") if (path / MANIFEST).exists()), default=0)

    def snapshot_folder(self, number: int) -> Path:
        return self.folder / f"snapshot-{number:08d}"

    def _segment_path(self, number: int) -> Path:
        return self.folder / f"segment-{number:08d}.journal"

    def _numbered(self, prefix: str) -> list[tuple[int, Path]]:
        found = []
        for path in self.folder.glob(f"{prefix}*"):
            number = path.name.removeprefix(prefix).removesuffix(".journal")
            if number.isdecimal():
                found.append((int(number), path))
        return sorted(found)

    def replay(self, snapshot: int, first: int) -> Iterator[Record]:
        """Every record since local snapshot `snapshot` (0: since the beginning), whose first one has number `first`.

        At the end the journal stands behind the last whole record, ready to go on.

        Raises:
            JournalError: damage in the middle, a segment that is missing, or another shard's journal.
        """
        numbers = [number for number, _ in self._numbered("segment-") if number >= snapshot]
        identity = replace(self._identity, segment=max(1, snapshot), first=first)
        for position, number in enumerate(numbers):
            if number != identity.segment:
                raise JournalError(
                    f"journal {self._segment_path(identity.segment)} is missing: segment {number} is there"
                )
            segment = Segment(self._segment_path(number), identity)
            last = position == len(numbers) - 1
            yield from segment.records(last=last)
            if last:
                self._go_on(segment, identity)
                return
            self._older[number] = segment.end
            identity = replace(identity, segment=number + 1, first=segment.next)
        if snapshot:
            raise JournalError(
                f"journal {self._segment_path(snapshot)} is missing, and local snapshot {snapshot} is there"
            )
        self._begin(identity)

    def _go_on(self, segment: Segment, identity: Identity) -> None:
        self.torn_bytes = segment.size - segment.end
        if segment.end < HEADER_BYTES:
            self._begin(identity)
            return
        self._identity, self._next = identity, segment.next
        self._file, self._end = os.open(segment.path, os.O_RDWR | os.O_CLOEXEC), segment.end
        os.ftruncate(self._file, self._end)

    def _begin(self, identity: Identity) -> None:
        """Opens a segment; the one before stays in use if that fails."""
        path = self._segment_path(identity.segment)
        try:
            file = os.open(path, os.O_RDWR | os.O_CREAT | os.O_TRUNC | os.O_CLOEXEC, 0o600)
            try:
                _write(file, [memoryview(encode_header(identity))], 0)
            except OSError:
                os.close(file)
                path.unlink()
                raise
        except OSError as error:
            raise JournalError(f"journal {path}: cannot be begun: {error.strerror}") from error
        if self._file >= 0:
            os.close(self._file)
            self._older[self._identity.segment] = self._end
        self._file, self._end, self._identity, self._next = file, HEADER_BYTES, identity, identity.first

    def append(self, kind: Kind, header: bytes, arrays: Sequence[np.ndarray]) -> None:
        """Raises JournalError if the record cannot be written; the journal is then as it was before."""
        if kind is Kind.PUSHES and failpoints.active("journal"):
            return
        buffers = encode_record(kind, self._next, header, arrays)
        try:
            failpoints.hit("journal.write")
            if self._broken:
                self._cut_off()
            _write(self._file, buffers, self._end)
        except OSError as error:
            self.failures += 1
            self._broken = True
            with suppress(OSError):
                self._cut_off()
            path = self._segment_path(self._identity.segment)
            raise JournalError(f"journal {path}: cannot be written ({error.strerror}), nothing was applied") from error
        self._end += sum(map(len, buffers))
        self._next += 1
        self.on_growth(self.size)

    def _cut_off(self) -> None:
        """Removes what was written of a record before the disk refused the rest."""
        os.ftruncate(self._file, self._end)
        self._broken = False

    def roll(self) -> tuple[int, int]:
        """Begins the next segment: its number, and that of its first record. Raises JournalError."""
        if self._broken:
            raise JournalError(
                f"journal {self.folder}: what was begun of a record stands at the end, so nothing follows"
            )
        identity = replace(self._identity, segment=self._identity.segment + 1, first=self._next)
        self._begin(identity)
        return identity.segment, identity.first

    def clean(self, snapshot: int) -> None:
        """Deletes what local snapshot `snapshot` replaces, and snapshots that never became whole."""
        for number, path in self._numbered("snapshot-"):
            if number != snapshot:
                shutil.rmtree(path)
        for number, path in self._numbered("segment-"):
            if number < snapshot:
                path.unlink()
        self._older = {number: size for number, size in self._older.items() if number >= snapshot}

    def port(self) -> int:
        """Where the shard listened last; 0 if that is not known."""
        try:
            text = (self.folder / _PORT).read_bytes()[:8].decode(errors="replace").strip()
        except OSError:
            return 0
        return int(text) if text.isdecimal() and int(text) < 65536 else 0

    def remember_port(self, port: int) -> None:
        with suppress(OSError):  # on a full disk clients have to be told where the shard is
            (self.folder / _PORT).write_text(str(port))

    def close(self) -> None:
        """Lets go of the folder; nothing more can be appended."""
        for file in (self._file, self._lock):
            if file >= 0:
                os.close(file)
        self._file = self._lock = -1


def _write(file: int, buffers: Sequence[memoryview], offset: int) -> None:
    left = [buffer for buffer in buffers if buffer]
    while left:
        written = os.pwritev(file, left[:_BUFFERS_PER_CALL], offset)
        offset += written
        while left and written >= len(left[0]):
            written -= len(left.pop(0))
        if written:
            left[0] = left[0][written:]
