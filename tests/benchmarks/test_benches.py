"""Every bench runs, small, and reads each ratio that it promises: `pytest -m bench -s tests/benchmarks`.

What a machine reaches is read by `embershard bench` in its own sizes; here only that nothing is left out.
"""

from __future__ import annotations

import importlib.util
import json
import math
from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
from embershard.cluster.bench import (
    bench_durability,
    bench_kernels,
    bench_moves,
    bench_rpc,
    bench_stream,
    bench_train,
)

PEERS = importlib.util.find_spec("fbgemm_gpu") is not None
BENCHES: dict[str, tuple[Callable[..., dict[str, Any]], int]] = {
    "kernels": (partial(bench_kernels, 1, PEERS), 33 if PEERS else 21),
    "rpc": (partial(bench_rpc, 1), 60),
    "train": (partial(bench_train, 1, PEERS, False, 16, 256, 3), 24 if PEERS else 16),
    "durability": (partial(bench_durability, 1, 16, 256, 3, 0.05), 4),
    "moves": (partial(bench_moves, 1, 0.05, 8), 2),
    "stream": (partial(bench_stream, 1, None, 60_000, False), 2),
}


@pytest.mark.bench
@pytest.mark.timeout(600)
@pytest.mark.parametrize("name", BENCHES)
def test_every_ratio_is_read(name: str) -> None:
    bench, promised = BENCHES[name]
    result = bench(print)
    print(json.dumps(result["ratios"], indent=1))
    assert all(math.isfinite(ratio) and ratio > 0 for ratio in result["ratios"].values())
    assert len(result["ratios"]) >= promised
