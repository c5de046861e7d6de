"""The contenders of `embershard bench stream` read all rows and report what the command prints."""

import numpy as np
import pytest
from embershard.cluster.bench import bench_stream
from embershard.datasets import bench
from embershard.datasets.synthetic import generate


@pytest.mark.parametrize("name", ["ours", "pyarrow"])
def test_contenders_count_every_row(tmp_path, name):
    generate(str(tmp_path / "log"), rows=3000, cardinalities=(10, 20), dense=2)
    size = sum(path.stat().st_size for path in (tmp_path / "log").glob("*.parquet"))
    readings = bench.CONTENDERS[name](path=str(tmp_path / "log"))
    assert readings["mb_per_second"] / readings["rows_per_second"] == pytest.approx(size / 1e6 / 3000)
    assert readings["peak_pss_mb"] > 10
    assert readings["cpu_us_per_row"] > 0


def test_memory_that_is_held_is_seen():
    with bench.Memory() as memory:
        before = bench.resident()
        held = np.ones(40_000_000)
        memory.samples.append(bench.resident())
    assert memory.readings()["peak_pss_mb"] * 1e6 - before > 0.9 * held.nbytes


@pytest.mark.parametrize("name", ["convert", "pyarrow_csv"])
def test_converters_count_every_row_of_the_text(tmp_path, monkeypatch, name):
    monkeypatch.setattr(bench, "KAGGLE", (10,) * 26)
    bench.write_text(tmp_path / "log.tsv", 2000)
    size = (tmp_path / "log.tsv").stat().st_size
    readings = bench.CONTENDERS[name](text=str(tmp_path / "log.tsv"))
    assert readings["mb_per_second"] / readings["rows_per_second"] == pytest.approx(size / 1e6 / 2000)
    assert readings["peak_pss_mb"] > 10


def test_the_command_takes_paired_ratios(tmp_path, monkeypatch):
    monkeypatch.setattr("embershard.cluster.bench.TEXT_ROWS", 1000)
    generate(str(tmp_path / "log"), rows=3000, cardinalities=(10, 20), dense=2)
    result = bench_stream(1, str(tmp_path / "log"), 0, False, lambda line: None)
    for above, below in (("ours", "pyarrow"), ("convert", "pyarrow_csv")):
        rates = [result["readings"][f"{name}.rows_per_second"] for name in (above, below)]
        assert result["ratios"][f"{above}_over_{below}"] == rates[0] / rates[1]
