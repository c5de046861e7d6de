"""A MEM-REC lookup beside one in a full table: `python -m embershard.workers.mem_rec_bench JSON`.

Both are given the same batches of ids, in one thread of one process, in alternating rounds. A full lookup reads one row
per feature: once as torch does it, once with the kernel that shards read with. A MEM-REC lookup (scope sample, tables
in this process) goes from ids to one vector per sample. What comes after, the interaction, is in neither.
"""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Callable
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

from ..parameter_server.kernels import gather
from .embeddings import kernels
from .embeddings.layers_mem_rec import MemRecSample

ZIPF = 1.05


def mem_rec_lookup(
    *,
    table_bytes: int = 8_000_000_000,
    token_rows: int = 75_000,
    dim: int = 128,
    features: int = 26,
    batch: int = 2048,
    batches: int = 20,
    rounds: int = 7,
    seed: int = 0,
) -> dict[str, Any]:
    """Microseconds per sample and their ratio, with ids uniform and Zipf(1.05) over the rows of a full table.

    The table has `table_bytes` (at least; memory for it must be there), its rows divided evenly among the features.
    The default sizes of MEM-REC are those its authors released. over_torch, over_kernel: a full lookup's time over
    MEM-REC's, the median of the rounds' paired ratios, the least and the greatest. cache_bytes: the last-level cache,
    None where the system does not say.
    """
    torch.set_num_threads(1)
    kernels.warm_up()
    rows = -(-table_bytes // (4 * dim * features))
    # Written once, so that every page is really there.
    table = torch.full((rows * features, dim), 0.01)
    small = MemRecSample([f"c{f}" for f in range(features)], dim, token_rows=token_rows, seed=seed)
    result: dict[str, Any] = {
        "cache_bytes": last_level_cache(),
        "full_bytes": 4 * table.numel(),
        "mem_rec_bytes": 4 * sum(p.numel() for p in small.parameters()),
    }
    rng = np.random.default_rng(seed)
    with torch.no_grad():
        for name, draw in (("uniform", _uniform), (f"zipf_{ZIPF}", _zipf)):
            ids = [torch.from_numpy(draw(rng, rows, (batch, features))) for _ in range(batches)]
            result[name] = _compare(table, small, ids, rounds)
    return result


def _compare(table: Tensor, small: MemRecSample, ids: list[Tensor], rounds: int) -> dict[str, Any]:
    batch, features = ids[0].shape
    begins = torch.arange(features) * (len(table) // features)
    places = [own + begins for own in ids]
    index = [own.reshape(-1).numpy().astype(np.uint32) for own in places]
    out = np.empty((batch * features, table.shape[1]), np.float32)
    contenders: dict[str, Callable[[int], object]] = {
        "full_torch": lambda i: F.embedding(places[i], table),
        "full_kernel": lambda i: gather(table.numpy(), index[i], out),
        "mem_rec": lambda i: small(ids[i]),
    }
    times: dict[str, list[float]] = {name: [] for name in contenders}
    for _ in range(rounds + 1):
        for name, look_up in contenders.items():
            start = time.perf_counter()
            for i in range(len(ids)):
                look_up(i)
            times[name].append((time.perf_counter() - start) / (len(ids) * batch) * 1e6)
    timed = {name: own[1:] for name, own in times.items()}
    readings: dict[str, Any] = {f"{name}_us_per_sample": median(own) for name, own in timed.items()}
    for name in ("torch", "kernel"):
        ratios = [full / own for full, own in zip(timed[f"full_{name}"], timed["mem_rec"], strict=True)]
        readings[f"over_{name}"] = [median(ratios), min(ratios), max(ratios)]
    return readings


def _uniform(rng: np.random.Generator, rows: int, shape: tuple[int, int]) -> np.ndarray:
    return rng.integers(0, rows, shape)


def _zipf(rng: np.random.Generator, rows: int, shape: tuple[int, int]) -> np.ndarray:
    """Ranks 1 to rows with density rank^-1.05 (inverse of the continuous distribution), scattered over the ids."""
    power = 1 - ZIPF
    ranks = ((rows + 1.0) ** power * (u := rng.random(shape)) + (1 - u)) ** (1 / power)
    scattered: np.ndarray = np.minimum(ranks.astype(np.int64) - 1, rows - 1) * 2654435761 % rows
    return scattered


def last_level_cache() -> int | None:
    """Bytes of the largest cache of the first core, as Linux states it."""
    stated = [path.read_text().strip() for path in Path("/sys/devices/system/cpu/cpu0/cache").glob("index*/size")]
    units = {"K": 1 << 10, "M": 1 << 20}
    return max((int(size[:-1]) * units[size[-1]] for size in stated), default=None)


if __name__ == "__main__":
    print(json.dumps(mem_rec_lookup(**json.loads(sys.argv[1] if len(sys.argv) > 1 else "{}"))))
