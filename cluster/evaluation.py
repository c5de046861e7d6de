"""Which checkpoint and which data `embershard evaluate` means."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from ..parameter_server import checkpoint
from ..workers.evaluate import evaluate
from .config import RunConfig, absolute, load_run
from .errors import ConfigError
from .run_folder import is_run


def evaluate_target(target: Path, data: str | None, predictions: Path | None) -> dict[str, Any]:
    """Scores a checkpoint, or the newest of a run that verifies, on `data` or on what its run evaluated on.

    Raises:
        ConfigError: nothing to score, or nothing to score it on. CheckpointError, DataError: either is damaged.
    """
    run = target if is_run(target) else target.parent.parent
    config = load_run(run) if is_run(run) else RunConfig.load()
    path = absolute(data) or config.data.eval_path
    if path is None:
        raise ConfigError(f"{target}: its run evaluated on nothing; give --data PARQUET")
    return evaluate(
        _newest(target) if is_run(target) else str(target),
        path,
        batch_size=config.data.eval_batch_size,
        missing_id=config.data.missing_id,
        predictions=None if predictions is None else str(predictions),
    )


def _newest(run: Path) -> str:
    found, skipped = checkpoint.latest(str(run / "checkpoints"))
    if found is None:
        why = f" ({skipped[0]})" if skipped else ""
        raise ConfigError(f"{run}: no checkpoint that verifies{why}")
    return found
