"""What moving blocks costs the workers: a shard leaves while one worker trains. Prints its readings as JSON.

python -m embershard.cluster.move_bench leave '{"gigabytes": 2.0, "blocks": 32}'
"""

from __future__ import annotations

import json
import sys
import tempfile
import threading
import time
from contextlib import ExitStack
from typing import Any

import numpy as np

from ..parameter_server.client import StoreClient
from ..parameter_server.kernels import locate, warm_up
from ..parameter_server.requests import Clock
from ..parameter_server.rpc_bench import shard_processes
from ..parameter_server.tables import Optimizer, TableSpec
from .rescale import Rescale

SHARDS, WIDTH, ROWS_PER_STEP = 3, 16, 20_000
QUIET_STEPS = 40  # before the move, to compare with


class _Worker(threading.Thread):
    """Pulls one step ahead and pushes, as in `bounded`. pulls: (when asked, seconds) of each."""

    def __init__(self, addresses: tuple[str, ...]) -> None:
        super().__init__(daemon=True)
        self.stop = threading.Event()
        self.warm = threading.Event()
        self.pulls: list[tuple[float, float]] = []
        self._addresses = addresses

    def run(self) -> None:
        generator = np.random.default_rng(0)
        with StoreClient.connect(self._addresses) as store:
            (slab,) = store.layout.slabs
            grads = np.full((ROWS_PER_STEP, WIDTH), 1e-3, np.float32)
            step = 0
            while not self.stop.is_set():
                step += 1
                ids = (generator.zipf(1.1, ROWS_PER_STEP) * 2654435761 % slab.tables[0].rows).astype(np.int64)
                segments = np.array([0, ROWS_PER_STEP])
                part, _ = locate(slab, np.zeros(1, np.int32), segments, ids, store.block_map.rank())
                clock = Clock(1, step, staleness=1)
                begin = time.monotonic()
                store.pull([part], clock).result()
                self.pulls.append((begin, time.monotonic() - begin))
                store.push([part], [grads[: len(part.index)]], [0.01], clock)
                if step == QUIET_STEPS:
                    self.warm.set()


def leave(gigabytes: float, blocks: int, journal: bool = False) -> dict[str, Any]:
    """The last of three shards leaves: GB/s moved, how long pulls took meanwhile and before, the longest hold.

    journal: shards write what comes, blocks too, to a temporary folder on disk before they acknowledge it.
    """
    warm_up()
    optimizer = Optimizer(kind="rowwise_adagrad")
    rows = int(gigabytes * 1e9 / (4 * (WIDTH + 1)))
    with ExitStack() as stack:
        folder = stack.enter_context(tempfile.TemporaryDirectory()) if journal else None
        addresses, _ = stack.enter_context(shard_processes(SHARDS, blocks=blocks, journal=folder))
        store = stack.enter_context(StoreClient.connect(addresses))
        store.create_tables([TableSpec(name="t", rows=rows, width=WIDTH, optimizer=optimizer)])
        store.begin(1, 1, 0)
        worker = _Worker(addresses)
        worker.start()
        if not worker.warm.wait(120):
            raise TimeoutError("the worker did not come to its first steps within 120 s")
        begin = time.monotonic()
        result = Rescale(store, lambda: addresses, lambda block_map: None).run(SHARDS - 1)
        end = time.monotonic()
        worker.stop.set()
        worker.join(60)
    quiet = [1e3 * seconds for when, seconds in worker.pulls if when < begin]
    during = [1e3 * seconds for when, seconds in worker.pulls if begin <= when < end]
    return {
        "block_mb": gigabytes * 1e3 / blocks,
        "gbps": result["bytes_moved"] / 1e9 / result["seconds"],
        "longest_hold_ms": 1e3 * result["longest_hold_seconds"],
        "groups": result["groups"],
        "pull_p50_before_ms": float(np.percentile(quiet, 50)),
        "pull_p50_ms": float(np.percentile(during, 50)),
        "pull_p99_ms": float(np.percentile(during, 99)),
        "pull_longest_ms": max(during),
        "pulls_per_second_over_before": len(during) / (end - begin) / (len(quiet) / (begin - worker.pulls[0][0])),
    }


if __name__ == "__main__":
    print(json.dumps({"leave": leave}[sys.argv[1]](**json.loads(sys.argv[2]))))
