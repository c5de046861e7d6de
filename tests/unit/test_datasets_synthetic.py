"""Generated logs: reproducible, of the stated shape, with the stated best AUC. And the summary of a data set."""

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from embershard.datasets import synthetic, synthetic_kernels
from embershard.datasets.files import load_schema
from embershard.datasets.inspect import describe
from embershard.datasets.schema import DataConfig, DataError
from embershard.datasets.stream import ParquetStream
from embershard.datasets.synthetic import PlantedModel, best_auc, generate
from sklearn.metrics import roc_auc_score

SIZES = (50, 3, 1000, 1)


@pytest.fixture(scope="module")
def model() -> PlantedModel:
    return PlantedModel(SIZES, [1] * len(SIZES), 3, 1.2, model_seed=4)


def test_rows_depend_on_seed_and_number_alone(model):
    whole, logits = model.draw(7, 0, 1000)
    part, part_logits = model.draw(7, 600, 100)
    for name in ("labels", "dense", "dense_null", "ids"):
        assert np.array_equal(getattr(whole, name)[..., 600:700], getattr(part, name))
    assert np.array_equal(logits[600:700], part_logits)
    assert not np.array_equal(whole.ids, model.draw(8, 0, 1000)[0].ids)


def test_logits_follow_from_ids_and_dense_values_alone(model):
    """Two logs of one model share their effects: equal rows have equal logits, whatever their seeds."""
    drawn = [model.draw(seed, 0, 30_000) for seed in (1, 2)]
    known: dict[tuple[int, ...], float] = {}
    shared = 0
    for block, logits in drawn:
        for key, logit in zip(map(tuple, np.vstack([block.ids, block.dense]).T.tolist()), logits, strict=True):
            shared += key in known
            assert known.setdefault(key, logit) == logit
    assert shared > 100


@pytest.fixture(scope="module")
def bagged() -> PlantedModel:
    return PlantedModel(SIZES, [1, 4, 9, 1], 3, 1.2, model_seed=4)


def test_bags_depend_on_seed_and_number_alone_and_have_every_size(bagged):
    whole, part = bagged.draw(7, 0, 3000)[0], bagged.draw(7, 600, 100)[0]
    assert np.array_equal(whole.ids[:, 600:700], part.ids)
    for (offsets, ids), (some, few), most, n in zip(whole.bags, part.bags, (4, 9), (3, 1000), strict=True):
        assert np.array_equal(np.diff(offsets)[600:700], np.diff(some))
        assert np.array_equal(ids[offsets[600] : offsets[700]], few)
        assert set(np.diff(offsets)) == set(range(1, most + 1))
        assert (ids.min(), ids.max() < n) == (0, True)
        place = np.arange(len(ids)) - np.repeat(offsets[:-1], np.diff(offsets))
        means = [(ids[place == i] == 0).mean() for i in (0, 1)]  # every place draws from the same distribution
        assert abs(means[0] - means[1]) < 0.05


def test_logits_are_sums_over_the_ids_of_bags(bagged):
    """The planted model written out, over the effects of the kernels."""
    rows = 40
    block, logits = bagged.draw(3, 0, rows)

    def effect(identity: int, stream: int) -> float:
        return float(synthetic_kernels._effect(identity, stream, bagged.key))

    plain, pair = 1.6 / 4**0.5, 0.6 / 2**0.5
    for row in range(rows):
        bags = [ids[offsets[row] : offsets[row + 1]].tolist() for offsets, ids in block.bags]
        features = [[int(block.ids[0, row])], *bags, [int(block.ids[1, row])]]
        scales = [1.0, 2.5**-0.5, 5**-0.5, 1.0]

        def total(f: int, stream: int, features=features, scales=scales) -> float:
            return scales[f] * sum(effect(i, stream) for i in features[f])

        expected = bagged.intercept + sum(plain * total(f, f) for f in range(4))
        expected += sum(pair * total(f, f + (1 << 20)) * total(f + 1, f + (1 << 21)) for f in (0, 2))
        for k, sign in enumerate((1, -1, 1)):
            expected += sign * 0.35 / 3**0.5 * (np.log1p(block.dense[k, row]) - 1)
        assert logits[row] == pytest.approx(expected, rel=1e-5)


def test_best_auc_of_bags_is_that_of_their_logits(bagged):
    block, logits = bagged.draw(5, 0, 200_000)
    assert abs(block.labels.mean() - synthetic.POSITIVE_RATE) < 0.01
    assert abs(roc_auc_score(block.labels, logits) - bagged.best_auc) < 0.005


def test_generated_bags_are_read_back(tmp_path, monkeypatch):
    monkeypatch.setattr(synthetic, "_BLOCK_ROWS", 1000)
    arguments = {"rows": 2500, "cardinalities": SIZES, "multi_hot": [1, 4, 9, 1], "dense": 1}
    generate(str(tmp_path / "a"), **arguments)
    schema = load_schema(str(tmp_path / "a"))
    assert [(c.name, c.bag, c.cardinality) for c in schema.categorical] == [
        ("c1", False, 50),
        ("c4", False, 1),
        ("c2", True, 3),
        ("c3", True, 1000),
    ]
    table = pq.read_table(tmp_path / "a")
    ids = [i for bag in table.column("c2").to_pylist() for i in bag]
    assert dict(schema.categorical[2].frequent) == {i: ids.count(i) for i in range(3)}
    batches = list(ParquetStream(str(tmp_path / "a"), batch_size=1000, shuffle=False).batches(0))
    for name in ("c1", "c2", "c3", "c4"):
        read = [batch.ids[name] for batch in batches]
        bags = [v[o[i] : o[i + 1]].tolist() for v, o in read for i in range(len(o) - 1)]
        stored = table.column(name).to_pylist()
        assert bags == (stored if name in ("c2", "c3") else [[i] for i in stored])
    summary = describe(str(tmp_path / "a"), verify=True)
    assert summary["problems"] == []
    assert summary["mapping"]["data.bags"] == ["c2", "c3"]


def test_ids_are_zipf_over_their_cardinality(model):
    ids = model.draw(0, 0, 200_000)[0].ids
    for column, n in zip(ids, SIZES, strict=True):
        counts = np.sort(np.bincount(column, minlength=n))[::-1]
        assert len(counts) == n
        edges = (np.arange(1, n + 2) ** (1 - 1.2) - 1) / ((n + 1) ** (1 - 1.2) - 1)
        assert np.abs(counts[:5] / len(column) - np.diff(edges)[:5]).max() < 0.01
    assert synthetic_kernels.zipf_rank(0.999999999, 10, 1.0, synthetic_kernels.zipf_scale(10, 1.0)) == 9


def test_labels_come_from_the_logits(model):
    block, logits = model.draw(3, 0, 200_000)
    p = 1 / (1 + np.exp(-logits))
    assert abs(block.labels.mean() - synthetic.POSITIVE_RATE) < 0.01
    for low, high in ((0.05, 0.15), (0.3, 0.5), (0.6, 0.9)):
        chosen = (p > low) & (p < high)
        assert abs(block.labels[chosen].mean() - p[chosen].mean()) < 0.02
    assert abs(roc_auc_score(block.labels, p) - model.best_auc) < 0.005


def test_best_auc_is_the_expectation_over_labels():
    p = np.array([0.2, 0.9, 0.5])
    right = sum(p[i] * (1 - p[j]) for i in range(3) for j in range(3) if p[i] > p[j])
    pairs = sum(p[i] * (1 - p[j]) for i in range(3) for j in range(3) if i != j)
    assert best_auc(p) == pytest.approx(right / pairs)


def test_generate_writes_what_it_states_in_bounded_blocks(tmp_path, monkeypatch):
    monkeypatch.setattr(synthetic, "_BLOCK_ROWS", 1000)
    monkeypatch.setattr(synthetic, "_FILE_ROWS", 2000)
    steps = []
    arguments = {"rows": 4500, "cardinalities": SIZES, "dense": 3}
    summary = generate(str(tmp_path / "a"), **arguments, progress=lambda *step: steps.append(step))
    assert (summary["rows"], summary["files"]) == (4500, 3)
    assert (len(steps), steps[-1]) == (5, (4500, 4500))
    assert steps == sorted(steps)
    schema = load_schema(str(tmp_path / "a"))
    assert (schema.rows, schema.best_auc) == (4500, summary["best_auc"])
    assert [column.cardinality for column in schema.categorical] == list(SIZES)
    assert all(column.distinct <= column.cardinality for column in schema.categorical)
    assert schema.dense[0].missing == 0 < schema.dense[2].missing
    table = pq.read_table(tmp_path / "a")
    assert table.column_names == ["label", "i1", "i2", "i3", "c1", "c2", "c3", "c4"]
    assert table.column("i3").null_count == round(schema.dense[2].missing * 4500)
    generate(str(tmp_path / "b"), **arguments)
    generate(str(tmp_path / "c"), **arguments, seed=1)
    assert pq.read_table(tmp_path / "b").equals(table)
    assert not pq.read_table(tmp_path / "c").equals(table)


@pytest.mark.parametrize(
    "arguments",
    [
        {"rows": 0},
        {"rows": 1, "cardinalities": [0]},
        {"rows": 1, "cardinalities": []},
        {"rows": 1, "dense": -1},
        {"rows": 1, "multi_hot": [0]},
        {"rows": 1, "cardinalities": [5, 5], "multi_hot": [2, 2, 2]},
        {"rows": 1, "multi_hot": []},
    ],
)
def test_sizes_that_make_no_sense(tmp_path, arguments):
    with pytest.raises(DataError, match=r"^generate: "):
        generate(str(tmp_path / "a"), **arguments)


# -- describe


def test_describe_states_what_the_files_hold(tmp_path):
    path = str(tmp_path / "a")
    generated = generate(path, rows=500, cardinalities=SIZES, dense=2)
    summary = describe(path, verify=True)
    assert summary["problems"] == []
    assert summary["source"] == "generated"
    assert summary["rows"] == 500
    assert summary["label_rate"] == generated["label_rate"]
    assert summary["bytes"] == sum(file.stat().st_size for file in (tmp_path / "a").glob("*.parquet"))
    assert [column["role"] for column in summary["columns"]] == ["label", "dense", "dense", *["categorical"] * 4]
    assert summary["columns"][3] | {"missing": 0.0, "cardinality": 50} == summary["columns"][3]
    assert len(summary["examples"]) == 3
    assert summary["mapping"]["data.dense"] == ["i1", "i2"]


def test_describe_proposes_a_mapping_for_foreign_files_and_verify_names_bad_rows(tmp_path):
    table = pa.table({"Click": [0, 1, 5], "price": [1.0, None, 2.0], "user": [1, 2, 3], "name": ["a", "b", "c"]})
    pq.write_table(table, tmp_path / "a.parquet")
    summary = describe(str(tmp_path), verify=True)
    names = {"data.label": "Click", "data.dense": ["price"], "data.categorical": ["user", "name"]}
    assert summary["mapping"] == names
    assert [column["role"] for column in summary["columns"]] == ["label", "dense", "categorical", "categorical"]
    assert [column["missing"] for column in summary["columns"]] == [0, 1 / 3, 0, 0]
    assert len(summary["problems"]) == 1
    assert "a.parquet: column 'Click', row 2: found 5; labels must be 0 or 1" in summary["problems"][0]


def test_describe_counts_labels_and_different_ids_of_foreign_files(tmp_path):
    rows = 5000
    table = pa.table(
        {
            "label": np.arange(rows) % 4 == 0,
            "score": np.linspace(0, 1, rows),
            "user": np.arange(rows),
            "country": [f"c{i % 7}" for i in range(rows)],
            "tags": [[i % 11, i % 5] for i in range(rows)],
            "tags_weights": [[1.0, 0.5]] * rows,
        }
    )
    (tmp_path / "day=1").mkdir()
    pq.write_table(table, tmp_path / "day=1" / "a.parquet", row_group_size=500)
    summary = describe(str(tmp_path))
    assert summary["label_rate"] == 0.25
    assert summary["counted_rows"] == rows
    assert summary["mapping"] == {
        "data.label": "label",
        "data.dense": ["score"],
        "data.categorical": ["user", "country", "day"],
        "data.bags": ["tags"],
        "data.bag_weights": {"tags": "tags_weights"},
    }
    frequent = {column["name"]: column["frequent"] for column in summary["columns"]}
    assert frequent["tags"] == {0: 1455, 1: 1455, 2: 1455}
    assert (frequent["label"], list(frequent["country"].values())) == (None, [715, 715, 714])
    distinct = {column["name"]: column["distinct"] for column in summary["columns"]}
    assert abs(distinct.pop("user") - rows) < 0.05 * rows
    assert distinct == {"label": None, "score": None, "country": 7, "tags": 11, "tags_weights": None, "day": 1}
    config = DataConfig(**{key.removeprefix("data."): value for key, value in summary["mapping"].items()})
    assert load_schema(str(tmp_path), config).rows == rows


def test_the_index_that_pandas_writes_is_not_proposed(tmp_path):
    content = pa.table({"label": [0, 1], "user": [4, 5], "__index_level_0__": [7, 9]})
    pq.write_table(content, tmp_path / "a.parquet")
    summary = describe(str(tmp_path))
    assert summary["mapping"] == {"data.label": "label", "data.dense": [], "data.categorical": ["user"]}
    assert summary["columns"][2]["role"] == "unused" and "not_counted" not in summary


def test_describe_says_why_nothing_was_counted(tmp_path):
    pq.write_table(pa.table({"label": ["0", "1"], "user": [4, 5]}), tmp_path / "a.parquet")
    summary = describe(str(tmp_path))
    assert summary["positives"] is None and summary["counted_rows"] is None
    assert summary["not_counted"].endswith("a.parquet: column 'label' is string, expected 0 or 1")


def test_describe_without_a_label(tmp_path):
    pq.write_table(pa.table({"user": [1], "item": [2]}), tmp_path / "a.parquet")
    summary = describe(str(tmp_path), verify=True)
    assert summary["mapping"]["data.label"] is None
    assert summary["problems"] == ["no label column was found"]
    with pytest.raises(DataError, match="no such file or folder"):
        describe(str(tmp_path / "nothing"))


def test_folders_of_mixed_data_are_refused(tmp_path):
    for name, dense in (("a", 1), ("b", 2)):
        generate(str(tmp_path / name), rows=10, cardinalities=SIZES, dense=dense)
    with pytest.raises(DataError, match=r"its columns differ from those of .*a/part-00000\.parquet"):
        load_schema(str(tmp_path))
