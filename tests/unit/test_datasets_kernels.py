"""Kernels against their plain twins."""

import sys
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from embershard.datasets import bag_kernels, kernels, sketch_kernels
from embershard.datasets.files import load_schema
from embershard.datasets.jit import jit
from embershard.datasets.schema import DataConfig
from embershard.datasets.sketch import IdSketch
from embershard.datasets.stream import ParquetStream

sys.path.insert(0, str(Path(__file__).parents[1] / "oracles"))
import datasets_reference as reference

RNG = np.random.default_rng(5)
NONE = np.uint64(0)


def test_mix_is_splitmix64():
    for value, seed in RNG.integers(0, 2**63, (50, 2)).tolist():
        assert int(kernels.mix(np.uint64(value), np.uint64(seed))) == reference.mix(value, seed)


@pytest.mark.parametrize("size", [0, 1, 2, 1000])
def test_shuffle_is_the_plain_fisher_yates(size):
    items = np.arange(size)
    kernels.shuffle(items, np.uint64(77))
    assert items.tolist() == reference.shuffled(list(range(size)), 77)
    assert sorted(items.tolist()) == list(range(size))


def _address(chunk: pa.Array) -> tuple[np.uint64, np.uint64, np.uint64]:
    bitmap, values = chunk.buffers()
    begin = np.uint64(values.address + chunk.offset * chunk.type.bit_width // 8)
    return (begin, np.uint64(bitmap.address), np.uint64(chunk.offset)) if chunk.null_count else (begin, NONE, NONE)


def _addresses(columns: list[pa.Array]) -> np.ndarray:
    return np.array([_address(column) for column in columns], np.uint64).T.copy()


def _chunks(kind: pa.DataType, low: int, high: int, null_share: float) -> list[pa.Array]:
    """Two chunks, the first a slice that begins in the middle of a bitmap byte, the second without nulls."""
    values = RNG.integers(low, high, 700).astype(kind.to_pandas_dtype())
    return [
        pa.array(values, kind, mask=RNG.random(700) < null_share).slice(13, 600),
        pa.array(values[99::-1].copy(), kind),
    ]


def _order(rows: int = 700) -> np.ndarray:
    order = np.arange(rows, dtype=np.int32)
    kernels.shuffle(order, np.uint64(1))
    return order


def _plain(chunks: list[pa.Array]) -> list:
    return [value.as_py() for chunk in chunks for value in chunk]


@pytest.mark.parametrize(
    ("kind", "code", "high"),
    [(pa.int32(), kernels.INT32, 2**31), (pa.int64(), kernels.INT64, 2**31), (pa.int64(), kernels.INT64, 2**40)],
)
def test_ids_of_any_chunk_with_nulls_filled_and_cut_into_batches(kind, code, high):
    columns = [_chunks(kind, 0, high, 0.3) for _ in range(3)]
    order, out = _order(), np.empty(3 * 700, np.int64)
    for f, chunks in enumerate(columns):
        staged, at = np.empty(700, np.int64 if high > 2**31 else np.int32), 0
        for chunk in chunks:
            assert kernels.stage_ids(code, *_address(chunk), -7, staged[at : at + len(chunk)]) == -1
            at += len(chunk)
        kernels.take_ids(order, 13, 256, f, 3, staged, out)
    expected: list[int] = []
    for begin, end in ((0, 13), (13, 269), (269, 525), (525, 700)):
        for chunks in columns:
            values = [_plain(chunks)[row] for row in order[begin:end]]
            expected += [-7 if value is None else value for value in values]
    assert out.tolist() == expected


@pytest.mark.parametrize("null", [3, None])
def test_stage_ids_points_at_the_first_negative_id(null):
    ids = pa.array([5, null, -7, 3, -7, -2, 4])
    for out in (np.empty(7, np.int64), np.empty(7, np.int32)):
        assert kernels.stage_ids(kernels.INT64, *_address(ids), -7, out) == 5
        assert kernels.stage_ids(kernels.INT64, *_address(ids), -1, out) == 2


@pytest.mark.parametrize("null", [3, None])
@pytest.mark.parametrize("wide", [2**31, -(2**31) - 1, 2**40])
def test_stage_ids_says_what_does_not_fit_32_bits(wide, null):
    ids = pa.array([5, null, wide])
    assert kernels.stage_ids(kernels.INT64, *_address(ids), -1, np.empty(3, np.int32)) == kernels.TOO_WIDE


@pytest.mark.parametrize("transform", ["log1p", "none", "standardise"])
@pytest.mark.parametrize(
    ("kind", "code"),
    [
        (pa.int32(), kernels.INT32),
        (pa.int64(), kernels.INT64),
        (pa.float32(), kernels.FLOAT32),
        (pa.float64(), kernels.FLOAT64),
    ],
)
def test_dense_values_are_transformed_and_nulls_filled(kind, code, transform):
    chunks = _chunks(kind, -3, 100_000, 0.3)
    order, staged, out = _order(), np.empty((700, 1), np.float32), np.empty((700, 1), np.float32)
    mean, scale = (4000.0, 0.25) if transform == "standardise" else (0.0, 1.0)
    way = kernels.LOG1P if transform == "log1p" else kernels.AFFINE
    at = 0
    for chunk in chunks:
        arguments = (way, kernels.LOG1P_TABLE, np.array([mean]), np.array([scale]), staged[at : at + len(chunk)])
        assert kernels.stage_dense(np.array([code]), *_addresses([chunk]), *arguments) == -1
        at += len(chunk)
    kernels.take_dense(order, staged, out)
    values = [_plain(chunks)[row] for row in order]
    if transform == "log1p":
        expected = [reference.log1p(v) for v in values]
    else:
        expected = [np.float32(0 if v is None else (v - mean) * scale) for v in values]
    assert out[:, 0].tolist() == expected


def test_dense_values_of_two_columns_over_many_blocks():
    values = RNG.integers(0, 9, (2, 2000))
    out, zero, one = np.empty((2000, 2), np.float32), np.zeros(2), np.ones(2)
    arguments = (kernels.AFFINE, kernels.LOG1P_TABLE, zero, one, out)
    addresses = _addresses([pa.array(v) for v in values])
    assert kernels.stage_dense(np.full(2, kernels.INT64), *addresses, *arguments) == -1
    assert np.array_equal(out, values.T)


def test_stage_dense_points_at_nan_and_infinity():
    for bad in (np.nan, np.inf):
        chunk = pa.array(np.array([0.5, bad, 2.0]))
        arguments = (kernels.LOG1P, kernels.LOG1P_TABLE, np.zeros(1), np.ones(1), np.empty((3, 1), np.float32))
        assert kernels.stage_dense(np.array([kernels.FLOAT64]), *_addresses([chunk]), *arguments) == 1


@pytest.mark.parametrize("labels", [[0, 1, 2], [1, 0, None], [0, 0, -1]])
def test_stage_labels_points_at_what_is_neither_0_nor_1(labels):
    chunk = pa.array(labels, pa.int8())
    staged, out = np.empty(3, np.int8), np.empty(2, np.float32)
    assert kernels.stage_labels(*_address(chunk), staged) == 2
    assert kernels.stage_labels(*_address(chunk), staged[:2]) == -1
    kernels.take_labels(np.array([1, 0], np.int32), staged, out)
    assert out.tolist() == labels[1::-1]


@pytest.mark.parametrize(
    ("text", "digest"),
    [
        (b"", 0xEF46DB3751D8E999),
        (b"a", 0xD24EC4F1A98C6E5B),
        (b"abc", 0x44BC2CF5AD770999),
        (b"Nobody inspects the spammish repetition", 0xFBCEA83C8A378BF1),
    ],
)
def test_xxhash64_gives_the_published_digests(text, digest):
    assert reference.xxhash64(text) == digest
    assert _digests([text]) == [digest]


def test_xxhash64_of_every_length_is_that_of_the_plain_twin():
    texts = [RNG.bytes(size) for size in (*range(70), 1000)]
    assert _digests(texts) == [reference.xxhash64(text) for text in texts]


def _digests(texts: list[bytes]) -> list[int]:
    buffer = np.frombuffer(b"".join(texts) + b"\0", np.uint8)
    ends = np.cumsum([0, *map(len, texts)])
    sizes = [np.uint64(len(text)) for text in texts]
    places = [np.uint64(buffer.ctypes.data + end) for end in ends]
    ids = np.empty(len(texts), np.int64)
    bag_kernels.hash_strings(np.uint64(buffer.ctypes.data), ends, ids)
    digests = [int(bag_kernels.xxhash64(at, size)) for at, size in zip(places, sizes, strict=False)]
    assert ids.tolist() == [digest % 2**63 for digest in digests]
    return digests


def test_counts_of_ids_are_those_of_the_plain_twin():
    ids = RNG.zipf(1.3, 5000) % 300
    registers, keys, counts = np.zeros(64, np.uint8), np.zeros(16, np.int64), np.zeros(16, np.int64)
    sketch_kernels.count_ids(ids, 6, registers, keys, counts, np.zeros(1, np.int64))
    left = {identity: count for identity, count in zip(keys.tolist(), counts.tolist(), strict=True) if count}
    assert (registers.tolist(), left) == reference.sketch(ids.tolist(), 6, 16)


@pytest.mark.parametrize("distinct", [0, 1, 3, 1000, 20_000, 300_000])
def test_sketch_estimates_within_five_percent(distinct):
    sketch = IdSketch(["a"])
    sketch.add(0, np.repeat(np.arange(distinct) * 7919 - 50, 2))
    assert abs(sketch.distinct()["a"] - distinct) <= 0.05 * distinct


def test_frequent_ids_are_found_among_many_others_and_never_counted_too_high():
    """Half of the values are 40 ids, the other half differ: whoever counts all of them needs 100 times the memory."""
    rare = RNG.permutation(100_000) + 1000
    common = np.repeat(np.arange(40), 2 * 61 * np.arange(1, 41))
    ids = RNG.permutation(np.concatenate([common, rare]))
    sketch = IdSketch(["a"])
    for part in np.array_split(ids, 7):
        sketch.add(0, part)
    found, counts = sketch.frequent(40)["a"]
    true = np.bincount(ids)[found]
    assert np.all(counts <= true)
    assert np.all(true - counts <= len(ids) / 384)
    expected = [i for i in range(40) if 122 * (i + 1) > len(ids) / 384]
    assert set(expected) <= set(found.tolist())
    assert np.all(np.diff(counts) <= 0)


def test_frequent_ids_are_exact_while_few_differ_also_over_files():
    ids = RNG.integers(0, 60, (2, 5000)) * 1_000_003
    whole = IdSketch(["a", "b"])
    merged = IdSketch(["b"])
    for part in np.array_split(ids, 3, axis=1):
        one = IdSketch(["a", "b"])
        for column in (0, 1):
            whole.add(column, part[column].copy())
            one.add(column, part[column].copy())
        merged.merge(IdSketch.from_bytes(one.to_bytes()))
    for sketch, name, column in ((whole, "a", 0), (whole, "b", 1), (merged, "b", 1)):
        found, counts = sketch.frequent(100)[name]
        values, true = np.unique(ids[column], return_counts=True)
        assert dict(zip(found.tolist(), counts.tolist(), strict=True)) == dict(
            zip(values.tolist(), true.tolist(), strict=True)
        )


def test_merged_sketches_are_the_sketch_of_all_and_survive_bytes():
    ids = RNG.integers(0, 50_000, (2, 60_000))
    whole, left, right = (IdSketch(["a", "b"]) for _ in range(3))
    for column in (0, 1):
        whole.add(column, ids[column])
        left.add(column, ids[column, :20_000])
        right.add(column, ids[column, 20_000:])
    right = IdSketch.from_bytes(right.to_bytes())
    left.merge(right)
    assert np.array_equal(left.registers, whole.registers)


def test_nothing_is_compiled_while_batches_are_read(tmp_path, monkeypatch):
    pq.write_table(pa.table({"y": [0, 1] * 50, "x": range(100), "a": range(100), "b": ["c"] * 100}), tmp_path / "p")
    pq.write_table(pa.table({"y": [0, 1], "b": [["c"], ["d", "e"]], "w": [[1.0], [1.0, 0.5]]}), tmp_path / "q")
    used = []
    for module, names in (
        (kernels, ("stage_labels", "take_labels", "stage_dense", "take_dense", "stage_ids", "take_ids")),
        (bag_kernels, ("hash_strings", "stage_weights", "bag_sizes", "fill_bags")),
    ):
        for name in names:  # as in a process that has called none of them
            used.append(jit(getattr(module, name).py_func))
            monkeypatch.setattr(module, name, used[-1])
    kernels.warm_up()
    plain = DataConfig(label="y", dense=["x"], categorical=["a", "b"])
    bags = DataConfig(label="y", dense=[], bags=["b"], bag_weights={"b": "w"})
    for name, config in (("p", plain), ("q", bags)):
        path = str(tmp_path / name)
        stream = ParquetStream(path, batch_size=30, schema=load_schema(path, config))
        compiled = [len(kernel.signatures) for kernel in used]
        assert all(compiled)
        list(stream.batches(0))
        assert [len(kernel.signatures) for kernel in used] == compiled
