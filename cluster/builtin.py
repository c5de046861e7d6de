"""The run that needs nothing: a generated click log whose best possible AUC is known."""

from __future__ import annotations

from pathlib import Path

from ..datasets.schema import CategoricalColumn, DenseColumn, Schema
from ..datasets.synthetic import CARDINALITIES, DENSE, generate
from .config import RunConfig
from .progress import ProgressReporter

TRAIN_ROWS = 300_000
EVAL_ROWS = 50_000


def with_generated_data(config: RunConfig, progress: ProgressReporter) -> RunConfig:
    """The configuration with data.path and data.eval_path set to logs in RUN/data, generated where they are not yet."""
    folder = config.run_dir / "data"
    for name, rows, seed in (("train", TRAIN_ROWS, 2 * config.seed), ("eval", EVAL_ROWS, 2 * config.seed + 1)):
        if not (folder / name).exists():
            progress.note(f"generating {rows:,} rows in {folder / name}")
            _generate(folder / name, rows, seed)
    paths = {"path": str(folder / "train"), "eval_path": str(folder / "eval")}
    run = config.run.model_copy(update={"dir": str(config.run_dir)})
    return config.model_copy(update={"data": config.data.model_copy(update=paths), "run": run})


def generated_schema() -> Schema:
    """The columns of these logs, before they exist."""
    columns = [CategoricalColumn(name=f"c{f + 1}", cardinality=size) for f, size in enumerate(CARDINALITIES)]
    dense = [DenseColumn(name=f"i{k + 1}") for k in range(DENSE)]
    return Schema(source="generated", label="label", dense=dense, categorical=columns, rows=TRAIN_ROWS)


def _generate(output: Path, rows: int, seed: int) -> None:
    generate(str(output), rows=rows, seed=seed)
