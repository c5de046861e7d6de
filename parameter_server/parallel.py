"""One kernel over several threads of this process, for arrays large enough to be worth it."""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from itertools import pairwise

SMALL_BYTES = 1 << 18  # below, waking another thread costs more than it saves
MOST_THREADS = 8
_helpers = ThreadPoolExecutor(MOST_THREADS - 1, thread_name_prefix="kernels")


def in_parts(kernel: Callable[[int, int], object], count: int, moved_bytes: int, threads: int) -> None:
    """kernel(begin, end) for ranges that make up [0, count), at most `threads` at a time; parts must not share rows.

    moved_bytes: what the whole call reads and writes.
    """
    parts = 1 if moved_bytes < SMALL_BYTES else max(1, min(threads, MOST_THREADS, count))
    ends = [count * part // parts for part in range(parts + 1)]
    others = [_helpers.submit(kernel, *span) for span in pairwise(ends[1:])]
    try:
        kernel(0, ends[1])
    finally:
        for other in others:
            other.result()
