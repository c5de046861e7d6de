"""Which checkpoint and which data `embershard evaluate` and `export` mean."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from ..parameter_server import checkpoint
from ..workers.evaluate import evaluate
from .config import RunConfig, absolute, load_run
from .errors import ConfigError
from .inspection import is_checkpoint
from .run_folder import is_run


def evaluate_target(target: Path, data: str | None, predictions: Path | None) -> dict[str, Any]:
    """Scores a checkpoint, or the newest of a run that verifies, on `data` or on what its run evaluated on.

    Raises:
        ConfigError: nothing to score, or nothing to score it on. CheckpointError, DataError: either is damaged.
    """
    checkpoint_path, config = find_checkpoint(target)
    path = absolute(data) or config.data.eval_path
    if path is None:
        raise ConfigError(f"{target}: its run evaluated on nothing; give --data PARQUET")
    return evaluate(
        checkpoint_path,
        path,
        batch_size=config.data.eval_batch_size,
        missing_id=config.data.missing_id,
        predictions=None if predictions is None else str(predictions),
    )


def export_target(target: Path, output: Path, format: str) -> dict[str, Any]:
    """Exports a checkpoint, or the newest of a run that verifies, and compares it on what its run evaluated on.

    Raises:
        ConfigError: nothing to export, or an unknown format. ExportError, CheckpointError: see `workers.export.export`.
    """
    from ..workers.export import export
    from ..workers.export_files import FORMATS

    if format not in FORMATS:
        raise ConfigError(f"--format: {format!r} is not one of {', '.join(FORMATS)}")
    path, config = find_checkpoint(target)
    data = absolute(config.data.eval_path)
    there = data is not None and ("://" in data or Path(data).exists())
    return export(path, str(output), format=format, data=data if there else None, missing_id=config.data.missing_id)


def find_checkpoint(target: Path) -> tuple[str, RunConfig]:
    """A checkpoint, or the newest of a run that verifies, and the configuration of its run (the default without one).

    Raises:
        ConfigError: there is nothing, or the run has none.
    """
    if not target.exists():
        raise ConfigError(f"{target}: no such run or checkpoint")
    if not is_run(target) and not is_checkpoint(target):
        raise ConfigError(f"{target}: neither a run nor a checkpoint")
    run = target if is_run(target) else target.parent.parent
    config = load_run(run) if is_run(run) else RunConfig.load()
    return _newest(target) if is_run(target) else str(target), config


def _newest(run: Path) -> str:
    found, skipped = checkpoint.latest(str(run / "checkpoints"))
    if found is None:
        why = f" ({skipped[0]})" if skipped else ""
        raise ConfigError(f"{run}: no checkpoint that verifies{why}")
    return found
