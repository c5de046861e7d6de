"""`embershard scale` and `embershard status`: a run as seen from another terminal."""

from __future__ import annotations

import os
import secrets
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated, Any

import typer

from .cli_options import Debug, Json, print_json
from .errors import ConfigError, RunFailed

Run = Annotated[Path, typer.Argument(metavar="RUN", help="The folder of the run.")]
FOLLOW_SECONDS = 0.5


def scale(
    run: Run,
    shards: Annotated[int | None, typer.Option("--shards", min=1, help="How many shards the run is to have.")] = None,
    workers: Annotated[
        int | None, typer.Option("--workers", min=1, help="How many workers, in the range of cluster.workers.")
    ] = None,
    give_up: Annotated[bool, typer.Option("--give-up", help="End the change of shards that is under way.")] = False,
    json: Json = False,
    debug: Debug = False,
) -> None:
    """Change the number of shards or workers of a run while it trains, from another terminal.

    \b
    Examples:
      embershard scale runs/20260101-120000-train --shards 5
      embershard scale runs/20260101-120000-train --shards 2 --json
      embershard scale runs/20260101-120000-train --workers 4
      embershard scale runs/20260101-120000-train --give-up

    Shards: training goes on; every block has one owner at every moment. Ctrl-C here does not stop it, --give-up from
    another terminal does: what has moved stays, and the same command goes on with what is left. Workers: the group
    begins again with as many, if there is room for them, from a checkpoint that it writes at the next step boundary; no
    step is done again.
    """
    from .progress import ProgressReporter

    if (shards is None and workers is None) != give_up:
        raise ConfigError("scale: say how many, --shards N, --workers N or both, or alone --give-up")
    if workers is not None:
        _check_workers(run, workers)
    result: dict[str, Any] = {}
    with _coordinator(run) as coordinator, ProgressReporter() as progress:
        if give_up:
            result |= _give_up(coordinator)
        if shards is not None:
            result |= _scale(coordinator, shards, progress)
            _print(result)
        if workers is not None:
            result |= _want_workers(coordinator, workers)
    if json:
        print_json(result)


def status(
    run: Annotated[
        Path | None, typer.Argument(metavar="[RUN]", help="The folder of the run; by default the last one in runs/.")
    ] = None,
    json: Json = False,
    debug: Debug = False,
) -> None:
    """Show the workers and shards of a run: what these hold, how far they are, what they have refused.

    \b
    Examples:
      embershard status
      embershard status runs/20260101-120000-train
      embershard status runs/20260101-120000-train --json
    """
    from .run_folder import newest_run, read_run

    run = run or newest_run(Path("runs"))
    record = read_run(run)
    result: dict[str, Any] = {name: record.get(name) for name in ("status", "generation", "started", "ray_address")}
    result["run_dir"] = str(run)
    result |= _asked(run) if record.get("status") == "running" else {"shards": []}
    print(f"{run}: {result['status']}, generation {result['generation']}, started {result['started']}")
    if (workers := result.get("workers")) is not None:
        print(f"workers: {workers}" + (f" ({result['wanted']} wanted)" if result["wanted"] else ""))
    for shard in result["shards"]:
        size = (shard["table_bytes"] + shard["state_bytes"]) / 1e6
        print(
            f"shard {shard['shard']}: step {shard['step']}, {shard['blocks']} blocks, {size:,.1f} MB, "
            f"{shard['pulls']:,} pulls, {shard['pushes']:,} pushes, {shard['moved']} moved, "
            f"{shard['duplicates']} repeated, epoch {shard['epoch']}"
        )
    if json:
        print_json(result)


@contextmanager
def _coordinator(run: Path) -> Iterator[Any]:
    """The coordinator of a run that is training. Raises ConfigError, RunFailed."""
    from .run_folder import read_run

    record = read_run(run)
    if record.get("status") != "running":
        raise ConfigError(f"{run}: this run is not training (status {record.get('status')!r})")
    if record.get("ray_auth_mode"):  # the token itself lies in this account; Ray looks for the mode when imported
        os.environ.setdefault("RAY_AUTH_MODE", record["ray_auth_mode"])
    import ray

    from .ray_session import ray_session
    from .shard_group import NAME

    with ray_session(record["ray_address"], f"tool-{secrets.token_hex(4)}", 60.0):
        try:
            yield ray.get_actor(NAME, namespace=record["namespace"])
        except ValueError:
            raise RunFailed(f"{run}: its coordinator is not there; the run has ended, or its cluster has") from None


def _scale(coordinator: Any, shards: int, progress: Any) -> dict[str, Any]:
    import ray

    from .errors import root_cause

    call = coordinator.scale.remote(shards)
    count = progress.counter("block")
    while not ray.wait([call], timeout=FOLLOW_SECONDS)[0]:
        state = ray.get(coordinator.scale_progress.remote(), timeout=60.0)
        if state is not None and state["blocks"]:
            count(state["blocks_moved"], state["blocks"])
    try:
        result: dict[str, Any] = ray.get(call)
    except ray.exceptions.RayError as error:
        raise root_cause(error) from None
    return result


def _give_up(coordinator: Any) -> dict[str, Any]:
    from .calls import ask

    given_up: bool = ask(coordinator, "give_up_scaling")
    print("the change of shards is given up" if given_up else "no change of shards is under way")
    return {"given_up": given_up}


def _check_workers(run: Path, workers: int) -> None:
    from .config import load_run

    cluster = load_run(run).cluster
    if not cluster.least_workers <= workers <= cluster.most_workers:
        known = [*cluster.workers] if isinstance(cluster.workers, tuple) else cluster.workers
        raise ConfigError(
            f"--workers: {run} was started with cluster.workers={known}, and {workers} is outside of that; "
            f"stop it and go on with: embershard train {run} --resume cluster.workers=[LEAST,MOST]"
        )


def _want_workers(coordinator: Any, workers: int) -> dict[str, Any]:
    from .calls import ask

    result: dict[str, Any] = ask(coordinator, "want_workers", workers)
    print(f"{workers} workers wanted, {result['workers']} now: the run changes as soon as there is room for them")
    return result


def _asked(run: Path) -> dict[str, Any]:
    with _coordinator(run) as coordinator:
        from .calls import ask

        return {**ask(coordinator, "workers"), "shards": ask(coordinator, "statistics")}


def _print(result: Mapping[str, Any]) -> None:
    rate = result["bytes_moved"] / 1e9 / max(result["seconds"], 1e-9)
    print(
        f"{result['shards']} shards: {result['blocks_moved']} blocks, {result['bytes_moved'] / 1e6:,.1f} MB in "
        f"{result['seconds']:.1f} s ({rate:.2f} GB/s), {result['cancelled']} moves tried again"
    )
    print(
        f"workers were held {1e3 * result['longest_hold_seconds']:.0f} ms at most; pulls meanwhile (slowest shard): "
        f"p50 {result['pull_p50']:.1f} ms, p99 {result['pull_p99']:.1f} ms, longest {result['pull_longest']:.0f} ms"
    )
