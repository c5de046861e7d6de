"""The numba decorator of this room."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeVar

import numba

F = TypeVar("F", bound=Callable[..., Any])


def jit(function: F) -> F:
    """Compiles on first use, without the GIL; cached on disk where numba finds a folder that it may write."""
    try:
        return numba.njit(nogil=True, cache=True)(function)  # type: ignore[no-any-return]
    except RuntimeError:  # no such folder, for instance in a read-only container
        return numba.njit(nogil=True)(function)  # type: ignore[no-any-return]
