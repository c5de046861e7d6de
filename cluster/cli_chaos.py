"""`embershard chaos`: the arguments, and how a run's judgement is printed."""

from __future__ import annotations

import time
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any

import typer

from .cli_options import Debug, Json, print_json
from .errors import ConfigError, RunFailed


def chaos(
    minutes: Annotated[float, typer.Option(min=0.1, help="How long faults are injected.")] = 1.0,
    seed: Annotated[int, typer.Option(min=0, help="Of the faults and of the gradients.")] = 0,
    output: Annotated[Path | None, typer.Option(help="Folder of the run; by default runs/DATE-chaos.")] = None,
    mutant: Annotated[str | None, typer.Option(help="Switch one guard off: the run must then fail.")] = None,
    check: Annotated[Path | None, typer.Option(help="Only compare again what the run in this folder left.")] = None,
    json: Json = False,
    debug: Debug = False,
) -> None:
    """Kill, stop, cut off and rescale shards at random under a job that pushes, and count every push at the end.

    \b
    Examples:
      embershard chaos --minutes 5 --seed 1 --json
      embershard chaos --check runs/20260101-120000-chaos --minutes 5
      embershard chaos --minutes 2 --mutant ledger

    Runs on a Ray of its own on this machine. Fails if a row is lost or doubled, if a kind of fault did not occur, or if
    there were fewer than six faults a minute.
    """
    from ..parameter_server.failpoints import GUARDS

    if mutant is not None and mutant not in GUARDS:
        raise ConfigError(f"--mutant: {mutant!r} is no guard; there are {', '.join(sorted(GUARDS))}")
    folder = check or output or Path(f"runs/{time.strftime('%Y%m%d-%H%M%S')}-chaos")
    if check is not None:
        from .chaos_history import judge

        result = judge(folder, minutes)
    else:
        from .chaos import run_chaos
        from .progress import ProgressReporter

        with ProgressReporter() as progress:
            result = run_chaos(folder, minutes, seed, mutant, progress)
    result = {"run_dir": str(folder)} | result
    _print(result)
    if json:
        print_json(result)
    if result["problems"]:
        again = f"embershard chaos --check {folder} --minutes {minutes:g}"
        raise RunFailed(f"{'; '.join(result['problems'])}; to compare again: {again}")


def _print(result: Mapping[str, Any]) -> None:
    faults = ", ".join(f"{count} {kind}" for kind, count in sorted(result["faults_injected"].items())) or "none"
    print(f"faults: {faults}; longest time without an acknowledged push {result['longest_stall_seconds']:.1f} s")
    print(
        f"{result['pushes_acknowledged']:,} pushes acknowledged; {result['rows_compared']:,} of "
        f"{result['rows_touched']:,} rows compared: {result['rows_lost']} lost, {result['rows_doubled']} doubled"
    )
