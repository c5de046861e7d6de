"""The C allocator of a process that receives and drops large buffers all the time."""

from __future__ import annotations

import ctypes

_M_TRIM_THRESHOLD, _M_MMAP_THRESHOLD = -1, -3  # glibc's malloc.h
_LARGEST_REUSED = 1 << 30
_KEPT = 1 << 30


def keep_freed_memory() -> bool:
    """Makes malloc reuse large buffers rather than give each back to the system; False if it is not glibc's.

    A buffer that comes fresh from the system is paid for again in page faults, one per 4 KiB. In return the
    process keeps up to 1 GiB that it has used once. For processes that are ours alone, shards and workers; never called
    on import.
    """
    try:
        mallopt = ctypes.CDLL(None).mallopt
    except (OSError, AttributeError):
        return False
    return bool(mallopt(_M_MMAP_THRESHOLD, _LARGEST_REUSED) and mallopt(_M_TRIM_THRESHOLD, _KEPT))
