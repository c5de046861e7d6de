"""The run folder: one writer, generations, metrics that survive a kill."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
from embershard.cluster.errors import ConfigError
from embershard.cluster.run_folder import RunFolder, read_metrics, read_run


def test_generations_grow_and_an_existing_run_needs_resume(tmp_path: Path) -> None:
    folder = RunFolder.open(tmp_path / "run", resume=False)
    assert folder.generation == 1
    assert read_run(folder.path)["status"] == "starting"
    folder.close("finished")
    with pytest.raises(ConfigError, match="already holds a run; add --resume"):
        RunFolder.open(tmp_path / "run", resume=False)
    again = RunFolder.open(tmp_path / "run", resume=True)
    assert again.generation == 2
    again.close("finished")
    assert read_run(again.path)["lock"] is None


def test_resume_needs_a_run(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="holds no run"):
        RunFolder.open(tmp_path / "absent", resume=True)
    assert not (tmp_path / "absent").exists()


def test_a_folder_of_other_things_is_left_alone(tmp_path: Path) -> None:
    (tmp_path / "thesis.tex").write_text("x")
    with pytest.raises(ConfigError, match=r"thesis\.tex"):
        RunFolder.open(tmp_path, resume=False)


def test_one_writer(tmp_path: Path) -> None:
    """Whoever takes up a running run is told who has it; the lock goes with its holder, however it ends."""
    RunFolder.open(tmp_path / "run", resume=False).close("finished")
    code = (
        "import sys, pathlib; from embershard.cluster.run_folder import RunFolder\n"
        f"folder = RunFolder.open(pathlib.Path({str(tmp_path / 'run')!r}), resume=True)\n"
        "print('held', flush=True); sys.stdin.read()"
    )
    holder = subprocess.Popen([sys.executable, "-c", code], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
    assert holder.stdout is not None and holder.stdout.readline() == "held\n"
    with pytest.raises(ConfigError, match=f"being written by process {holder.pid} on "):
        RunFolder.open(tmp_path / "run", resume=True)
    holder.kill()
    holder.wait()
    folder = RunFolder.open(tmp_path / "run", resume=True)
    assert folder.generation == 3
    folder.close("finished")


def test_metrics(tmp_path: Path) -> None:
    folder = RunFolder.open(tmp_path / "run", resume=False)
    folder.record({"step": 1, "loss": 0.5})
    folder.record({"step": 2, "eval": {"auc": 0.7}})
    folder.close("finished")
    with (folder.path / "metrics.jsonl").open("a") as file:
        file.write('{"step": 3, "lo')  # a kill in the middle of a line
    assert [(m["step"], m["generation"]) for m in read_metrics(folder.path)] == [(1, 1), (2, 1)]
    assert any((folder.path / "tb").iterdir())


def test_a_damaged_record(tmp_path: Path) -> None:
    folder = RunFolder.open(tmp_path / "run", resume=False)
    folder.close("finished")
    (folder.path / "run.json").write_text(json.dumps({"generation": 1})[:-3])
    with pytest.raises(ConfigError, match="damaged"):
        RunFolder.open(tmp_path / "run", resume=True)
