"""The stream in a DataLoader, alone and over worker processes."""

import subprocess
import sys

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from embershard.datasets.files import load_schema
from embershard.datasets.schema import DataConfig
from embershard.datasets.synthetic import generate
from embershard.datasets.torch_dataset import ParquetDataset
from torch.utils.data import DataLoader


@pytest.fixture
def log(tmp_path):
    rows = pa.table({"label": np.arange(200) % 2, "i1": np.arange(200), "c1": np.arange(200)})
    pq.write_table(rows, tmp_path / "a.parquet", row_group_size=10)
    return str(tmp_path)


def schema(path, **columns):
    return load_schema(path, DataConfig(label="label", dense=["i1"], **columns))


@pytest.mark.parametrize("processes", [0, 2])
def test_every_row_of_every_rank_once(log, processes):
    seen, orders = [], []
    for rank in range(2):
        dataset = ParquetDataset(log, batch_size=16, schema=schema(log, categorical=["c1"]), rank=rank, workers=2)
        for batch in DataLoader(dataset, batch_size=None, num_workers=processes):
            assert len(batch["labels"]) <= 16
            assert batch["dense"].shape == (len(batch["labels"]), 1)
            assert batch["dense"].dtype == torch.float32
            seen += batch["ids"]["c1"].tolist()
    assert sorted(seen) == list(range(200))
    assert seen != sorted(seen)
    dataset.set_epoch(1)
    for batch in dataset:
        orders += batch["ids"]["c1"].tolist()
    assert orders != seen[-len(orders) :]


def test_bags_and_weights(tmp_path):
    values = {"label": [0, 1], "i1": [1, 2], "t": [[4, 5], [6]], "u": [[1], []], "w": [[0.5, 0.25], [2.0]]}
    pq.write_table(pa.table(values), tmp_path / "a.parquet")
    columns = schema(str(tmp_path), bags=["t", "u"], bag_weights={"t": "w"})
    (batch,) = ParquetDataset(str(tmp_path), batch_size=2, schema=columns, shuffle=False)
    assert {name: [part.tolist() for part in parts] for name, parts in batch["ids"].items()} == {
        "t": [[4, 5, 6], [0, 2, 3]],
        "u": [[1], [0, 1, 1]],
    }
    assert {name: part.tolist() for name, part in batch["weights"].items()} == {"t": [0.5, 0.25, 2.0], "u": [1.0]}


def test_the_room_is_imported_without_torch(tmp_path):
    generate(str(tmp_path / "log"), rows=100, cardinalities=(5,), dense=1)
    code = (
        "import sys, embershard as es; s = es.ParquetStream(sys.argv[1], batch_size=8); "
        "assert sum(b.rows for b in s.batches(0)) == 100; assert 'torch' not in sys.modules; es.ParquetDataset"
    )
    subprocess.run([sys.executable, "-c", code, str(tmp_path / "log")], check=True)
