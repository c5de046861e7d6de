"""Streaming and converting beside others: `python -m embershard.datasets.bench CONTENDER JSON`.

Every function of CONTENDERS measures one of them and returns {reading: value}; `embershard bench stream` alternates
them and takes paired ratios. `ours` and `pyarrow` decode on one thread; the others use what they use by default.
"""

from __future__ import annotations

import importlib
import json
import os
import sys
import tempfile
import threading
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.csv as pacsv
import pyarrow.parquet as pq

from . import kernels
from .convert import find_inputs
from .criteo import convert_criteo
from .footers import read_footers
from .stream import ParquetStream
from .synthetic import KAGGLE, generate

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


def ray_data(path: str, batch_size: int = 4096) -> dict[str, float]:
    """Ray Data's `iter_torch_batches` on a local Ray, which is started before the clock; no shuffling."""
    import ray
    import ray.data

    cores = len(os.sched_getaffinity(0))
    ray.init(num_cpus=cores, include_dashboard=False, log_to_driver=False, logging_level="ERROR")
    ray.data.DataContext.get_current().enable_progress_bars = False
    rows = ray.data.read_parquet([file.path for file in read_footers(path)])
    try:
        readings = _measure(path, lambda: sum(len(b["label"]) for b in rows.iter_torch_batches(batch_size=batch_size)))
    finally:
        ray.shutdown()
    return _rates(readings)


def hugging_face(path: str, batch_size: int = 4096) -> dict[str, float]:
    """Hugging Face `datasets`, streaming, as numpy; no shuffling."""
    theirs = importlib.import_module("datasets")  # a top-level module: never ours
    files = [file.path for file in read_footers(path)]
    rows = theirs.load_dataset("parquet", data_files=files, split="train", streaming=True).with_format("numpy")
    return _rates(_measure(path, lambda: sum(len(batch["label"]) for batch in rows.iter(batch_size=batch_size))))


def _rates(readings: dict[str, float]) -> dict[str, float]:
    """Without memory and processor time, which are this process's alone and theirs is spread over several."""
    return {name: readings[name] for name in ("rows_per_second", "mb_per_second")}


def write_text(path: Path, rows: int) -> None:
    """A log of Criteo's 39 columns as text with a header, decimal ids, tabs between the fields."""
    with tempfile.TemporaryDirectory() as folder:
        generate(f"{folder}/log", rows=rows, cardinalities=KAGGLE)
        with pq.ParquetFile(f"{folder}/log/part-00000.parquet") as parquet:
            names = parquet.schema_arrow.names
        options = pacsv.WriteOptions(include_header=False, delimiter="\t", quoting_style="none")
        with path.open("wb") as out:
            out.write("\t".join(names).encode() + b"\n")
            for file in read_footers(f"{folder}/log"):
                pacsv.write_csv(pq.read_table(file.path), out, options)


def convert(text: str) -> dict[str, float]:
    """Our conversion of a file, or of all files in a folder, plain or gz, to Parquet."""
    with tempfile.TemporaryDirectory() as folder:
        convert_criteo([text], f"{folder}/warm")  # compiles
        return _measure_text(text, lambda: int(convert_criteo([text], f"{folder}/out")["rows"]))


def pyarrow_csv(text: str) -> dict[str, float]:
    """`pyarrow.csv` reads the same file in blocks and keeps nothing."""

    def read() -> int:
        with pacsv.open_csv(text, parse_options=pacsv.ParseOptions(delimiter="\t")) as blocks:
            return sum(block.num_rows for block in blocks)

    return _measure_text(text, read)


def _measure_text(text: str, read: Callable[[], int]) -> dict[str, float]:
    size = sum(file.size for file in find_inputs([text]))
    with Memory() as memory:
        start = time.perf_counter()
        rows = read()
        seconds = time.perf_counter() - start
    return {"rows_per_second": rows / seconds, "mb_per_second": size / seconds / 1e6, **memory.readings()}


CONTENDERS: dict[str, Callable[..., dict[str, float]]] = {
    "ours": ours,
    "pyarrow": bare_pyarrow,
    "ray_data": ray_data,
    "hugging_face": hugging_face,
    "convert": convert,
    "pyarrow_csv": pyarrow_csv,
}

if __name__ == "__main__":
    print(json.dumps(CONTENDERS[sys.argv[1]](**json.loads(sys.argv[2]))))
