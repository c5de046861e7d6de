"""Plain Python twins of the reader, the converter and their kernels. Slow and readable."""

from __future__ import annotations

import math
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq

MASK = (1 << 64) - 1


def mix(value: int, seed: int) -> int:
    z = (value * 0x9E3779B97F4A7C15 + seed) & MASK
    z = ((z ^ (z >> 30)) * 0xBF58476D1CE4E5B9) & MASK
    z = ((z ^ (z >> 27)) * 0x94D049BB133111EB) & MASK
    return z ^ (z >> 31)


def shuffled(items: list[int], key: int) -> list[int]:
    items = list(items)
    for i in range(len(items) - 1, 0, -1):
        j = ((mix(i, key) >> 32) * (i + 1)) >> 32
        items[i], items[j] = items[j], items[i]
    return items


def log1p(value: float | None) -> np.float32:
    return np.float32(0 if value is None else math.log(max(value, 0) + 1))


def read_rows(path: Path, schema, missing_id: int = -1) -> list[tuple]:
    """(label, dense..., ids...) of every row, files in order of their paths."""
    files = sorted(path.rglob("*.parquet")) if path.is_dir() else [path]
    transform = log1p if schema.dense_transform == "log1p" else (lambda x: np.float32(0 if x is None else x))
    return [
        (
            float(row[schema.label]),
            *(transform(row[name]) for name in schema.dense_names),
            *(missing_id if row[name] is None else row[name] for name in schema.categorical_names),
        )
        for file in files
        for row in pq.read_table(file).to_pylist()
    ]


def batch_rows(batch) -> list[tuple]:
    """A batch in the form of `read_rows`."""
    ids = batch.ids.values.reshape(len(batch.ids.features), batch.rows)
    return [(float(batch.labels[b]), *batch.dense[b], *(int(i) for i in ids[:, b])) for b in range(batch.rows)]


def criteo_row(line: str, hexadecimal: bool) -> dict:
    """One line as the converter's columns."""
    fields = line.split("\t")
    row = {"label": int(fields[0])}
    row |= {f"i{k}": int(fields[k]) if fields[k] else None for k in range(1, 14)}
    row |= {f"c{f}": int(fields[13 + f], 16 if hexadecimal else 10) if fields[13 + f] else None for f in range(1, 27)}
    return row
