"""`embershard bench`: each part of the system beside what a user would otherwise run."""

from __future__ import annotations

import importlib.util
from typing import Annotated, Any

import typer

from .cli_options import Debug, Json, print_json

bench = typer.Typer(
    help="Measure beside what you would otherwise run; ratios are medians of paired rounds.", no_args_is_help=True
)

Rounds = Annotated[int, typer.Option(min=1, help="Rounds; every contender runs once in each.")]
Gigabytes = Annotated[float, typer.Option(min=0.001, help="Rows and optimizer state of all shards that move blocks.")]


@bench.command(epilog="Example: embershard bench kernels --rounds 3 --json")
def kernels(rounds: Rounds = 7, as_json: Json = False, debug: Debug = False) -> None:
    """Gather, fused updates and unique on one thread, beside torch and FBGEMM."""
    from .bench import bench_kernels

    _show(bench_kernels(rounds, _has_fbgemm(), _tell), as_json)


@bench.command(epilog="Example: embershard bench rpc --rounds 3")
def rpc(rounds: Rounds = 7, as_json: Json = False, debug: Debug = False) -> None:
    """Pull and push over gRPC, beside a raw socket with and without the same kernels."""
    from .bench import bench_rpc

    _show(bench_rpc(rounds, _tell), as_json)


@bench.command(epilog="Example: embershard bench moves --gigabytes 2 --rounds 3")
def moves(
    rounds: Rounds = 3,
    gigabytes: Gigabytes = 2.0,
    blocks: Annotated[int, typer.Option(min=30, help="Blocks of the table; fewer are larger.")] = 32,
    as_json: Json = False,
    debug: Debug = False,
) -> None:
    """Blocks moving between shards while a worker trains: GB/s beside a raw socket, and what pulls took meanwhile."""
    from .bench import bench_moves

    _show(bench_moves(rounds, gigabytes, blocks, _tell), as_json)


@bench.command(epilog="Example: embershard bench stream --data criteo/ --rounds 3")
def stream(
    rounds: Rounds = 7,
    data: Annotated[str | None, typer.Option(help="Parquet to read; without it, a generated log.")] = None,
    rows: Annotated[int, typer.Option(min=1, help="Rows to generate.")] = 2_000_000,
    with_peers: Annotated[
        bool, typer.Option(help="Also Ray Data, and Hugging Face datasets in an environment built for it.")
    ] = False,
    as_json: Json = False,
    debug: Debug = False,
) -> None:
    """Streaming Parquet into shuffled batches, beside bare pyarrow; converting text, beside pyarrow.csv."""
    from .bench import bench_stream

    _show(bench_stream(rounds, data, rows, with_peers, _tell), as_json)


@bench.command(epilog="Example: embershard bench train --dim 128 --with-torchrec")
def train(
    rounds: Rounds = 7,
    with_torchrec: Annotated[bool, typer.Option(help="Also TorchRec, in an environment built for it.")] = False,
    dim: Annotated[int, typer.Option(min=1, help="Width of the embeddings.")] = 16,
    batch: Annotated[int, typer.Option(min=1, help="Samples per step.")] = 2048,
    steps: Annotated[int, typer.Option(min=1, help="Timed steps per round.")] = 30,
    as_json: Json = False,
    debug: Debug = False,
) -> None:
    """Training steps beside torch, FBGEMM and TorchRec on the same batches."""
    from .bench import bench_train

    _show(bench_train(rounds, _has_fbgemm(), with_torchrec, dim, batch, steps, _tell), as_json)


@bench.command(epilog="Example: embershard bench durability --steps 100")
def durability(
    rounds: Rounds = 7,
    dim: Annotated[int, typer.Option(min=1, help="Width of the embeddings.")] = 16,
    batch: Annotated[int, typer.Option(min=1, help="Samples per step.")] = 2048,
    steps: Annotated[int, typer.Option(min=1, help="Timed steps per round.")] = 60,
    gigabytes: Gigabytes = 2.0,
    as_json: Json = False,
    debug: Debug = False,
) -> None:
    """Training with a journal, with checkpoints all the time, and with mutual TLS, beside none of them; seconds from
    the kill of a shard to the next step; blocks that move, beside a raw socket."""
    from .bench import bench_durability

    _show(bench_durability(rounds, dim, batch, steps, gigabytes, _tell), as_json)


def _has_fbgemm() -> bool:
    found = importlib.util.find_spec("fbgemm_gpu") is not None
    if not found:
        _tell('FBGEMM is not installed and left out: pip install "embershard[bench]"')
    return found


def _tell(line: str) -> None:
    typer.echo(line, err=True)


def _show(result: dict[str, Any], as_json: bool) -> None:
    machine = ", ".join(f"{key} {value}" for key, value in result["machine"].items() if value is not None)
    typer.echo(f"machine: {machine}\n")
    for name, value in result["readings"].items():
        typer.echo(f"{name:60s} {value:14.4g}")
    typer.echo("\nratio (median of paired rounds, smallest to largest)")
    for name, value in result["ratios"].items():
        low, high = result["ratio_spread"][name]
        typer.echo(f"{name:60s} {value:8.2f}   {low:.2f} to {high:.2f}")
    if as_json:
        print_json(result)
