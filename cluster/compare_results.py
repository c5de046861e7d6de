"""What came out of a comparison: means, spreads and paired differences, and the table that is printed."""

from __future__ import annotations

import statistics
from collections.abc import Mapping, Sequence
from typing import Any

from .config import RunConfig
from .formatting import readable_bytes

METRICS = ("auc", "logloss")


def summarise(
    config: RunConfig,
    *,
    comparison: Mapping[str, Any],
    trials: int,
    full: Mapping[str, Any],
    rows: Sequence[Mapping[str, Any]],
) -> dict[str, Any]:
    """results.json: what was compared, and one row per method and ratio, `full` first.

    A row holds method, ratio (asked for), actual_ratio, choice, embedding_bytes (exported), model_bytes,
    training_bytes, train_seconds and lookup_us (medians), auc and logloss on the test rows ({mean, deviation,
    difference, difference_deviation}: standard deviations over seeds; differences are paired with `full` seed by seed),
    trials and runs; or `unreachable`, the reason why it was not run.
    """
    whole = _row(full, full)
    return {
        "data": {"path": config.data.path, "eval_path": config.data.eval_path},
        "model": config.model.model_dump(mode="json"),
        "comparison": dict(comparison),
        "trials_per_method": trials,
        "test_samples": full["runs"][0]["test"]["samples"],
        "rows": [whole, *(_row(row, full) if "runs" in row else dict(row) for row in rows)],
    }


def _row(row: Mapping[str, Any], full: Mapping[str, Any]) -> dict[str, Any]:
    first = row["runs"][0]
    sizes = {name: first[name] for name in ("embedding_bytes", "model_bytes", "training_bytes")}
    times = {name: statistics.median(run[name] for run in row["runs"]) for name in ("train_seconds", "lookup_us")}
    ratio = full["runs"][0]["embedding_bytes"] / first["embedding_bytes"]
    quality = {metric: _quality(row["runs"], full["runs"], metric) for metric in METRICS}
    return {**row, "actual_ratio": ratio, **sizes, **times, **quality}


def _quality(runs: Sequence[Any], full: Sequence[Any], metric: str) -> dict[str, float | None]:
    own, other = ([run["test"][metric] for run in group] for group in (runs, full))
    if None in own or None in other:  # one class only
        return dict.fromkeys(("mean", "deviation", "difference", "difference_deviation"))
    differences = [a - b for a, b in zip(own, other, strict=True)]
    spread = len(own) > 1
    return {
        "mean": statistics.fmean(own),
        "deviation": statistics.stdev(own) if spread else None,
        "difference": statistics.fmean(differences),
        "difference_deviation": statistics.stdev(differences) if spread else None,
    }


def table(results: Mapping[str, Any]) -> list[dict[str, Any]]:
    """One record per row, to print: numbers as text, with their spread."""
    records = []
    for row in results["rows"]:
        name = {"method": row["method"], "ratio": "1x" if row["method"] == "full" else f"{row['ratio']:g}x"}
        if "unreachable" in row:
            records.append(name | {"embeddings": "not reachable"})
            continue
        records.append(
            name
            | {
                "embeddings": readable_bytes(row["embedding_bytes"]),
                "in training": readable_bytes(row["training_bytes"]),
                "width": row["choice"]["width"],
                "AUC": _spread(row["auc"], ""),
                "AUC - full": _spread(row["auc"], "difference"),
                "logloss": _spread(row["logloss"], ""),
                "logloss - full": _spread(row["logloss"], "difference"),
                "train s": f"{row['train_seconds']:.1f}",
                "lookup us": f"{row['lookup_us']:.0f}",
            }
        )
    return records


def _spread(quality: Mapping[str, float | None], which: str) -> str:
    mean = quality[which or "mean"]
    if mean is None:
        return "-"
    deviation = quality["difference_deviation" if which else "deviation"]
    shown = f"{mean:+.5f}" if which else f"{mean:.5f}"
    return shown if deviation is None else f"{shown} ({deviation:.5f})"
