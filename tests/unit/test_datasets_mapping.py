"""Other people's Parquet: bags, strings, partitioned folders, patterns, standardised values."""

import sys
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from embershard.datasets.files import load_schema
from embershard.datasets.inspect import describe
from embershard.datasets.schema import DataConfig, DataError
from embershard.datasets.stream import ParquetStream

sys.path.insert(0, str(Path(__file__).parents[1] / "oracles"))
import datasets_reference as reference

TAGS = pa.list_(pa.int32())


def table(rows: int = 120, seed: int = 0) -> pa.Table:
    """Bags of 0 to 3 tags, null lists and null tags; weights for tags; text, also stored as a dictionary."""
    rng = np.random.default_rng(seed)
    sizes = rng.integers(0, 4, rows)
    empty = rng.random(rows) < 0.1
    tags = [
        None if e else [None if t == 7 else int(t) for t in rng.integers(0, 50, n)]
        for n, e in zip(sizes, empty, strict=True)
    ]
    words = [None if n == 3 else "w" * int(n * 9) + str(n % 2) for n in rng.integers(0, 6, rows)]
    return pa.table(
        {
            "clicked": pa.array(rng.integers(0, 2, rows), pa.int64()),
            "price": pa.array(rng.normal(3, 2, rows), mask=rng.random(rows) < 0.2),
            "age": pa.array(rng.integers(0, 90, rows), pa.int16()),
            "user": pa.array(np.arange(rows) + 1000 * seed),
            "word": pa.array(words),
            "code": pa.array([None if w is None else w.encode() for w in words], pa.binary()).dictionary_encode(),
            "tags": pa.array(tags, TAGS),
            "tag_weights": pa.array(
                [None if t is None else [round(x, 3) for x in rng.random(len(t))] for t in tags], pa.list_(pa.float64())
            ),
            "names": pa.array([None if t is None else [str(x) for x in t] for t in tags], pa.large_list(pa.string())),
        }
    )


CONFIG = DataConfig(
    label="clicked",
    dense=["price", "age"],
    categorical=["user", "word", "code"],
    bags=["tags", "names"],
    bag_weights={"tags": "tag_weights"},
)


def rows_of(path: Path | str, config: DataConfig, **arguments) -> list[tuple]:
    schema = load_schema(str(path), config)
    one = ParquetStream(str(path), **{"batch_size": 32, "schema": schema} | arguments)
    return [row for batch in one.batches(0) for row in reference.batch_rows(batch)]


def expected(path: Path, config: DataConfig, missing_id: int = -1) -> list[tuple]:
    """Plain ids as bags of one."""
    schema = load_schema(str(path), config)
    first = 1 + len(schema.dense)
    return [
        (*row[:first], *(i if isinstance(i, tuple) else ((i, np.float32(1)),) for i in row[first:]))
        for row in reference.read_rows(path, schema, missing_id)
    ]


def write(path: Path, content: pa.Table, row_group_size: int = 25) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    pq.write_table(content, path, row_group_size=row_group_size)


def refused(path: Path | str, config: DataConfig) -> str:
    with pytest.raises(DataError) as caught:
        rows_of(path, config)
    assert "\n" not in str(caught.value)
    return str(caught.value)


def test_without_dense_columns_none_need_be_named(tmp_path):
    write(tmp_path / "a.parquet", table())
    schema = load_schema(str(tmp_path), DataConfig(label="clicked", categorical=["user"]))
    assert (schema.dense_names, schema.categorical_names) == ([], ["user"])
    assert refused(tmp_path, DataConfig(label="clicked", dense=["price"])).count("data.bags=[...]") == 1


@pytest.mark.parametrize(("value", "found"), [(5, "5"), (None, "None")])
def test_what_is_no_label_is_refused_before_anything_starts(tmp_path, value, found):
    write(tmp_path / "a.parquet", pa.table({"label": pa.array([], pa.int64()), "user": pa.array([], pa.int64())}))
    write(tmp_path / "b.parquet", pa.table({"label": [1, 0, value], "user": [1, 2, 3]}))
    wanted = f"b.parquet: column 'label', row 2: found {found}; labels must be 0 or 1"
    with pytest.raises(DataError, match=wanted):
        load_schema(str(tmp_path), DataConfig(label="label", categorical=["user"]), labels=True)
    assert describe(str(tmp_path))["not_counted"].endswith(wanted)


def test_two_columns_of_one_name_are_refused_by_name(tmp_path):
    content = pa.Table.from_arrays([pa.array([0, 1])] * 3, names=["clicked", "user", "user"])
    write(tmp_path / "a.parquet", content)
    message = refused(tmp_path, DataConfig(label="clicked", categorical=["user"]))
    assert "a.parquet: 2 columns are called 'user'" in message


@pytest.mark.parametrize("shuffle", [False, True])
def test_bags_strings_and_weights_are_those_of_the_table(tmp_path, shuffle):
    for seed in (0, 1):
        write(tmp_path / f"{seed}.parquet", table(seed=seed))
    found = rows_of(tmp_path, CONFIG, shuffle=shuffle, missing_id=99)
    wanted = expected(tmp_path, CONFIG, 99)
    assert len(found) == 240
    assert found == wanted if not shuffle else sorted(found) == sorted(wanted)
    words = {id for row in found for id, _ in row[4]}
    assert len(words) == 6


def test_batches_hold_contiguous_bags_ready_for_torch(tmp_path):
    write(tmp_path / "a.parquet", table())
    one = ParquetStream(str(tmp_path), batch_size=50, schema=load_schema(str(tmp_path), CONFIG), window_bytes=1)
    for batch in one.batches(0):
        ids = batch.ids
        assert ids.features == ("user", "word", "code", "tags", "names")
        assert (ids.values.dtype, ids.offsets.dtype, ids.weights.dtype) == (np.int64, np.int64, np.float32)
        assert len(ids.offsets) == 5 * batch.rows + 1
        assert (ids.offsets[0], ids.offsets[-1]) == (0, len(ids.values))
        assert ids.batch_size == batch.rows


def test_empty_batches_of_bags(tmp_path):
    write(tmp_path / "a.parquet", table(20))
    schema = load_schema(str(tmp_path), CONFIG)
    other = ParquetStream(str(tmp_path), batch_size=8, schema=schema, rank=1, workers=2)
    assert [(b.rows, b.ids.batch_size, b.ids.offsets.tolist()) for b in other.batches(0)] == [(0, 0, [0])] * 5


def test_without_weights_there_are_none(tmp_path):
    write(tmp_path / "a.parquet", table())
    one = ParquetStream(
        str(tmp_path), batch_size=9, schema=load_schema(str(tmp_path), CONFIG.model_copy(update={"bag_weights": {}}))
    )
    assert all(batch.ids.weights is None for batch in one.batches(0))


def test_patterns_choose_columns_that_fit_and_that_nothing_else_names(tmp_path):
    write(tmp_path / "a.parquet", table())
    config = DataConfig(label="clicked", dense=["p*"], categorical=["*"], bags=["t*s", "n*"], bag_weights={})
    schema = load_schema(str(tmp_path), config)
    assert schema.dense_names == ["price"]
    assert [c.name for c in schema.categorical if c.bag] == ["tags", "names"]
    assert [c.name for c in schema.categorical if not c.bag] == ["age", "user", "word", "code"]
    assert "data.dense: no column of" in refused(tmp_path, CONFIG.model_copy(update={"dense": ["x*"]}))
    twice = CONFIG.model_copy(update={"dense": ["price", "user"]})
    assert refused(tmp_path, twice) == "data.categorical: column 'user' is named twice, also in data.dense"
    stray = CONFIG.model_copy(update={"bag_weights": {"user": "tag_weights"}})
    assert refused(tmp_path, stray) == "data.bag_weights: 'user' is not one of data.bags: tags, names"


def test_partitioned_folders_add_columns(tmp_path):
    for day, country in ((1, "de"), (2, "fr"), (12, "__HIVE_DEFAULT_PARTITION__")):
        write(tmp_path / f"day={day}" / f"country={country}" / "x.parquet", table(30, seed=day))
    config = DataConfig(label="clicked", dense=["age"], categorical=["user", "country", "day"])
    found = sorted(rows_of(tmp_path, config))
    assert len(found) == 90
    by_day = {row[4]: row[3] for row in found}
    assert by_day == {1: reference.identity("de", -1), 2: reference.identity("fr", -1), 12: -1}
    assert all(row[2] // 1000 == row[4] for row in found)
    one_day = rows_of(f"{tmp_path}/day=1*", config)
    assert {row[4] for row in one_day} == {1, 12}
    assert len(rows_of(f"{tmp_path}/*/country=??/*.parquet", config)) == 60
    assert "no file or folder matches this pattern" in refused(f"{tmp_path}/day=7*", config)


def test_standardised_values_have_zero_mean_and_unit_variance(tmp_path):
    for seed in (0, 1):
        write(tmp_path / f"{seed}.parquet", table(seed=seed))
    config = CONFIG.model_copy(update={"dense_transform": "standardise"})
    found = rows_of(tmp_path, config, shuffle=False)
    assert found == expected(tmp_path, config)
    price = np.array([row[1] for row in found])
    nulls = pq.read_table(tmp_path).column("price").is_null().to_numpy()
    assert abs(price[~nulls].mean()) < 1e-6
    assert abs(price[~nulls].std() - 1) < 1e-6
    assert set(price[nulls]) == {0}
    assert load_schema(str(tmp_path), config).dense[1].deviation > 20


def test_a_constant_column_standardises_to_zero_and_nan_is_named(tmp_path):
    write(tmp_path / "a.parquet", table().set_column(2, "age", pa.array([5] * 120)))
    config = CONFIG.model_copy(update={"dense_transform": "standardise"})
    assert {row[2] for row in rows_of(tmp_path, config)} == {0}
    write(tmp_path / "a.parquet", table().set_column(2, "age", pa.array([float("nan")] * 120)))
    assert "column 'age': found nan or inf; write a null where a value is missing" in refused(tmp_path, config)


def test_weights_must_fit_their_bags_and_be_finite(tmp_path):
    bags = pa.array([[1, 2], None, [3]], pa.list_(pa.int64()))
    start = table(3).drop_columns(["tags", "tag_weights"]).append_column("tags", bags)
    for weights, row, message in (
        ([[0.5, 1.0], None, [1.0, 2.0]], 2, "found [1.0, 2.0]; expected a weight for each of the 1 ids of 'tags'"),
        ([[0.5, None], None, [1.0]], 0, "found [0.5, None]; weights must be finite"),
        ([[0.5, 1.0], None, [float("inf")]], 2, "found [inf]; weights must be finite"),
    ):
        write(tmp_path / "a.parquet", start.append_column("tag_weights", pa.array(weights, pa.list_(pa.float32()))))
        assert refused(tmp_path, CONFIG).endswith(f"a.parquet: column 'tag_weights', row {row}: {message}")


def test_lists_of_fixed_size_with_nulls(tmp_path):
    content = table(3).drop_columns(["tags", "tag_weights", "names"])
    content = content.append_column("tags", pa.array([[1, 2], None, [3, 4]], pa.list_(pa.int32(), 2)))
    content = content.append_column("names", pa.array([["1", "2"], None, ["3", "4"]], pa.list_(pa.string(), 2)))
    weights = pa.array([[0.5, 1.0], None, [2.0, 3.0]], pa.list_(pa.float32(), 2))
    write(tmp_path / "a.parquet", content.append_column("tag_weights", weights))
    assert rows_of(tmp_path, CONFIG, shuffle=False) == expected(tmp_path, CONFIG)


def test_bags_that_are_no_lists_negative_ids_in_bags_and_mixed_types(tmp_path):
    write(tmp_path / "a.parquet", table())
    wrong = CONFIG.model_copy(update={"bags": ["price"], "bag_weights": {}, "dense": ["age"]})
    assert refused(tmp_path, wrong).endswith("column 'price' is double, expected a list of integer or string ids")
    wrong = CONFIG.model_copy(update={"bags": [], "bag_weights": {}, "categorical": ["tags"]})
    assert "lists of ids go into data.bags" in refused(tmp_path, wrong)
    write(tmp_path / "a.parquet", table(3).set_column(6, "tags", pa.array([[1], [2, -5], []], TAGS)))
    wrong = CONFIG.model_copy(update={"bag_weights": {}})
    assert "column 'tags', row 1: found [2, -5]; ids must be 0 or more" in refused(tmp_path, wrong)
    write(tmp_path / "b.parquet", table(3).set_column(3, "user", pa.array(["a", "b", "c"])))
    assert "b.parquet: column 'user' holds string, that of" in refused(tmp_path, CONFIG)
