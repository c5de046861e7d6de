"""Streaming beside bare pyarrow: `python -m embershard.datasets.bench CONTENDER JSON`.

Every function below measures one contender and returns {reading: value}; `embershard bench stream` alternates them and
takes paired ratios. All decode on one thread.
"""

from __future__ import annotations

import json
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from . import kernels
from .footers import read_footers
from .stream import ParquetStream

BATCH_ROWS = 65_536
_SAMPLE_SECONDS = 0.05


class Memory:
    """Proportional set size (PSS) of this process, sampled on a thread from entering to leaving the context; bytes."""

    def __init__(self) -> None:
        self.samples: list[int] = []
        self._done = threading.Event()
        self._thread = threading.Thread(target=self._sample, daemon=True)

    def __enter__(self) -> Memory:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._done.set()
        self._thread.join()

    def readings(self) -> dict[str, float]:
        """The peak, and how much the last quarter's exceeds the first quarter's: 1 is flat."""
        quarter = max(1, len(self.samples) // 4)
        growth = max(self.samples[-quarter:]) / max(self.samples[:quarter])
        return {"peak_pss_mb": max(self.samples) / 1e6, "pss_growth": growth}

    def _sample(self) -> None:
        while True:
            self.samples.append(resident())
            if self._done.wait(_SAMPLE_SECONDS):
                return


def resident() -> int:
    """PSS of this process in bytes."""
    for line in Path("/proc/self/smaps_rollup").read_text().splitlines():
        if line.startswith("Pss:"):
            return int(line.split()[1]) * 1024
    raise OSError("/proc/self/smaps_rollup: no Pss line")


def _measure(path: str, read: Callable[[], int]) -> dict[str, float]:
    size = sum(file.fs.size(file.path) for file in read_footers(path))
    with Memory() as memory:
        start, used = time.perf_counter(), time.process_time()
        rows = read()
        seconds, cpu = time.perf_counter() - start, time.process_time() - used
    return {
        "rows_per_second": rows / seconds,
        "mb_per_second": size / seconds / 1e6,
        "cpu_us_per_row": cpu / rows * 1e6,
        **memory.readings(),
    }


def ours(path: str, batch_size: int = 4096) -> dict[str, float]:
    """Shuffled batches: labels, ln(x + 1) of dense values, ids as int64 with missing ones filled."""
    kernels.warm_up()
    stream = ParquetStream(path, batch_size=batch_size)
    try:
        readings = _measure(path, lambda: sum(batch.rows for batch in stream.batches(0)))
    finally:
        stream.close()
    return readings | {"stall_seconds": stream.stall_seconds}


def bare_pyarrow(path: str) -> dict[str, float]:
    """`ParquetFile.iter_batches` and each column as numpy, nulls filled, in the order of the files; no shuffling."""

    def read() -> int:
        rows = 0
        for file in read_footers(path):
            with pq.ParquetFile(file.path) as parquet:
                for batch in parquet.iter_batches(batch_size=BATCH_ROWS, use_threads=False):
                    for column in batch.columns:
                        _numpy(column)
                    rows += batch.num_rows
        return rows

    pa.set_cpu_count(1)
    return _measure(path, read)


def _numpy(column: pa.Array) -> np.ndarray:
    filled = pc.fill_null(column, 0) if column.null_count else column
    array: np.ndarray = filled.to_numpy(zero_copy_only=False)
    return array


CONTENDERS: dict[str, Callable[..., dict[str, float]]] = {"ours": ours, "pyarrow": bare_pyarrow}

if __name__ == "__main__":
    print(json.dumps(CONTENDERS[sys.argv[1]](**json.loads(sys.argv[2]))))
