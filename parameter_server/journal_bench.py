"""What a journal costs: training's pulls and pushes on a store that keeps one beside a store that does not.

    python -m embershard.parameter_server.journal_bench '{"folder": "/var/tmp"}'

Both stores are of one shard in a process of its own; rounds alternate, and the ratio is the median of the paired ones.
`pushes` are sent as fast as they are acknowledged; a `step` is a pull and, when it is answered, a push. On a
machine that does other things, the shard's CPU time says more than the clock.
"""

from __future__ import annotations

import json
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from contextlib import ExitStack
from typing import Any

import numpy as np

from .client import StoreClient
from .kernels import locate, warm_up
from .rpc_bench import process_cpu, shard_processes
from .store import Store
from .tables import Optimizer, TableSpec

TABLES, ROWS, SAMPLES = 26, 200_000, 2048


def beside(
    width: int = 16, rounds: int = 9, steps: int = 60, folder: str | None = None, seed: int = 0
) -> dict[str, Any]:
    """Readings of both, the ratios journal / none, and what one push carries. folder: where the journal is written."""
    warm_up()
    specs = [
        TableSpec(name=f"t{i}", rows=ROWS, width=width, optimizer=Optimizer(kind="rowwise_adagrad"))
        for i in range(TABLES)
    ]
    with ExitStack() as stack:
        journal = stack.enter_context(tempfile.TemporaryDirectory(dir=folder))
        runs: dict[str, dict[str, Callable[[], None]]] = {}
        pids = {}
        for name, where in (("none", None), ("journal", journal)):
            addresses, (pids[name],) = stack.enter_context(shard_processes(1, journal=where))
            store = stack.enter_context(StoreClient.connect(addresses))
            store.create_tables(specs)
            runs[name], rows = _exchanges(store, steps, seed)
        readings = _alternate(runs, pids, rounds, steps)
    return {"readings": readings, "rows_per_push": rows, "bytes_per_push": rows * (4 + 4 * width)}


def _exchanges(store: Store, steps: int, seed: int) -> tuple[dict[str, Callable[[], None]], float]:
    rng = np.random.default_rng(seed)
    (slab,) = store.layout.slabs
    tables, segments = np.arange(TABLES, dtype=np.int32), np.arange(TABLES + 1) * SAMPLES
    parts = []
    for _ in range(16):
        ids = rng.zipf(1.2, TABLES * SAMPLES) * 2654435761 % ROWS
        parts.append(locate(slab, tables, segments, ids, store.block_map.rank())[0])
    grads = rng.normal(size=(TABLES * SAMPLES, slab.width)).astype(np.float32)

    def push() -> None:
        sent = [store.push([part], [grads[: len(part.index)]], [0.01]) for part in _cycle(parts, steps)]
        for future in sent:
            future.result()

    def step() -> None:
        for part in _cycle(parts, steps):
            store.pull([part]).result()
            store.push([part], [grads[: len(part.index)]], [0.01]).result()

    return {"pushes": push, "steps": step}, statistics.fmean(len(part.index) for part in parts)


def _cycle(parts: list[Any], count: int) -> list[Any]:
    return [parts[i % len(parts)] for i in range(count)]


def _alternate(
    runs: dict[str, dict[str, Callable[[], None]]], pids: dict[str, int], rounds: int, steps: int
) -> dict[str, Any]:
    """Per exchange: the medians of both, and the median, least and largest of journal / none per second."""
    readings = {}
    for exchange in ("pushes", "steps"):
        seconds: dict[str, list[float]] = {name: [] for name in runs}
        busy: dict[str, list[float]] = {name: [] for name in runs}
        for turn in range(rounds + 1):  # the first one does not count
            for name in sorted(runs, reverse=turn % 2 == 0):
                start, cpu = time.perf_counter(), process_cpu(pids[name])
                runs[name][exchange]()
                seconds[name].append(time.perf_counter() - start)
                busy[name].append(process_cpu(pids[name]) - cpu)
        ratios = [none / journal for none, journal in zip(seconds["none"][1:], seconds["journal"][1:], strict=True)]
        readings[exchange] = {
            **{f"{name}_per_second": steps / statistics.median(taken[1:]) for name, taken in seconds.items()},
            **{f"{name}_shard_cpu_ms": 1e3 * statistics.median(taken[1:]) / steps for name, taken in busy.items()},
            "ratio": statistics.median(ratios),
            "least": min(ratios),
            "largest": max(ratios),
        }
    return readings


if __name__ == "__main__":
    print(json.dumps(beside(**json.loads(sys.argv[1] if len(sys.argv) > 1 else "{}")), indent=1))
