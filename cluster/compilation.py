"""Kernels are compiled before anything starts: where none are kept yet, by two processes at a time."""

from __future__ import annotations

import subprocess
import sys
from functools import cache

import numpy as np

from ..datasets import kernels as dataset_kernels
from ..parameter_server import contents
from ..parameter_server.jit import CACHED
from ..parameter_server.row_kernels import all_finite
from ..workers.embeddings import kernels as worker_kernels

SECONDS = 300.0  # what the other process may take; this one then compiles what is missing


@cache
def begin() -> subprocess.Popen[bytes] | None:
    """Starts compiling the shards' kernels in a process of its own; None where they are compiled, or cannot be kept."""
    if not CACHED:
        return None
    words = np.zeros(1, np.uint32)
    words.flags.writeable = False
    all_finite(words)
    if all_finite.stats.cache_hits:  # type: ignore[attr-defined]  # a kernel of numba's
        return None
    code = "import embershard.cluster.compilation as c; c.compile_shards()"
    return subprocess.Popen(
        [sys.executable, "-c", code], stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
    )


def finish() -> None:
    """Returns when every kernel of a run without bags is compiled and loaded."""
    other = begin()
    dataset_kernels.warm_up()
    worker_kernels.warm_up()
    if other is not None:
        try:
            other.wait(SECONDS)
        except subprocess.TimeoutExpired:
            other.kill()
    compile_shards()


def compile_shards() -> None:
    """What shards and their clients call, for tables of fewer than 2^32 rows."""
    contents.warm_up(np.dtype(np.uint32))
