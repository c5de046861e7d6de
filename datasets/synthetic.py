"""Generated click logs with a known best possible AUC."""

from __future__ import annotations

import math
import os
import threading
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy as np

from . import synthetic_kernels as kernels
from .kernels import mix
from .schema import DataError
from .writer import Block, DatasetWriter, PartWriter

# Distinct counts of Criteo Kaggle, and of Terabyte with ids modulo 40,000,000 (facebookresearch/dlrm).
KAGGLE = (
    1460, 583, 10131227, 2202608, 305, 24, 12517, 633, 3, 93145, 5683, 8351593, 3194,
    27, 14992, 5461306, 10, 5652, 2173, 4, 7046547, 18, 15, 286181, 105, 142572,
)  # fmt: skip
TERABYTE = (
    39884406, 39043, 17289, 7420, 20263, 3, 7120, 1543, 63, 38532951, 2953546, 403346, 10,
    2208, 11938, 155, 4, 976, 14, 39979771, 25641295, 39664984, 585935, 12972, 108, 36,
)  # fmt: skip
# Capped, so that a few hundred thousand rows teach something.
CARDINALITIES = tuple(min(n, 20_000) for n in KAGGLE)
DENSE = 13
EXPONENT = 1.3
POSITIVE_RATE = 0.25

# Standard deviation of the logit by cause: single ids, pairs of ids, dense values.
_ID_SIGNAL, _PAIR_SIGNAL, _DENSE_SIGNAL = 1.6, 0.6, 0.35
_DENSE_MISSING = 0.25  # the largest share of nulls; column k has k / DENSE of it
_BLOCK_ROWS = 131_072
_FILE_ROWS = 8 * _BLOCK_ROWS
_CALIBRATION_ROWS = 262_144
_CALIBRATION_SEED = 0x0CA1


class PlantedModel:
    """The distribution of a generated log: rows, and the probability that each is clicked.

    logit = intercept + sum of one effect per id + sum over pairs of neighbouring features of the product of two effects
    + dense terms; an effect is a 64-bit mix of (model seed, feature, id), so no table exists.
    """

    def __init__(self, cardinalities: Sequence[int], dense: int, exponent: float, model_seed: int) -> None:
        self.cardinalities = np.array(cardinalities, np.int64)
        self.exponent = exponent
        self.missing = np.arange(dense) / max(1, dense) * _DENSE_MISSING
        self.key = _key(model_seed, 0)
        self._steps = np.array(
            [_coprime(int(n), int(mix(np.uint64(f), self.key))) for f, n in enumerate(cardinalities)], np.int64
        )
        features = len(cardinalities)
        self._weights = (
            _ID_SIGNAL / math.sqrt(max(1, features)),
            _PAIR_SIGNAL / math.sqrt(max(1, features // 2)),
            _DENSE_SIGNAL / math.sqrt(max(1, dense)),
        )
        self.intercept = 0.0
        logits = self.draw(_CALIBRATION_SEED, 0, _CALIBRATION_ROWS)[1]
        self.intercept = _intercept(logits, POSITIVE_RATE)
        self.best_auc = best_auc(1.0 / (1.0 + np.exp(-logits - self.intercept)))

    def draw(self, seed: int, first: int, rows: int) -> tuple[Block, np.ndarray]:
        """Rows first to first + rows - 1 of the log `seed`, and their logits float64 [rows]."""
        features, dense = len(self.cardinalities), len(self.missing)
        block = Block(
            np.empty(rows, np.int8),
            np.empty((dense, rows), np.int32),
            np.empty((dense, rows), np.bool_),
            np.empty((features, rows), np.int64),
            np.zeros((features, rows), np.bool_),
        )
        logits = np.empty(rows)
        key = _key(seed, 1)
        columns = features + dense
        kernels.draw_ids(first, columns, key, self.cardinalities, self._steps, self.exponent, block.ids)
        kernels.draw_dense(first, columns, key, self.missing, block.dense, block.dense_null)
        kernels.planted_logits(block.ids, block.dense, self.key, *self._weights, logits)
        logits += self.intercept
        kernels.draw_labels(first, _key(seed, 2), logits, block.labels)
        return block, logits


def _key(seed: int, stream: int) -> np.uint64:
    return np.uint64(mix(np.uint64(stream), np.uint64(mix(np.uint64(seed % 2**64), np.uint64(0)))))


def _coprime(n: int, near: int) -> int:
    """A multiplier that permutes [0, n)."""
    step = int(near) % n | 1
    while math.gcd(step, n) != 1:
        step += 2
    return step


def _intercept(logits: np.ndarray, rate: float) -> float:
    """The shift at which the mean of sigmoid(logits + shift) is `rate`, by bisection."""
    low, high = -30.0, 30.0
    for _ in range(60):
        middle = 0.5 * (low + high)
        low, high = (middle, high) if np.mean(1.0 / (1.0 + np.exp(-logits - middle))) < rate else (low, middle)
    return 0.5 * (low + high)


def best_auc(probabilities: np.ndarray) -> float:
    """Expected AUC of the best ranking, that by the true probabilities [N] themselves: no model can do better.

    A pair (i, j) with p_i > p_j is ranked right with weight p_i (1 - p_j) and wrong with weight p_j (1 - p_i).
    """
    p = np.sort(probabilities)
    negatives = np.cumsum(1.0 - p) - (1.0 - p)
    return float((p * negatives).sum() / (p.sum() * (1.0 - p).sum() - (p * (1.0 - p)).sum()))


def generate(
    output: str,
    *,
    rows: int,
    seed: int = 0,
    model_seed: int = 0,
    cardinalities: Sequence[int] = CARDINALITIES,
    dense: int = DENSE,
    exponent: float = EXPONENT,
    progress: Callable[[int, int], None] | None = None,
) -> dict[str, Any]:
    """Writes a Criteo-shaped log of `rows` rows below the folder `output`, one file per core at a time, in constant
    memory.

    Columns label, i1 to i{dense} (int32, some null) and c1, c2, ... (int64 in [0, cardinality), Zipf(exponent)).
    Two logs of one model_seed, cardinalities, dense and exponent but different seeds are samples of one distribution:
    one to train on, one to evaluate on. progress(rows done, rows) is called per block.

    Returns:
        {output, rows, positives, label_rate, files, best_auc}.

    Raises:
        DataError: sizes that make no sense, an output that exists, or a full disk.
    """
    if rows < 1:
        raise DataError(f"generate: {rows} rows; at least 1 is needed")
    if not cardinalities or not all(1 <= n <= 2**31 for n in cardinalities):
        raise DataError("generate: cardinalities must be 1 to 2^31 each, and at least one is needed")
    if dense < 0 or exponent < 0:
        raise DataError("generate: the number of dense columns and the Zipf exponent cannot be negative")
    model = PlantedModel(cardinalities, dense, exponent, model_seed)
    names = [f"i{k + 1}" for k in range(dense)], [f"c{f + 1}" for f in range(len(cardinalities))]
    starts, done, lock = range(0, rows, _FILE_ROWS), 0, threading.Lock()

    def write_part(number: int) -> None:
        nonlocal done
        name, last = f"part-{number:05d}.parquet", min(starts[number] + _FILE_ROWS, rows)
        with PartWriter(
            target.staged(name),
            source="generated",
            dense=names[0],
            categorical=names[1],
            cardinalities=cardinalities,
            best_auc=round(model.best_auc, 6),
        ) as writer:
            for first in range(starts[number], last, _BLOCK_ROWS):
                size = min(_BLOCK_ROWS, last - first)
                writer.write(model.draw(seed, first, size)[0])
                with lock:
                    done += size
                    if progress is not None:
                        progress(done, rows)
        target.publish(name)

    with DatasetWriter(output) as target:
        target.keep({})
        try:
            with ThreadPoolExecutor(min(len(starts), os.cpu_count() or 1)) as pool:
                list(pool.map(write_part, range(len(starts))))
            schema = target.finish()
        except OSError as error:
            raise DataError(f"{output}: cannot be written: {error.strerror or error}") from error
    positives = schema.positives or 0
    return {
        "output": target.name,
        "rows": schema.rows,
        "positives": positives,
        "label_rate": positives / schema.rows,
        "files": len(starts),
        "best_auc": schema.best_auc,
    }
