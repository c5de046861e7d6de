"""`embershard plan`."""

from __future__ import annotations

from typing import Annotated, Any

import typer

from .cli_options import Debug, Json, print_json
from .errors import ConfigError
from .formatting import aligned, readable_bytes

PARTS = ("worker", "shard")


def plan(
    arguments: Annotated[
        list[str], typer.Argument(metavar="[CONFIG.yaml] [key=value ...]", help="A configuration, and settings.")
    ],
    json: Json = False,
    debug: Debug = False,
) -> None:
    """Say what a run will hold, send and take, without starting it: from its settings and a few batches of its data.

    \b
    Examples:
      embershard plan criteo.yaml cluster.shards=8 cluster.workers=4
      embershard plan data.path=train/ embedding.method=memcom embedding.ratio=16 --json

    Times are measured on this machine.
    """
    from ..workers.forecast import forecast
    from . import compilation
    from .cli_train import read_configuration
    from .preparation import prepare
    from .progress import ProgressReporter

    config = read_configuration(arguments, resume=False)
    if config.data.path is None:
        raise ConfigError("data.path: nothing to plan for; give data.path=PARQUET")
    compilation.begin()
    prepare(config, ProgressReporter())
    cluster = config.cluster
    result = forecast(config.job(), blocks=config.store.blocks, shards=cluster.shards, workers=cluster.most_workers)
    for line in _lines(result):
        print(line)
    if json:
        print_json(result)


def _lines(plan: dict[str, Any]) -> list[str]:
    tables, full = readable_bytes(plan["embedding_bytes"]), readable_bytes(plan["full_embedding_bytes"])
    parts = [_part(_count(plan[f"{name}s"], name), plan[name]) for name in PARTS]
    rate = {name: readable_bytes(plan[name]["wire_bytes_per_step"] * plan["steps"] / plan["seconds"]) for name in PARTS}
    return [
        f"embeddings    {plan['embedding_parameters']:,} parameters, {tables}; full tables: {full} "
        f"(ratio {plan['compression_ratio']:.2f}); optimizer state {readable_bytes(plan['optimizer_state_bytes'])}",
        f"dense part    {plan['dense_parameters']:,} parameters",
        f"checkpoint    {readable_bytes(plan['checkpoint_bytes'])}",
        "",
        *aligned(parts, list(parts[0])),
        "",
        f"{plan['steps']:,} steps take about {_duration(plan['seconds'])}, if each of these has a machine like this, "
        f"where {plan['threads']} threads train, and its network carries {rate['worker']}/s for a worker, "
        f"{rate['shard']}/s for a shard; the busiest has {plan['shard']['busiest_over_mean']:.2f} times the mean",
    ]


def _count(number: int, what: str) -> str:
    return f"{number} {what}" if number == 1 else f"{number} {what}s"


def _part(name: str, part: dict[str, Any]) -> dict[str, Any]:
    return {
        "each of": name,
        "rows held": readable_bytes(part["table_bytes"]),
        "state held": readable_bytes(part["state_bytes"]),
        "rows a step": round(part["rows_per_step"]),
        "network a step": readable_bytes(part["wire_bytes_per_step"]),
        "ms a step": round(part["ms_per_step"], 2),
    }


def _duration(seconds: float) -> str:
    if seconds < 120:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} minutes" if seconds < 7200 else f"{seconds / 3600:.1f} hours"
