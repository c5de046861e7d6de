"""The bench of training: MLET in place of single-layer tables, on the same batches."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from embershard.workers import bench
from embershard.workers.embeddings.mlet import MLET


@pytest.mark.parametrize("collapsed", [None, 2])
def test_what_is_trained_is_what_was_asked_for(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, collapsed: int | None
) -> None:
    made: list[Any] = []

    class Watched(bench.Network):
        def __init__(self, *arguments: Any) -> None:
            super().__init__(*arguments)
            made.append(self)

    monkeypatch.setattr(bench, "Network", Watched)
    bench.write_batches(tmp_path / "batches.npz", batch=8, steps=2, row_cap=50)
    threads = torch.get_num_threads()
    readings = bench.ours(str(tmp_path / "batches.npz"), 8, 1, 0, "bounded", collapsed=collapsed)
    torch.set_num_threads(threads)
    assert readings["samples_per_second"] > 0 and readings["worker_cpu_ms_per_step"] > 0
    for method in made[0].embeddings.methods:
        assert method.tables[0].width == 8
        assert isinstance(method, MLET) == (collapsed is not None) and method.feature.dim == (collapsed or 8)
