"""What came out of a comparison: means, spreads and paired differences, and the table that is printed."""

from __future__ import annotations

import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from .config import RunConfig
from .formatting import readable_bytes

# 97.5 % quantiles of Student's t for 1 to 10 degrees of freedom.
_T = (12.7062, 4.3027, 3.1824, 2.7764, 2.5706, 2.4469, 2.3646, 2.3060, 2.2622, 2.2281)


@dataclass(frozen=True)
class Quality:
    """A measure of a model, as `key` in results.json. sign: 1 where more is better, -1 where less is."""

    key: str
    name: str
    sign: int
    reading: str


LOGLOSS = Quality("logloss", "logloss", -1, "Lower is better: the error of the predicted probabilities.")
AUC = Quality("auc", "AUC", 1, "Higher is better: how often a click is ranked above a row without one.")
NDCG = Quality(
    "ndcg_at_10",
    "nDCG@10",
    1,
    "Higher is better: how many of what a person liked stand among the first 10, and how high.",
)


def qualities(measured: Mapping[str, Any]) -> tuple[Quality, ...]:
    """Those that a measurement holds; settings are chosen by the first."""
    return (NDCG,) if NDCG.key in measured else (LOGLOSS, AUC)


def shown_qualities(results: Mapping[str, Any]) -> tuple[Quality, ...]:
    """Of results.json."""
    return qualities(results["rows"][0])


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
    training_bytes, train_seconds and lookup_us (medians), auc and logloss, or ndcg_at_10, on the test rows (see
    `_quality`), trials and runs; or `unreachable`, the reason why it was not run.
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
    measured = {one.key: _quality(row["runs"], full["runs"], one.key) for one in qualities(first["test"])}
    return {**row, "actual_ratio": ratio, **sizes, **times, **measured}


def _quality(runs: Sequence[Any], full: Sequence[Any], metric: str) -> dict[str, Any]:
    """mean and deviation over the seeds, of what was measured and of its difference to `full`, paired by seed.

    interval: of the mean difference, 95 %, by Student's t over the seeds: it knows what the seeds change, not that
    other test rows would change it too. change, change_interval: the same as a share of full's mean.
    """
    own, other = ([run["test"][metric] for run in group] for group in (runs, full))
    names = ("mean", "deviation", "difference", "difference_deviation", "interval", "change", "change_interval")
    if None in own or None in other:  # one class only
        return dict.fromkeys(names)
    differences = [a - b for a, b in zip(own, other, strict=True)]
    mean, whole = statistics.fmean(differences), statistics.fmean(other)
    values: list[Any] = [statistics.fmean(own), None, mean, None, None, mean / whole, None]
    if len(own) > 1:
        spread = statistics.stdev(differences)
        half = student_t(len(own) - 1) * spread / len(own) ** 0.5
        interval = [mean - half, mean + half]
        values[1], values[3] = statistics.stdev(own), spread
        values[4], values[6] = interval, [end / whole for end in interval]
    return dict(zip(names, values, strict=True))


def student_t(freedom: int) -> float:
    """97.5 % quantile; beyond 10 degrees of freedom by the first terms of Cornish and Fisher's expansion."""
    if freedom <= len(_T):
        return _T[freedom - 1]
    z = statistics.NormalDist().inv_cdf(0.975)
    first, second = z**3 + z, 5 * z**5 + 16 * z**3 + 3 * z
    third = 3 * z**7 + 19 * z**5 + 17 * z**3 - 15 * z
    return z + first / (4 * freedom) + second / (96 * freedom**2) + third / (384 * freedom**3)


def table(results: Mapping[str, Any]) -> list[dict[str, Any]]:
    """One record per row, to print: numbers as text, with their spread."""
    records = []
    for row in results["rows"]:
        name = {"method": row["method"], "ratio": "1x" if row["method"] == "full" else f"{row['ratio']:g}x"}
        if "unreachable" in row:
            records.append(name | {"embeddings": "not reachable"})
            continue
        sizes = {name: readable_bytes(row[f"{key}_bytes"]) for name, key in _SIZES.items()}
        record = name | sizes | {"width": row["choice"]["width"]}
        for one in shown_qualities(results):
            record |= {
                one.name: _spread(row[one.key]),
                f"{one.name} - full": "" if row["method"] == "full" else _difference(row[one.key]),
            }
        records.append(record | {"train s": f"{row['train_seconds']:.1f}", "lookup us": f"{row['lookup_us']:.0f}"})
    return records


_SIZES = {"embeddings": "embedding", "in training": "training"}


def _spread(quality: Mapping[str, Any]) -> str:
    if quality["mean"] is None:
        return "-"
    shown = f"{quality['mean']:.5f}"
    return shown if quality["deviation"] is None else f"{shown} ({quality['deviation']:.5f})"


def _difference(quality: Mapping[str, Any]) -> str:
    """Such as "+0.00123 [-0.00010, +0.00256] +0.2 %"."""
    if quality["mean"] is None:
        return "-"
    parts = [f"{quality['difference']:+.5f}", f"{100 * quality['change']:+.1f} %"]
    if quality["interval"] is not None:
        low, high = quality["interval"]
        parts.insert(1, f"[{low:+.5f}, {high:+.5f}]")
    return " ".join(parts)
