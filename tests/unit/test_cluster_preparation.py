"""What the driver does before anything is started."""

from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from embershard.cluster import compilation, preparation
from embershard.cluster.config import RunConfig
from embershard.cluster.progress import ProgressReporter
from embershard.datasets import bag_kernels, decode, window
from embershard.datasets.schema import DataConfig, DataError
from embershard.datasets.stream import ParquetStream
from embershard.datasets.synthetic import generate


@pytest.mark.parametrize("most", [1, 3])
def test_kernels_of_bags_are_compiled_for_bags_alone(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, most: int
) -> None:
    """Plain data neither loads them before training nor asks for one of them while it is read."""
    path = str(tmp_path / "log")
    generate(path, rows=100, cardinalities=(10, 20), multi_hot=(most,), dense=2)
    compiled = []
    monkeypatch.setattr(bag_kernels, "warm_up", lambda: compiled.append("bags"))
    for room in (compilation.dataset_kernels, compilation.contents, compilation.worker_kernels):
        monkeypatch.setattr(room, "warm_up", lambda *_: compiled.append("others"))
    with ProgressReporter() as progress:
        preparation.prepare(RunConfig(data=DataConfig(path=path)), progress)
    assert compiled == ["bags"] * (most > 1) + ["others"] * 3
    if most == 1:
        for reader in (decode, window):
            monkeypatch.delattr(reader, "bag_kernels")
        assert sum(batch.rows for batch in ParquetStream(path, batch_size=30).batches(0)) == 100


def test_ratings_are_refused_before_anything_is_loaded(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "ratings.parquet"
    pq.write_table(pa.table({"rating": [4, 5], "user": [1, 2]}), path)
    monkeypatch.setattr(compilation, "finish", lambda: pytest.fail("too late"))
    config = RunConfig(data=DataConfig(path=str(path), label="rating", categorical=["user"]))
    with ProgressReporter() as progress, pytest.raises(DataError, match="row 0: found 4; labels must be 0 or 1"):
        preparation.prepare(config, progress)
