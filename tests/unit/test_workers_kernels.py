"""The kernels against numpy."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from embershard.datasets.schema import Ids
from embershard.workers.embeddings import kernels
from embershard.workers.embeddings.base import Feature, Lookup, RowMap
from embershard.workers.embeddings.gather import vectors
from embershard.workers.embeddings.lookups import SlabLookups
from hypothesis import given, settings
from hypothesis import strategies as st

words = st.integers(0, 2**64 - 1)


@settings(max_examples=50, deadline=None)
@given(words, words)
def test_multiply_high_is_exact(a: int, b: int) -> None:
    assert int(kernels.multiply_high(np.uint64(a), np.uint64(b))) == (a * b) >> 64


def mix(word: int) -> int:
    word = (word ^ word >> 30) * 0xBF58476D1CE4E5B9 % 2**64
    word = (word ^ word >> 27) * 0x94D049BB133111EB % 2**64
    return word ^ word >> 31


def expected_row(row_map: RowMap, value: int) -> int:
    if row_map.wrap:
        value %= row_map.limit
    if row_map.kind == "index":
        return value // row_map.divisor % row_map.modulus
    return mix(mix(value % 2**64) ^ row_map.seed) * row_map.modulus >> 64


MAPS = [
    RowMap("index", 40_000_000, limit=40_000_000),
    RowMap("index", 10),
    RowMap("index", 60, limit=40_000_000),
    RowMap("index", 10_000_000, divisor=4, limit=40_000_000),
    RowMap("index", 7, divisor=9),
    RowMap("hash", 1),
    RowMap("hash", 1000, seed=2**64 - 5),
    RowMap("hash", 2**41, seed=7),
    RowMap("hash", 1000, limit=40_000_000, seed=7),
    RowMap("hash", 1000, limit=500, seed=7, wrap=True),
    RowMap("index", 25, divisor=20, limit=490, wrap=True),
    RowMap("index", 490, limit=490, wrap=True),
]


@settings(max_examples=25, deadline=None)
@given(st.lists(st.integers(0, 39_999_999), min_size=1, max_size=30), st.permutations(range(len(MAPS))))
def test_rows_of_all_lookups_at_once(values: list[int], order: list[int]) -> None:
    """Two features; every map reads one of them; the second feature's ids are the first's in reverse."""
    features = [Feature(name="a"), Feature(name="b")]
    lookups = [(m % 2, m, Lookup(m, MAPS[m])) for m in order]
    slab = SlabLookups(0, features, lookups)
    ids = Ids.from_dict({"x": np.zeros(len(values), np.int64), "b": np.array(values[::-1]), "a": np.array(values)})
    segments, rows = slab.map(ids, np.array([2, 1]))
    for place, m in enumerate(order):
        own = values if m % 2 == 0 else values[::-1]
        assert rows[segments[place] : segments[place + 1]].tolist() == [expected_row(MAPS[m], v) for v in own]


def test_integer_arithmetic_is_exact_where_floats_are_not() -> None:
    slab = SlabLookups(0, [Feature(name="a")], [(0, 0, Lookup(0, MAPS[3]))])
    ids = Ids.from_dict({"a": np.array([16_777_219, 39_999_999])})
    assert slab.map(ids, np.array([0]))[1].tolist() == [4_194_304, 9_999_999]


def test_hashes_spread_and_seeds_are_unrelated() -> None:
    n, m = 200_000, 1000
    ids = Ids.from_dict({"a": np.arange(n) * 4096})  # patterned
    rows = []
    for seed in (1, 2):
        slab = SlabLookups(0, [Feature(name="a")], [(0, 0, Lookup(0, RowMap("hash", m, seed=seed)))])
        rows.append(slab.map(ids, np.array([0]))[1])
        counts = np.bincount(rows[-1], minlength=m)
        chi_square = ((counts - n / m) ** 2 / (n / m)).sum()
        assert abs(chi_square - m) < 6 * np.sqrt(2 * m)
    together = np.bincount(rows[0] // 50 * 20 + rows[1] // 50, minlength=400)
    assert abs(((together - n / 400) ** 2 / (n / 400)).sum() - 400) < 6 * np.sqrt(800)


def test_gather_and_scatter_are_transposes() -> None:
    rng = np.random.default_rng(0)
    rows = rng.standard_normal((6, 3), dtype=np.float32)
    inverse = rng.integers(0, 6, 4 * 5).astype(np.int32)  # 4 features, 5 samples
    out = np.empty((5, 4, 3), np.float32)
    kernels.gather_vectors(rows, inverse, out, 0, 5)
    np.testing.assert_array_equal(out, rows[inverse.reshape(4, 5).T])
    grad = rng.standard_normal(out.shape, dtype=np.float32)
    back = np.zeros_like(rows)
    kernels.scatter_vectors(grad.reshape(-1), 12, 4, inverse, back, 0, 4)
    expected = np.zeros_like(rows)
    np.add.at(expected, inverse.reshape(4, 5).T, grad)
    np.testing.assert_allclose(back, expected, rtol=1e-6)


@pytest.mark.parametrize("threads", [1, 3])
@pytest.mark.parametrize("own_rows", [False, True])
def test_threads_divide_the_work_and_change_nothing(threads: int, own_rows: bool) -> None:
    """Large enough to be divided; without rows of their own, features are summed by one thread in their order."""
    rng, before = np.random.default_rng(2), torch.get_num_threads()
    features, batch, each = 7, 1500, 40
    inverse = rng.integers(0, each, (features, batch)) + (each * np.arange(features)[:, None] if own_rows else 0)
    rows = torch.from_numpy(rng.standard_normal((features * each, 16), dtype=np.float32)).requires_grad_()
    wide = torch.from_numpy(rng.standard_normal((batch, features + 2, 16), dtype=np.float32))
    grad = wide[:, 1:-1]  # as it comes from a model that put other vectors beside these
    torch.set_num_threads(threads)
    try:
        out = vectors(rows, inverse.reshape(-1).astype(np.int32), features, own_rows=own_rows)
        out.backward(grad)
    finally:
        torch.set_num_threads(before)
    np.testing.assert_array_equal(out.detach().numpy(), rows.detach().numpy()[inverse.T])
    expected = np.zeros(rows.shape, np.float32)
    np.add.at(expected, inverse.T, grad.numpy())  # in the order of the occurrences
    np.testing.assert_array_equal(rows.grad.numpy(), expected)


def test_sums_do_not_depend_on_where_rows_stand() -> None:
    """The same batch with its unique rows in another order: bit for bit the same sums."""
    rng = np.random.default_rng(1)
    inverse = rng.integers(0, 4, 600).astype(np.int32)
    grad = (rng.standard_normal((200, 3, 2)) * 10.0 ** rng.integers(-6, 6, (200, 3, 2))).astype(np.float32)
    order = np.array([2, 0, 3, 1], np.int32)
    one, other = np.zeros((4, 2), np.float32), np.zeros((4, 2), np.float32)
    kernels.scatter_vectors(grad.reshape(-1), 6, 3, inverse, one, 0, 3)
    kernels.scatter_vectors(grad.reshape(-1), 6, 3, order[inverse], other, 0, 3)
    assert one.tobytes() == other[order].tobytes()
