"""`embershard export`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from .cli_options import Debug, Json, print_json
from .formatting import readable_bytes


def export(
    target: Annotated[Path, typer.Argument(metavar="CHECKPOINT", help="A checkpoint, or a run: its newest.")],
    output: Annotated[Path, typer.Argument(metavar="OUTPUT", help="File to write.")],
    format: Annotated[str, typer.Option(help="safetensors, torch or onnx.")] = "safetensors",
    json: Json = False,
    debug: Debug = False,
) -> None:
    """Write a trained model as one file, and check that it answers as in training.

    \b
    Examples:
      embershard export runs/20260101-120000-train model.safetensors
      embershard export runs/a/checkpoints/step-000001000 model.onnx --format onnx
    """
    from .evaluation import export_target

    result = export_target(target, output, format)
    for line in _lines(result):
        print(line)
    if json:
        print_json(result)


def _lines(result: dict[str, Any]) -> list[str]:
    full = result["full_latency_us"]
    beside = "uncompressed not measured" if full is None else f"uncompressed {full:,.0f} us"
    file, full_file = readable_bytes(result["file_bytes"]), readable_bytes(result["full_file_bytes"])
    tables, full_tables = readable_bytes(result["embedding_bytes"]), readable_bytes(result["full_embedding_bytes"])
    ratio = result["full_embedding_bytes"] / result["embedding_bytes"]
    lines = [
        f"{result['output']}: {result['format']}, step {result['step']:,}",
        f"file          {file}; uncompressed {full_file}",
        f"embeddings    {tables}; uncompressed {full_tables} (ratio {ratio:.2f})",
        f"64 samples    {result['latency_us']:,.0f} us on one thread; {beside}",
        f"logits        {result['rows_compared']:,} rows differ by at most {result['largest_difference']:.1e}",
    ]
    if "auc" in result and result["auc"] is not None:
        lines.append(f"AUC           {result['auc']:.4f}; in training {result['auc_in_training']:.4f}")
    return lines
