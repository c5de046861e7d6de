"""`embershard train` and `embershard evaluate`."""

from __future__ import annotations

import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any

import typer

from .cli_options import Debug, Json, print_json
from .errors import ConfigError
from .formatting import readable_bytes


def train(
    arguments: Annotated[
        list[str] | None,
        typer.Argument(
            metavar="[CONFIG.yaml | RUN] [key=value ...]", help="A configuration or a run's folder, and settings."
        ),
    ] = None,
    resume: Annotated[
        bool, typer.Option("--resume", help="Go on from the run's newest checkpoint that verifies.")
    ] = False,
    json: Json = False,
    debug: Debug = False,
) -> None:
    """Train a model on sharded tables. Without arguments: a run on generated data, on this machine.

    \b
    Examples:
      embershard train
      embershard train data.path=train/ data.eval_path=day_23/
      embershard train criteo.yaml train.epochs=2 cluster.shards=4
      embershard train runs/20260101-120000-train --resume

    Any setting can also stand in the environment: EMBERSHARD_TRAIN__EPOCHS=2.
    """
    from . import compilation
    from .builtin import generated_schema, with_generated_data
    from .launch import Trainer
    from .preparation import planned_methods
    from .progress import ProgressReporter

    progress = ProgressReporter()
    config = read_configuration(arguments or [], resume=resume)
    compilation.begin()
    if config.data.path is None:
        planned_methods(config, generated_schema())  # what is wrong with them is said before data is generated
        config = with_generated_data(config, progress)
    summary = Trainer(config, resume=resume, progress=progress).fit()
    _print_summary(summary)
    if json:
        print_json(summary)


def evaluate(
    target: Annotated[Path, typer.Argument(metavar="CHECKPOINT_OR_RUN", help="A checkpoint, or a run: its newest.")],
    data: Annotated[str | None, typer.Option(help="Parquet to score; by default what the run evaluated on.")] = None,
    predictions: Annotated[
        Path | None, typer.Option(help="Write label and prediction per row to this Parquet file.")
    ] = None,
    json: Json = False,
    debug: Debug = False,
) -> None:
    """Score a dataset with a trained model, in this process.

    \b
    Examples:
      embershard evaluate runs/20260101-120000-train
      embershard evaluate runs/a/checkpoints/step-000001000 --data day_23/ --predictions scores.parquet
    """
    from .evaluation import evaluate_target

    result = evaluate_target(target, data, predictions)
    for name, value in result.items():
        print(f"{name:<20} {value:.6f}" if isinstance(value, float) else f"{name:<20} {value}")
    if json:
        print_json(result)


def read_configuration(arguments: list[str], *, resume: bool) -> Any:
    """The RunConfig of CONFIG and key=value arguments; the first is the CONFIG only if it has no `=`.

    A run's folder stands for its config.yaml; so does run.dir with --resume.
    """
    from .config import RunConfig, load_run
    from .run_folder import CONFIG_FILE

    chosen = None if not arguments or "=" in arguments[0] else Path(arguments[0])
    assignments = arguments[1:] if chosen else arguments
    if chosen is not None and chosen.is_dir():
        if not (chosen / CONFIG_FILE).is_file():
            raise ConfigError(f"{chosen}: a folder without {CONFIG_FILE}; give a YAML file or the folder of a run")
        if not resume:
            raise ConfigError(
                f"{chosen}: already a run; add --resume to go on, or give {chosen / CONFIG_FILE} run.dir=NEW"
            )
        return load_run(chosen, [*assignments, f"run.dir={chosen}"])
    config = RunConfig.load(chosen, *assignments)
    if resume and config.run.dir is None:
        raise ConfigError("--resume: which run? give its folder: embershard train RUN --resume")
    if resume and chosen is None and (config.run_dir / CONFIG_FILE).is_file():
        return load_run(config.run_dir, assignments)
    return config


def _print_summary(summary: Mapping[str, Any]) -> None:
    run = summary["run_dir"]
    print()
    print(f"{summary['steps']:,} steps, {summary['samples']:,} samples in {summary['seconds']:.1f} s", end="")
    print(
        f" ({summary['samples_per_second']:,.0f} samples/s), {summary['shards']} shards, {summary['workers']} workers"
    )
    print(
        f"embeddings: {summary['embedding_parameters']:,} parameters, {readable_bytes(summary['embedding_bytes'])}; "
        f"full tables: {readable_bytes(summary['full_embedding_bytes'])} (ratio {summary['compression_ratio']:.2f})"
    )
    print(f"train loss {summary['train_loss']:.4f}")
    if result := summary.get("eval"):
        best = summary.get("best_auc")
        possible = "" if best is None else f" (best possible on this data: {best:.4f})"
        if "auc" in result:
            print(f"AUC {result['auc']:.4f}{possible}, logloss {result['logloss']:.4f}", end="")
            print(f", normalized entropy {result['normalized_entropy']:.4f}, {result['samples']:,} samples")
        else:
            print(f"nDCG@10 {result['ndcg_at_10']:.4f}, {result['samples']:,} people")
    if checkpoint := summary.get("checkpoint"):
        print(f"checkpoint {checkpoint}")
    print(f"\nlook at it:     tensorboard --logdir {run}/tb")
    print(f"score again:    embershard evaluate {run}")
    print(f"what is in it:  embershard inspect {run}")
    sys.stdout.flush()
