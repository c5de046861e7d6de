"""`embershard export` from the command line, on a run that was trained without Ray."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest
from embershard.cluster.cli import main
from embershard.cluster.config import RunConfig
from embershard.datasets.synthetic import generate
from embershard.parameter_server.store import Store
from embershard.workers.trainer import train


@pytest.fixture(scope="module")
def run_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("run")
    for name, rows in (("train", 500), ("eval", 300)):
        generate(str(folder / name), rows=rows, seed=rows, cardinalities=(7, 300), dense=2)
    config = RunConfig.load(
        None,
        f"data.path={folder / 'train'}",
        f"data.eval_path={folder / 'eval'}",
        "embedding.method=hash",
        "embedding.ratio=4",
        "model.top=[8]",
        "model.bottom=[8]",
        "train.threads=1",
        f"run.dir={folder}",
    )
    with Store.open(blocks=20) as store:
        train(config.job(), store, directory=str(folder / "checkpoints"))
    (folder / "config.yaml").write_text(config.to_yaml())
    (folder / "run.json").write_text("{}")
    return folder


def run(monkeypatch: pytest.MonkeyPatch, *arguments: str) -> int:
    monkeypatch.setattr(sys, "argv", ["embershard", *arguments])
    try:
        main()
    except SystemExit as end:
        return int(end.code or 0)
    return 0


def test_a_run_is_exported_and_compared_on_its_evaluation_data(
    run_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    output = str(tmp_path / "model.safetensors")
    assert run(monkeypatch, "export", str(run_folder), output, "--json") == 0
    lines = capsys.readouterr().out.splitlines()
    result = json.loads(lines[-1])
    assert result["rows_compared"] == 300 and result["file_bytes"] == Path(output).stat().st_size
    assert any(line.startswith("AUC") for line in lines) and any("on one thread" in line for line in lines)
    assert run(monkeypatch, "export", str(run_folder), output) == 2  # it exists
    assert capsys.readouterr().err == f"embershard: {output}: exists already; give another name or remove it\n"


def test_an_unknown_format_and_a_run_without_a_checkpoint(
    run_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run(monkeypatch, "export", str(run_folder), str(tmp_path / "model"), "--format", "tflite") == 2
    assert "--format: 'tflite' is not one of safetensors, torch, onnx" in capsys.readouterr().err
    (tmp_path / "run.json").write_text("{}")
    (tmp_path / "config.yaml").write_text((run_folder / "config.yaml").read_text())
    assert run(monkeypatch, "export", str(tmp_path), str(tmp_path / "model")) == 2
    assert "no checkpoint that verifies" in capsys.readouterr().err
