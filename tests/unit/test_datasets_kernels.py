"""Kernels against their plain twins."""

import sys
from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest
from embershard.datasets import kernels
from embershard.datasets.sketch import DistinctSketch

sys.path.insert(0, str(Path(__file__).parents[1] / "oracles"))
import datasets_reference as reference

RNG = np.random.default_rng(5)


def test_mix_is_splitmix64():
    for value, seed in RNG.integers(0, 2**63, (50, 2)).tolist():
        assert int(kernels.mix(np.uint64(value), np.uint64(seed))) == reference.mix(value, seed)


@pytest.mark.parametrize("size", [0, 1, 2, 1000])
def test_shuffle_is_the_plain_fisher_yates(size):
    items = np.arange(size)
    kernels.shuffle(items, np.uint64(77))
    assert items.tolist() == reference.shuffled(list(range(size)), 77)
    assert sorted(items.tolist()) == list(range(size))


def test_references_name_chunk_and_row():
    assert kernels.references(np.array([2, 0, 1])).tolist() == [0, 1, 2 << 32]


def _addresses(chunks: list[pa.Array]) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    data, valid, bit = np.zeros((3, 1, len(chunks)), np.uint64)
    for c, chunk in enumerate(chunks):
        bitmap, values = chunk.buffers()
        data[0, c] = values.address + chunk.offset * chunk.type.bit_width // 8
        valid[0, c], bit[0, c] = (bitmap.address, chunk.offset) if chunk.null_count else (0, 0)
    return data, valid, bit


def _chunks(kind: pa.DataType, low: int, high: int, null_share: float) -> list[pa.Array]:
    """Two chunks, the first a slice that begins in the middle of a bitmap byte, the second without nulls."""
    values = RNG.integers(low, high, 100).astype(kind.to_pandas_dtype())
    return [
        pa.array(values, kind, mask=RNG.random(100) < null_share).slice(13, 60),
        pa.array(values[::-1].copy(), kind),
    ]


@pytest.mark.parametrize(("kind", "code"), [(pa.int32(), kernels.INT32), (pa.int64(), kernels.INT64)])
def test_gather_ids_reads_any_chunk_fills_nulls_and_cuts_batches(kind, code):
    columns = [_chunks(kind, -5, 2**30, 0.3) for _ in range(3)]
    rows = kernels.references(np.array([60, 100]))
    kernels.shuffle(rows, np.uint64(1))
    out = np.empty(3 * 160, np.int64)
    addresses = [np.concatenate(parts) for parts in zip(*map(_addresses, columns), strict=True)]
    kernels.gather_ids(rows, 13, 64, np.full(3, code), *addresses, -7, out)
    expected: list[int] = []
    for begin, end in ((0, 13), (13, 77), (77, 141), (141, 160)):
        for chunks in columns:
            values = [chunks[r >> 32][r & 0xFFFFFFFF].as_py() for r in rows[begin:end].tolist()]
            expected += [-7 if value is None else value for value in values]
    assert out.tolist() == expected


@pytest.mark.parametrize("log1p", [True, False])
@pytest.mark.parametrize(
    ("kind", "code"),
    [
        (pa.int32(), kernels.INT32),
        (pa.int64(), kernels.INT64),
        (pa.float32(), kernels.FLOAT32),
        (pa.float64(), kernels.FLOAT64),
    ],
)
def test_gather_dense_transforms_and_fills_nulls(kind, code, log1p):
    chunks = _chunks(kind, -3, 10_000, 0.3)
    rows = kernels.references(np.array([60, 100]))
    out = np.empty((160, 1), np.float32)
    assert kernels.gather_dense(rows, np.array([code]), *_addresses(chunks), log1p, kernels.LOG1P_TABLE, out) == -1
    values = [chunks[r >> 32][r & 0xFFFFFFFF].as_py() for r in rows.tolist()]
    expected = [reference.log1p(v) if log1p else np.float32(v or 0) for v in values]
    assert out[:, 0].tolist() == expected


def test_gather_dense_points_at_nan_and_infinity():
    for bad in (np.nan, np.inf):
        chunk = pa.array(np.array([0.5, bad, 2.0]))
        rows, out = kernels.references(np.array([3])), np.empty((3, 1), np.float32)
        found = kernels.gather_dense(
            rows, np.array([kernels.FLOAT64]), *_addresses([chunk]), True, kernels.LOG1P_TABLE, out
        )
        assert found == 1


@pytest.mark.parametrize("labels", [[0, 1, 2], [1, 0, None], [0, 0, -1]])
def test_gather_labels_points_at_what_is_neither_0_nor_1(labels):
    chunk = pa.array(labels, pa.int8())
    data, valid, bit = _addresses([chunk])
    rows, out = kernels.references(np.array([3])), np.empty(3, np.float32)
    assert kernels.gather_labels(rows, data[0], valid[0], bit[0], out) == 2
    assert kernels.gather_labels(rows[:2], data[0], valid[0], bit[0], out) == -1
    assert out[:2].tolist() == labels[:2]


@pytest.mark.parametrize("distinct", [0, 1, 3, 1000, 20_000, 300_000])
def test_sketch_estimates_within_five_percent(distinct):
    ids = np.repeat(np.arange(distinct) * 7919 - 50, 2).reshape(1, -1)
    present = np.ones(ids.shape, np.bool_)
    sketch = DistinctSketch(["a"])
    sketch.add(ids, present)
    assert abs(sketch.estimates()["a"] - distinct) <= 0.05 * distinct
    sketch.add(ids + (1 << 40), ~present)
    assert abs(sketch.estimates()["a"] - distinct) <= 0.05 * distinct


def test_merged_sketches_are_the_sketch_of_all_and_survive_bytes():
    ids = RNG.integers(0, 50_000, (2, 60_000))
    present = RNG.random(ids.shape) < 0.9
    whole, left, right = (DistinctSketch(["a", "b"]) for _ in range(3))
    whole.add(ids, present)
    left.add(ids[:, :20_000].copy(), present[:, :20_000].copy())
    right.add(ids[:, 20_000:].copy(), present[:, 20_000:].copy())
    right = DistinctSketch.from_bytes(right.to_bytes())
    left.merge(right)
    assert np.array_equal(left.registers, whole.registers)


def test_warm_up_leaves_nothing_to_compile(tmp_path):
    from embershard.datasets.stream import ParquetStream
    from embershard.datasets.synthetic import generate

    generate(str(tmp_path / "log"), rows=100, cardinalities=(10, 20), dense=2)
    kernels.warm_up()
    used = [kernels.shuffle, kernels.references, kernels.gather_labels, kernels.gather_dense, kernels.gather_ids]
    compiled = [len(kernel.signatures) for kernel in used]
    list(ParquetStream(str(tmp_path / "log"), batch_size=30).batches(0))
    assert [len(kernel.signatures) for kernel in used] == compiled
