"""QR's rows as a batch meets them: every id has a tuple of rows of its own, in integers, at any cardinality."""

from __future__ import annotations

import math

import numpy as np
import pytest
from embershard.datasets.schema import Ids
from embershard.parameter_server.tables import Optimizer
from embershard.workers.embeddings.base import Feature
from embershard.workers.embeddings.lookups import SlabLookups
from embershard.workers.embeddings.qr import QR
from hypothesis import given, settings
from hypothesis import strategies as st


def lookups(**options: object) -> tuple[SlabLookups, list[int]]:
    """All of a QR feature's lookups as one call, and the rows of its tables."""
    method = QR(Feature(name="f", method="qr", dim=12, **options), Optimizer())
    slab = SlabLookups(0, [method.feature], [(0, own.table, own) for own in method.lookups])
    return slab, [table.rows for table in method.tables]


def rows_of(slab: SlabLookups, ids: np.ndarray) -> np.ndarray:
    """int64 [tables, N]."""
    return slab.map(Ids.from_dict({"f": ids}), np.array([0]))[1].reshape(-1, len(ids))


@pytest.mark.parametrize("collisions", [2, 3, 4, 5, 7, 60])
def test_every_one_of_forty_million_ids_has_rows_of_its_own(collisions: int) -> None:
    n, piece = 40_000_000, 200_000
    slab, sizes = lookups(cardinality=n, rows=collisions)
    assert sizes == [collisions, math.ceil(n / collisions)]
    for begin in range(0, n, piece):
        ids = np.arange(begin, begin + piece)
        remainder, quotient = rows_of(slab, ids)
        assert remainder.min() >= 0 and remainder.max() < collisions
        assert quotient.min() >= 0 and quotient.max() < sizes[1]
        # The id comes back, so no two ids share both rows.
        assert (quotient * collisions + remainder == ids).all()


@pytest.mark.parametrize("collisions", [2, 4])
def test_integer_division_where_float32_goes_wrong(collisions: int) -> None:
    ids = np.array([16_777_219, 39_999_999])
    quotient = rows_of(lookups(cardinality=40_000_000, rows=collisions)[0], ids)[1]
    assert quotient.tolist() == [i // collisions for i in ids.tolist()]
    assert (ids.astype(np.float32) / collisions).astype(np.int64).tolist() != quotient.tolist()


@settings(max_examples=25, deadline=None)
@given(
    st.integers(2**31, 2**40),
    st.integers(2, 4),
    st.sampled_from(["quotient_remainder", "chinese_remainder"]),
    st.lists(st.floats(0, 1, exclude_max=True), min_size=1, max_size=20),
)
def test_digits_are_exact_beyond_32_bits(n: int, parts: int, scheme: str, places: list[float]) -> None:
    rows = max(2, round(n ** (1 / parts)) // 2)
    slab, moduli = lookups(cardinality=n, partitions=parts, scheme=scheme, rows=rows)
    ids = sorted({int(place * n) for place in places} | {0, n - 1})
    found = rows_of(slab, np.array(ids)).tolist()
    divisors = [1 if scheme == "chinese_remainder" else math.prod(moduli[:j]) for j in range(parts)]
    for j, own in enumerate(found):
        assert own == [i // divisors[j] % moduli[j] for i in ids]
    assert len(set(zip(*found, strict=True))) == len(ids)


@pytest.mark.parametrize("moduli", [(4, 5, 7), (13, 11), (2, 3, 5, 7)])
def test_chinese_remainders_are_all_different(moduli: tuple[int, ...]) -> None:
    n = math.prod(moduli)
    found = rows_of(lookups(cardinality=n, moduli=moduli, scheme="chinese_remainder")[0], np.arange(n))
    assert len(np.unique(found, axis=1)[0]) == n
    assert [own.max() + 1 for own in found] == list(moduli)


def test_without_a_cardinality_tables_are_hashed_independently() -> None:
    slab, sizes = lookups(distinct=20_000, rows=200)
    assert sizes == [200, 200]
    found = rows_of(slab, np.arange(20_000) * 977 - 5)
    pairs = len(np.unique(found[0] * 200 + found[1]))
    # As hashing 20,000 ids into 40,000 rows: 40,000 (1 - e^(-1/2)) different ones are expected, spread by about 70.
    assert pairs == pytest.approx(40_000 * (1 - math.exp(-0.5)), abs=400)
