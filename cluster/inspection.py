"""What a path holds: a dataset, a run or a checkpoint."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from ..datasets.inspect import describe
from ..parameter_server import checkpoint
from .run_folder import is_run, read_metrics, read_run

MANIFEST = "manifest.json"


def inspect_path(path: str, *, verify: bool) -> tuple[str, dict[str, Any]]:
    """(run | checkpoint | dataset, what is known about it); with `verify`, `problems` lists what is damaged.

    Raises:
        ConfigError, CheckpointError, DataError: it cannot be read at all.
    """
    folder = Path(path)
    if is_run(folder):
        return "run", _run(folder, verify)
    if is_checkpoint(folder):
        return "checkpoint", _checkpoint(folder, verify)
    return "dataset", describe(path, verify=verify)


def is_checkpoint(folder: Path) -> bool:
    """Also of one that was not written to the end."""
    return (folder / MANIFEST).is_file() or folder.parent.name == "checkpoints"


def _run(folder: Path, verify: bool) -> dict[str, Any]:
    record = read_run(folder)
    metrics = read_metrics(folder)
    losses = [m for m in metrics if "loss" in m]
    evaluations = [m for m in metrics if "auc" in m or "ndcg_at_10" in m]
    checkpoints = [_checkpoint_line(path, verify) for path in sorted((folder / "checkpoints").glob("step-*"))]
    result: dict[str, Any] = {name: record.get(name) for name in ("status", "started", "generation")}
    if losses:
        result |= {"step": losses[-1]["step"], "loss": losses[-1]["loss"]}
    if evaluations:
        result |= {name: evaluations[-1][name] for name in ("auc", "ndcg_at_10") if name in evaluations[-1]}
    result["checkpoints"] = checkpoints
    if verify:
        result["problems"] = [f"{line['checkpoint']}: {line['state']}" for line in checkpoints if line["state"] != "ok"]
    return result


def _checkpoint_line(path: Path, verify: bool) -> dict[str, Any]:
    if not (path / MANIFEST).is_file():
        return {"checkpoint": path.name, "state": f"incomplete: no {MANIFEST}"}
    problems = checkpoint.verify(str(path)) if verify else []
    return {"checkpoint": path.name, "state": problems[0] if problems else "ok" if verify else "complete"}


def _checkpoint(folder: Path, verify: bool) -> dict[str, Any]:
    manifest = checkpoint.read_manifest(str(folder))
    result: dict[str, Any] = {
        "step": manifest.step,
        "blocks": manifest.blocks,
        "seed": manifest.seed,
        "bytes": sum(file.stat().st_size for file in folder.rglob("*") if file.is_file()),
        "tables": [
            {"table": t.name, "rows": t.rows, "width": t.width, "optimizer": t.optimizer.kind} for t in manifest.tables
        ],
    }
    if verify:
        result["problems"] = checkpoint.verify(str(folder))
    return result
