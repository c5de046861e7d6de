"""How large every method is: the published arithmetic to the unit, ratios, bytes, and what cannot be reached."""

from __future__ import annotations

import math
import pickle
from itertools import combinations
from typing import Any

import pytest
from embershard.datasets.schema import CategoricalColumn, Schema
from embershard.datasets.synthetic import KAGGLE, TERABYTE
from embershard.parameter_server.tables import Optimizer
from embershard.workers.embeddings.base import EmbeddingError, Feature, Method, UnreachableRatio
from embershard.workers.embeddings.moduli import chinese_remainder, problem, quotient_remainder, within
from embershard.workers.embeddings.planning import (
    EmbeddingConfig,
    EmbeddingSize,
    build_method,
    feature_table,
    plan_features,
)
from hypothesis import given, settings
from hypothesis import strategies as st

DCN_V2 = [40000000, 39060, 17295, 7424, 20265, 3, 7122, 1543, 63, 40000000, 3067956, 405282, 10, 2209, 11938, 155]
DCN_V2 += [4, 976, 14, 40000000, 40000000, 40000000, 590152, 12973, 108, 36]


def schema(cardinalities: list[int]) -> Schema:
    columns = [CategoricalColumn(name=f"c{i}", cardinality=n) for i, n in enumerate(cardinalities)]
    return Schema(source="test", label="label", dense=[], categorical=columns, rows=1)


def planned(cardinalities: list[int], **config: Any) -> list[Method]:
    return [build_method(f, Optimizer()) for f in plan_features(schema(cardinalities), EmbeddingConfig(**config))]


def rows_of(methods: list[Method]) -> int:
    return sum(table.rows for method in methods for table in method.tables)


@pytest.mark.parametrize(
    ("cardinalities", "dim", "collisions", "rows", "parameters"),
    [
        (KAGGLE, 16, 4, 8_440_878, 135_054_048),
        (KAGGLE, 16, 60, 564_002, 9_024_032),
        (TERABYTE, 128, 4, 46_942_221, 6_008_604_288),
        (TERABYTE, 128, 60, 3_130_931, 400_759_168),
        (DCN_V2, 128, 4, 51_046_518, 6_533_954_304),
    ],
)
def test_qr_counts_are_the_published_ones(
    cardinalities: list[int], dim: int, collisions: int, rows: int, parameters: int
) -> None:
    methods = planned(cardinalities, method="qr", dim=dim, rows=collisions)
    size = EmbeddingSize.of(methods)
    assert rows_of(methods) == rows and size.parameters == parameters and size.bytes == 4 * parameters
    # Concatenation: the same rows, half as wide, and what stays full at its own width.
    narrow = planned(cardinalities, method="qr", dim=dim, rows=collisions, operation="concat")
    small = sum(n for n in cardinalities if n <= 200)
    assert EmbeddingSize.of(narrow).parameters == (rows - small) * dim // 2 + small * dim


@pytest.mark.parametrize(
    ("cardinalities", "dim", "rows", "parameters", "ratio"),
    [(KAGGLE, 16, 28_800, 460_800, 1172), (TERABYTE, 128, 68_722, 8_796_416, 2732)],
)
def test_qr_with_the_square_root_of_every_table(
    cardinalities: list[int], dim: int, rows: int, parameters: int, ratio: int
) -> None:
    roots = {f"c{i}": {"rows": math.isqrt(n)} for i, n in enumerate(cardinalities)}
    methods = planned(cardinalities, method="qr", dim=dim, threshold=0, rows=2, features=roots)
    size = EmbeddingSize.of(methods)
    assert rows_of(methods) == rows and size.parameters == parameters and round(size.ratio) == ratio


@pytest.mark.parametrize(("cardinalities", "rows"), [(KAGGLE, 8_440_806), (TERABYTE, 46_942_149)])
def test_hash_with_as_many_collisions_has_four_rows_fewer_per_table(cardinalities: list[int], rows: int) -> None:
    assert rows_of(planned(cardinalities, method="hash", ratio=4, threshold=200)) == rows


@pytest.mark.parametrize(
    ("cardinalities", "dim", "collisions", "bias", "parameters", "ratio"),
    [
        (KAGGLE, 16, 4, False, 168_815_267, 3.200),
        (KAGGLE, 16, 16, False, 67_528_179, 8.000),
        (KAGGLE, 16, 64, False, None, 12.80),
        (KAGGLE, 16, 256, False, None, 15.06),
        (KAGGLE, 16, 1024, False, None, 15.75),
        (KAGGLE, 16, 4, True, None, 2.667),
        (KAGGLE, 16, 16, True, None, 5.333),
        (KAGGLE, 16, 64, True, None, 7.11),
        (KAGGLE, 16, 256, True, None, 7.76),
        (KAGGLE, 16, 1024, True, None, 7.94),
        (TERABYTE, 128, 4, False, 6_196_362_078, 3.879),
        (TERABYTE, 128, 16, False, 1_689_954_270, 14.22),
        (TERABYTE, 128, 64, False, 563_352_670, 42.66),
        (TERABYTE, 128, 256, False, 281_701_854, 85.32),
        (TERABYTE, 128, 1024, False, None, 113.75),
        (TERABYTE, 128, 4, True, None, 3.765),
        (TERABYTE, 128, 16, True, None, 12.80),
        (TERABYTE, 128, 64, True, None, 32.00),
        (TERABYTE, 128, 256, True, None, 51.20),
        (TERABYTE, 128, 1024, True, None, 60.23),
    ],
)
def test_memcom_counts_are_the_published_ones(
    cardinalities: list[int], dim: int, collisions: int, bias: bool, parameters: int | None, ratio: float
) -> None:
    rows = {f"c{i}": {"rows": math.ceil(n / collisions)} for i, n in enumerate(cardinalities)}
    methods = planned(cardinalities, method="memcom", dim=dim, bias=bias, rows=1, features=rows)
    size = EmbeddingSize.of(methods)
    by_hand = sum(math.ceil(n / collisions) * dim + n * (1 + bias) if n > 200 else n * dim for n in cardinalities)
    assert size.parameters == by_hand and parameters in (None, by_hand)
    assert size.ratio == pytest.approx(ratio, abs=0.006)
    assert size.ratio < (dim / 2 if bias else dim)


def numbers(**options: Any) -> int:
    return build_method(Feature(name="f", **options), Optimizer()).parameter_count


@pytest.mark.parametrize(("dim", "ratio", "share"), [(64, 16, 0.0469), (64, 40, 0.009375), (128, 40, 0.01719)])
def test_memcom_rows_for_a_ratio(dim: int, ratio: float, share: float) -> None:
    n = 1_000_000
    method = build_method(Feature(name="f", method="memcom", cardinality=n, dim=dim, ratio=ratio), Optimizer())
    assert method.tables[0].rows / n == pytest.approx(share, rel=1e-3)
    assert 0 <= n * dim / ratio - method.parameter_count < dim  # one more row would be too many


@settings(max_examples=25, deadline=None)
@given(
    st.sampled_from(["hash", "qr", "memcom", "double_hash"]),
    st.integers(300, 3_000_000),
    st.floats(1.5, 60),
    st.sampled_from([16, 64]),
)
def test_a_ratio_is_reached_or_refused_with_one_that_is(method: str, n: int, ratio: float, dim: int) -> None:
    options = {"method": method, "cardinality": n, "dim": dim}
    try:
        found = numbers(ratio=ratio, **options)
    except EmbeddingError as error:
        assert "cannot be" in str(error)
        ratio = float(str(error).split("ratio to ")[1].split(" ")[0])
        found = numbers(ratio=ratio, **options)
    # Whole rows only: hash rounds up to the next one.
    assert found <= n * dim / ratio + dim


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (
            {"method": "memcom", "ratio": 16},
            r"'f': method memcom cannot be 16 times smaller .*ratio to 15\.997 or less",
        ),
        ({"method": "memcom", "ratio": 8, "bias": True}, r"ratio to 7\.999 or less, raise embedding\.dim, or keep it"),
        ({"method": "memcom"}, r"'f': method memcom needs either embedding\.rows or embedding\.ratio"),
        ({"method": "memcom", "rows": 3, "ratio": 2}, "memcom needs either"),
        (
            {"method": "qr", "ratio": 200},
            r"method qr cannot be 200 times smaller than 100000 rows .*ratio to 157\.977 or",
        ),
        (
            {"method": "qr"},
            r"method qr needs one of embedding\.rows, embedding\.moduli, embedding\.ratio, found none",
        ),
        ({"method": "qr", "rows": 4, "ratio": 4}, "found rows and ratio"),
        ({"method": "qr", "rows": 4, "partitions": 1}, r"embedding\.partitions=2 or more"),
        ({"method": "qr", "moduli": (400, 300), "partitions": 3}, r"one for each of embedding\.moduli .* not 3"),
        (
            {"method": "qr", "moduli": (400, 200)},
            r"moduli=\[400, 200\]: they tell only 80000 ids apart, fewer than .*100000",
        ),
        ({"method": "qr", "moduli": (0, 200)}, r"0 is not a number of rows"),
        (
            {"method": "qr", "moduli": (400, 402), "scheme": "chinese_remainder"},
            r"400 and 402 are both divisible by 2: chinese_remainder needs pairwise coprime",
        ),
        (
            {"method": "qr", "rows": 40, "partitions": 3, "operation": "concat"},
            r"concat divides dim 16 into 3 parts, which .* multiple such as 18, or another embedding\.operation",
        ),
        ({"method": "qr_path"}, r"method qr_path needs one of embedding\.rows, embedding\.moduli, found none"),
        ({"method": "qr_path", "rows": 4, "partitions": 1}, r"method qr_path has embedding\.partitions=2 or more"),
        ({"method": "qr_path", "rows": 4, "ratio": 2}, "method qr_path takes no ratio"),
        ({"method": "qr_path", "rows": 4, "dim": 65}, r"a matrix of dim x dim in one row .*inner_dim to 63 or less"),
        (
            {"method": "qr_path", "rows": 4, "dim": 128, "inner_dim": 64},
            r"a matrix of dim x embedding\.inner_dim in one row of at most 4096 floats: set embedding\.inner_dim to 32",
        ),
        ({"method": "double_hash", "rows": 40, "operation": "concat", "dim": 5}, r"concat divides dim 5 into 2 parts"),
        ({"method": "double_hash", "ratio": 200_000}, r"double_hash cannot be 200000 times smaller"),
        ({"method": "double_hash"}, "double_hash needs either"),
        ({"method": "double_hash", "rows": 9, "partitions": 3}, "double_hash has one or two tables"),
        ({"method": "full", "bias": True}, r"method full takes no bias; .* choose embedding\.method=memcom"),
        ({"method": "hash", "moduli": (9, 9)}, "method hash takes no moduli"),
    ],
)
def test_sizes_that_cannot_work(options: dict[str, Any], message: str) -> None:
    with pytest.raises(EmbeddingError, match=message):
        numbers(**{"cardinality": 100_000, "dim": 16, **options})


def test_the_error_of_a_ratio_survives_the_way_between_processes() -> None:
    with pytest.raises(UnreachableRatio) as caught:
        numbers(method="memcom", cardinality=1000, dim=16, ratio=20)
    again = pickle.loads(pickle.dumps(caught.value))
    assert str(again) == str(caught.value) and again.reachable == caught.value.reachable == 16_000 / 1016


def test_memcom_by_modulo_needs_a_cardinality() -> None:
    with pytest.raises(EmbeddingError, match=r"hashing=modulo needs a cardinality: declare one, or set it to seeded"):
        numbers(method="memcom", rows=5, hashing="modulo")


def test_path_counts_its_functions() -> None:
    base = 25_000 * 16
    assert numbers(method="qr_path", cardinality=100_000, dim=16, rows=4) == base + 4 * 16 * 16
    hidden = numbers(method="qr_path", cardinality=100_000, dim=16, rows=4, inner_dim=64)
    assert hidden == base + 4 * (64 * 16 + 64 + 16 * 64 + 16)


def test_small_tables_stay_full_and_so_do_those_that_would_not_shrink() -> None:
    methods = planned([200, 201, 1000], method="qr", rows=4, features={"c2": {"threshold": 1000}})
    assert [record["method"] for record in feature_table(methods)][:3] == ["full", "qr", "full"]
    # 2 remainders and 2 quotients are no fewer than 4 rows; memcom's U alone would be as large as the table.
    assert [t.name for t in planned([4], method="qr", rows=2, threshold=0)[0].tables] == ["c0.full"]
    assert [t.name for t in planned([500], method="memcom", rows=500)[0].tables] == ["c0.full"]


def test_the_table_of_features_ends_with_the_sum() -> None:
    records = feature_table(planned([1000, 50], method="qr", rows=4))
    assert records[-1] == {
        "feature": "all",
        "ids": "",
        "method": "",
        "rows": 254 + 50,
        "width": "",
        "parameters": 304 * 16,
        "full_rows": 1050,
        "ratio": round(1050 / 304, 3),
    }


@settings(max_examples=25, deadline=None)
@given(st.integers(2, 2**40), st.integers(2, 4), st.integers(2, 10_000), st.sampled_from([False, True]))
def test_families_tell_all_ids_apart(n: int, parts: int, rows: int, coprime: bool) -> None:
    family = chinese_remainder if coprime else quotient_remainder
    moduli = family(n, parts, rows)
    assert len(moduli) == parts and math.prod(moduli) >= n and problem(moduli, n, coprime=coprime) is None
    assert not coprime or all(math.gcd(a, b) == 1 for a, b in combinations(moduli, 2))


@pytest.mark.parametrize("parts", [2, 3, 4])
def test_the_smallest_family_has_about_k_times_the_kth_root(parts: int) -> None:
    n = 40_000_000
    least = parts * n ** (1 / parts)
    assert within(n, parts, math.floor(least) - parts, quotient_remainder) is None
    moduli = within(n, parts, math.ceil(least * 1.1) + parts, quotient_remainder)
    assert moduli is not None and math.prod(moduli) >= n


def test_within_a_budget_the_first_table_is_the_smallest_that_fits() -> None:
    n = 10_000
    for budget in range(150, 6000, 37):
        found = within(n, 2, budget, quotient_remainder)
        fitting = [m for m in range(2, 101) if m + math.ceil(n / m) <= budget]
        assert found == (quotient_remainder(n, 2, fitting[0]) if fitting else None)


@pytest.mark.parametrize(
    ("method", "ratio"), [("hash", 16), ("qr", 16), ("qr", 200), ("memcom", 10), ("double_hash", 64), ("narrow", 8)]
)
def test_bytes_for_the_whole_model(method: str, ratio: float) -> None:
    budget = round(4 * 16 * sum(KAGGLE) / ratio)
    config = EmbeddingConfig(method=method, bytes=budget)
    features = plan_features(schema(KAGGLE), config)
    size = EmbeddingSize.of(build_method(f, Optimizer()) for f in features)
    assert size.bytes <= budget
    if method != "narrow":  # whole columns of the largest tables
        assert size.bytes > 0.99 * budget
    sized = {f.ratio for f in features if f.full_rows > 1_000_000}
    assert len(sized) == 1  # what can follow the common ratio does


def test_bytes_leave_features_with_sizes_of_their_own_alone() -> None:
    own = {"c2": {"ratio": 7}, "c3": {"method": "full"}}
    config = EmbeddingConfig(method="memcom", bytes=400_000_000, features=own)
    methods = [build_method(f, Optimizer()) for f in plan_features(schema(KAGGLE), config)]
    assert methods[2].feature.ratio == 7 and methods[3].parameter_count == 2202608 * 16
    assert 0.99 * 400_000_000 < EmbeddingSize.of(methods).bytes <= 400_000_000


def test_more_bytes_than_needed_give_the_ratio_one() -> None:
    features = plan_features(schema([1000, 5000]), EmbeddingConfig(method="hash", bytes=10**9))
    assert [build_method(f, Optimizer()).parameter_count for f in features] == [16_000, 80_000]


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ({"method": "full"}, r"embedding\.bytes: no feature is left to be sized"),
        (
            {"method": "hash", "features": {"c2": {"method": "mem_rec", "scope": "field"}}},
            r"embedding\.bytes: feature 'c2' shares mem_rec's table .* give its token_rows, or choose mem_rec",
        ),
        ({"method": "qr", "ratio": 4}, "no feature is left to be sized"),
        (
            {"method": "memcom"},
            r"embedding\.bytes: 1000000 is less than these methods can do with, 135063820: raise it",
        ),
    ],
)
def test_bytes_that_cannot_be_reached(config: dict[str, Any], message: str) -> None:
    with pytest.raises(EmbeddingError, match=message):
        plan_features(schema(KAGGLE), EmbeddingConfig(bytes=1_000_000, **config))
