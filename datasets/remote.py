"""Object stores: every request is repeated a few times, later each time, and every repetition is counted."""

from __future__ import annotations

import io
import random
import threading
import time
from collections.abc import Callable
from typing import Any, TypeVar

import fsspec

T = TypeVar("T")

ATTEMPTS = 6
_FIRST_WAIT = 0.1  # seconds; doubles with every attempt, with up to as much again at random
# A store's own answer, which asking again does not change.
_ANSWERS = (FileNotFoundError, FileExistsError, PermissionError, IsADirectoryError, NotADirectoryError, ValueError)
_NO_OWN_RETRIES = {"connect_timeout": 10, "read_timeout": 30, "retries": {"total_max_attempts": 1}}


class Retries:
    """Counts repeated requests of this process. Thread-safe."""

    def __init__(self) -> None:
        self.count = 0
        self._lock = threading.Lock()

    def call(self, request: Callable[[], T], what: str) -> T:
        """request(), at most ATTEMPTS times.

        Raises:
            OSError: it failed every time; says how often and the last reason.
        """
        for attempt in range(ATTEMPTS):
            try:
                return request()
            except _ANSWERS:
                raise
            except Exception as error:
                if attempt + 1 == ATTEMPTS:
                    reason = str(error) or type(error).__name__
                    raise OSError(f"{what}: the store failed {ATTEMPTS} times, the last time with: {reason}") from error
                with self._lock:
                    self.count += 1
                time.sleep(_FIRST_WAIT * 2**attempt * (1.0 + random.random()))
        raise AssertionError("unreachable")


RETRIES = Retries()


def is_local(fs: Any) -> bool:
    return isinstance(fs, fsspec.implementations.local.LocalFileSystem)


def filesystem(path: str) -> tuple[Any, str]:
    """(filesystem, path within it) of a path or fsspec URL; S3 without retries of its own, which nobody could count."""
    if path.startswith(("s3://", "s3a://")):
        given = fsspec.config.conf.get("s3", {}).get("config_kwargs", {})
        fs, root = fsspec.core.url_to_fs(path, config_kwargs=_NO_OWN_RETRIES | given)
        fs.retries = 1
        return fs, str(root)
    fs, root = fsspec.core.url_to_fs(path)
    return fs, str(root)


class RangeReader(io.RawIOBase):
    """A remote file, read in ranges as they are asked for: nothing is cached, each range is one counted request."""

    def __init__(self, fs: Any, path: str) -> None:
        self._fs, self._path, self._at = fs, path, 0
        self._size = int(RETRIES.call(lambda: fs.info(path), path)["size"])

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def tell(self) -> int:
        return self._at

    def seek(self, offset: int, whence: int = io.SEEK_SET) -> int:
        self._at = offset + {io.SEEK_SET: 0, io.SEEK_CUR: self._at, io.SEEK_END: self._size}[whence]
        return self._at

    def read(self, size: int | None = -1) -> bytes:
        """Raises OSError also where the store sends fewer bytes than the file has."""
        end = self._size if size is None or size < 0 else min(self._size, self._at + size)
        if end <= self._at:
            return b""
        data = RETRIES.call(lambda: self._range(self._at, end), self._path)
        self._at = end
        return data

    def readinto(self, buffer: Any) -> int:
        data = self.read(len(buffer))
        buffer[: len(data)] = data
        return len(data)

    def readall(self) -> bytes:
        return self.read(-1)

    def _range(self, begin: int, end: int) -> bytes:
        data = bytes(self._fs.cat_file(self._path, start=begin, end=end))
        if len(data) != end - begin:
            raise OSError(f"{len(data)} bytes came where {end - begin} were asked for")
        return data
