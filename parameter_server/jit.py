"""The one decorator of all kernels: compiled without the GIL, without fast-math, cached where a folder is writable."""

from __future__ import annotations

import os
import stat
import tempfile
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeVar, cast

import numba

F = TypeVar("F", bound=Callable[..., Any])


def _finds_a_folder() -> bool:
    """Whether numba finds a writable folder by itself: NUMBA_CACHE_DIR, the package's own, the user's cache."""

    def probe() -> None: ...

    try:
        numba.njit(cache=True)(probe)
    except RuntimeError:
        return False
    return True


def _temporary_folder() -> str | None:
    """A folder of this user alone in the temporary directory; None if somebody else's stands in its place.

    Compiled code is loaded from it, so a folder that others can write to must never be used.
    """
    path = Path(tempfile.gettempdir()) / f"embershard-numba-{os.getuid()}"
    try:
        path.mkdir(mode=0o700, exist_ok=True)
        status = path.lstat()
    except OSError:
        return None
    private = stat.S_ISDIR(status.st_mode) and status.st_uid == os.getuid() and not status.st_mode & 0o022
    return str(path) if private else None


def _prepare_cache() -> bool:
    if _finds_a_folder():
        return True
    if (folder := _temporary_folder()) is not None:
        numba.config.CACHE_DIR = folder
        if _finds_a_folder():
            return True
    warnings.warn(
        "no folder to keep compiled kernels in, so every process compiles them: set NUMBA_CACHE_DIR to a writable one",
        stacklevel=2,
    )
    return False


CACHED = _prepare_cache()


def jit(function: F) -> F:
    """Compiles a kernel on its first call (`kernels.warm_up` makes that happen at start-up).

    The cache notices a changed source file, not a changed function that is inlined from another file. So a kernel may
    use only such functions of other files as are part of the data format and never change (`mix64`, `permute`).
    """
    return cast(F, numba.njit(nogil=True, fastmath=False, error_model="numpy", cache=CACHED)(function))
