"""Plain Python twins of the reader, the converter and their kernels. Slow and readable."""

from __future__ import annotations

import itertools
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


def sketch(ids: list[int], precision: int, slots: int) -> tuple[list[int], dict[int, int]]:
    """HyperLogLog's registers, and the counts that are left of the frequent ids."""
    registers, counts = [0] * 2**precision, {}
    for identity in ids:
        hashed = mix(identity, 0x5851F42D4C957F2D)
        register, rest = divmod(hashed, 2 ** (64 - precision))
        registers[register] = max(registers[register], 64 - precision - rest.bit_length() + 1)
        counts[identity] = counts.get(identity, 0) + 1
        if 4 * len(counts) > 3 * slots:
            taken = sorted(counts.values())[len(counts) // 2]
            counts = {known: count - taken for known, count in counts.items() if count > taken}
    return registers, counts


def log1p(value: float | None) -> np.float32:
    return np.float32(0 if value is None else math.log(max(value, 0) + 1))


def _rotate(value: int, bits: int) -> int:
    return ((value << bits) | (value >> (64 - bits))) & MASK


def xxhash64(text: bytes) -> int:
    """XXH64 with seed 0, after its specification."""
    p1, p2, p3 = 0x9E3779B185EBCA87, 0xC2B2AE3D27D4EB4F, 0x165667B19E3779F9
    p4, p5 = 0x85EBCA77C2B2AE63, 0x27D4EB2F165667C5

    def turn(lane: int, word: int) -> int:
        return _rotate((lane + word * p2) & MASK, 31) * p1 & MASK

    def word(at: int, size: int) -> int:
        return int.from_bytes(text[at : at + size], "little")

    at = len(text) // 32 * 32
    total = p5
    if at:
        lanes = [(p1 + p2) & MASK, p2, 0, -p1 & MASK]
        for stripe in range(0, at, 32):
            lanes = [turn(lane, word(stripe + 8 * k, 8)) for k, lane in enumerate(lanes)]
        total = sum(_rotate(lane, bits) for lane, bits in zip(lanes, (1, 7, 12, 18), strict=True)) & MASK
        for lane in lanes:
            total = ((total ^ turn(0, lane)) * p1 + p4) & MASK
    total = (total + len(text)) & MASK
    while at + 8 <= len(text):
        total = (_rotate(total ^ turn(0, word(at, 8)), 27) * p1 + p4) & MASK
        at += 8
    if at + 4 <= len(text):
        total = (_rotate(total ^ word(at, 4) * p1 & MASK, 23) * p2 + p3) & MASK
        at += 4
    while at < len(text):
        total = _rotate(total ^ text[at] * p5 & MASK, 11) * p1 & MASK
        at += 1
    total = (total ^ (total >> 33)) * p2 & MASK
    total = (total ^ (total >> 29)) * p3 & MASK
    return total ^ (total >> 32)


def identity(value, missing_id: int) -> int:
    """What the reader makes of one value of an id column."""
    if value is None:
        return missing_id
    return value if isinstance(value, int) else xxhash64(value.encode() if isinstance(value, str) else value) % 2**63


def read_rows(path: Path, schema, missing_id: int = -1) -> list[tuple]:
    """(label, dense..., ids...) of every row, files in order of their paths; a bag is a tuple of (id, weight)."""
    files = sorted(path.rglob("*.parquet")) if path.is_dir() else [path]
    rows = [row for file in files for row in pq.ParquetFile(file).read().to_pylist()]
    return [
        (
            float(row[schema.label]),
            *(_transformed(row[column.name], column, schema.dense_transform) for column in schema.dense),
            *(_ids(row, column, missing_id) for column in schema.categorical),
        )
        for row in rows
    ]


def _transformed(value, column, transform: str) -> np.float32:
    if transform == "log1p":
        return log1p(value)
    if transform == "standardise":
        scale = 1.0 / column.deviation if column.deviation else 0.0
        return np.float32(0 if value is None else (value - column.mean) * scale)
    return np.float32(0 if value is None else value)


def _ids(row: dict, column, missing_id: int):
    value = row[column.name]
    if not column.bag:
        return identity(value, missing_id)
    weights = row[column.weights] if column.weights else [1.0] * len(value or [])
    return tuple(
        (identity(each, missing_id), np.float32(weight))
        for each, weight in zip(value or [], weights or [], strict=True)
    )


def batch_rows(batch) -> list[tuple]:
    """A batch in the form of `read_rows`; where there are bags, a plain id is a bag of one too."""
    ids, columns = batch.ids, []
    for f in range(len(ids.features)):
        if ids.offsets is None:
            columns.append(ids.values[f * batch.rows : (f + 1) * batch.rows].tolist())
            continue
        ends = ids.offsets[f * batch.rows : (f + 1) * batch.rows + 1].tolist()
        weights = np.ones(len(ids.values), np.float32) if ids.weights is None else ids.weights
        columns.append(
            [tuple(zip(ids.values[a:b].tolist(), weights[a:b], strict=True)) for a, b in itertools.pairwise(ends)]
        )
    return [(float(batch.labels[b]), *batch.dense[b], *(column[b] for column in columns)) for b in range(batch.rows)]


def criteo_row(line: str, hexadecimal: bool) -> dict:
    """One line as the converter's columns."""
    fields = line.split("\t")
    row = {"label": int(fields[0])}
    row |= {f"i{k}": int(fields[k]) if fields[k] else None for k in range(1, 14)}
    row |= {f"c{f}": int(fields[13 + f], 16 if hexadecimal else 10) if fields[13 + f] else None for f in range(1, 27)}
    return row
