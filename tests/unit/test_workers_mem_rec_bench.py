"""The MEM-REC lookup benchmark at a small size: both distributions, both contenders, and what their ratio is of."""

from __future__ import annotations

import numpy as np
from embershard.workers.mem_rec_bench import _zipf, mem_rec_lookup


def test_readings_of_a_small_run() -> None:
    found = mem_rec_lookup(table_bytes=100_000, token_rows=50, dim=8, features=3, batch=4, batches=2, rounds=2)
    assert found["full_bytes"] >= 100_000 and found["mem_rec_bytes"] == 4 * 50 * 9
    for name in ("uniform", "zipf_1.05"):
        readings = found[name]
        for who in ("torch", "kernel"):
            middle, least, greatest = readings[f"over_{who}"]
            assert 0 < least <= middle <= greatest
        assert min(readings[f"{who}_us_per_sample"] for who in ("full_torch", "full_kernel", "mem_rec")) > 0


def test_zipf_ids_are_as_frequent_as_their_ranks_say() -> None:
    rows = 1000
    ids = _zipf(np.random.default_rng(0), rows, (40_000, 5)).reshape(-1)
    assert ids.min() >= 0 and ids.max() < rows
    counts = np.sort(np.bincount(ids, minlength=rows))[::-1] / len(ids)
    # The share of the ranks 1 to k under density x^-1.05 on [1, 1001).
    for k in (1, 10, 100):
        expected = ((k + 1) ** -0.05 - 1) / ((rows + 1) ** -0.05 - 1)
        np.testing.assert_allclose(counts[:k].sum(), expected, rtol=0.03)
