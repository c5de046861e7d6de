"""The main job's quality on real click logs, with default settings. Skips where the sample is absent."""

from __future__ import annotations

import statistics
from pathlib import Path

import pytest
import torch
from embershard.datasets.criteo import convert_criteo
from embershard.datasets.schema import DataConfig
from embershard.parameter_server.store import Store
from embershard.workers.job import TrainingJob
from embershard.workers.trainer import train

SAMPLE = Path(__file__).resolve().parents[2].parent / "shared" / "data" / "criteo-tb"


@pytest.mark.skipif(not SAMPLE.is_dir(), reason="no ../shared/data/criteo-tb beside this checkout")
def test_criteo_reaches_the_stated_auc_with_default_settings(tmp_path: Path) -> None:
    """0.68 as the median of 3 seeds (0.71 was reached); one epoch over parts 0 to 4, evaluated on part 5."""
    parts = [str(SAMPLE / f"part-{i}.tsv.gz") for i in range(6)]
    convert_criteo(parts[:5], str(tmp_path / "train"))
    convert_criteo(parts[5:], str(tmp_path / "eval"))
    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # beside other work on a small machine, two threads mostly wait for each other
    found = []
    for seed in range(3):
        data = DataConfig(path=str(tmp_path / "train"), eval_path=str(tmp_path / "eval"))
        with Store.open(shards=2, seed=seed) as store:
            summary = train(TrainingJob(data=data, seed=seed), store, directory=str(tmp_path / f"run-{seed}"))
        found.append(summary["eval"]["auc"])
    torch.set_num_threads(threads)
    assert statistics.median(found) >= 0.68, found
