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
from .writer import Block, DatasetWriter, PartWriter, writing_behind

# Distinct counts of Criteo Kaggle, and of Terabyte with ids modulo 40,000,000 (facebookresearch/dlrm).
KAGGLE = (
    1460, 583, 10131227, 2202608, 305, 24, 12517, 633, 3, 93145, 5683, 8351593, 3194,
    27, 14992, 5461306, 10, 5652, 2173, 4, 7046547, 18, 15, 286181, 105, 142572,
)  # fmt: skip
TERABYTE = (
    39884406, 39043, 17289, 7420, 20263, 3, 7120, 1543, 63, 38532951, 2953546, 403346, 10,
    2208, 11938, 155, 4, 976, 14, 39979771, 25641295, 39664984, 585935, 12972, 108, 36,
)  # fmt: skip
NAMED = {"kaggle": KAGGLE, "terabyte": TERABYTE}
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
_FIRST_OF_PAIR, _SECOND_OF_PAIR = 1 << 20, 1 << 21  # streams of effects, beside that of single ids
_MOST_IDS = 1000  # in a bag


class PlantedModel:
    """The distribution of a generated log: rows, and the probability that each is clicked.

    logit = intercept + sum of one effect per id + sum over pairs of neighbouring features of the product of two effects
    + dense terms; an effect is a 64-bit mix of (model seed, feature, id), so no table exists. A bag's effect is the sum
    of its ids' over the square root of the mean size. bags: the largest size per feature, 1 for a plain id.
    """

    def __init__(
        self, cardinalities: Sequence[int], bags: Sequence[int], dense: int, exponent: float, model_seed: int
    ) -> None:
        self.cardinalities, self.bags, self.exponent = cardinalities, bags, exponent
        self.missing = np.arange(dense) / max(1, dense) * _DENSE_MISSING
        self.key = _key(model_seed, 0)
        self._steps = [_coprime(n, int(mix(np.uint64(f), self.key))) for f, n in enumerate(cardinalities)]
        self._scales = [1.0 / math.sqrt(0.5 * (1 + most)) for most in bags]
        ids = sum(0.5 * (1 + most) for most in bags)
        self.block_rows = max(1, int(_BLOCK_ROWS * len(bags) / ids))  # a block's memory does not depend on the bags
        self.intercept = 0.0
        starts = range(0, _CALIBRATION_ROWS, self.block_rows)
        logits = np.concatenate([self.draw(_CALIBRATION_SEED, first, self.block_rows)[1] for first in starts])
        self.intercept = _intercept(logits, POSITIVE_RATE)
        self.best_auc = best_auc(1.0 / (1.0 + np.exp(-logits - self.intercept)))

    def draw(self, seed: int, first: int, rows: int) -> tuple[Block, np.ndarray]:
        """Rows first to first + rows - 1 of the log `seed`, and their logits float64 [rows]. Bags stand in the block's
        bags, plain ids in its ids.
        """
        dense, key = len(self.missing), _key(seed, 1)
        columns = len(self.bags) + dense
        features = self._draw_ids(seed, first, rows)
        plain = [ids for (_, ids), most in zip(features, self.bags, strict=True) if most == 1]
        block = Block(
            np.empty(rows, np.int8),
            np.empty((dense, rows), np.int32),
            np.empty((dense, rows), np.bool_),
            np.array(plain, np.int64).reshape(-1, rows),
            np.zeros((len(plain), rows), np.bool_),
            [bag for bag, most in zip(features, self.bags, strict=True) if most > 1],
        )
        logits = self._id_logits(features, rows)
        kernels.draw_dense(first, columns, key, self.missing, block.dense, block.dense_null)
        kernels.add_dense(block.dense, _DENSE_SIGNAL / math.sqrt(max(1, dense)), logits)
        logits += self.intercept
        kernels.draw_labels(first, _key(seed, 2), logits, block.labels)
        return block, logits

    def _draw_ids(self, seed: int, first: int, rows: int) -> list[tuple[np.ndarray, np.ndarray]]:
        """(offsets int32 [rows + 1], ids) per feature."""
        columns, one_each = len(self.bags) + len(self.missing), np.arange(rows + 1, dtype=np.int32)
        features = []
        for f, (n, step, most) in enumerate(zip(self.cardinalities, self._steps, self.bags, strict=True)):
            offsets = one_each
            if most > 1:
                offsets = np.empty(rows + 1, np.int32)
                kernels.draw_offsets(first, columns, f, _key(seed, 3), most, offsets)
            ids = np.empty(offsets[-1], np.int64)
            kernels.draw_ids(first, columns, f, _key(seed, 1), n, step, self.exponent, offsets, ids)
            features.append((offsets, ids))
        return features

    def _id_logits(self, features: Sequence[tuple[np.ndarray, np.ndarray]], rows: int) -> np.ndarray:
        """What ids and pairs of ids add to the logits, float64 [rows]."""
        per_id, per_pair = _ID_SIGNAL / math.sqrt(len(features)), _PAIR_SIGNAL / math.sqrt(max(1, len(features) // 2))
        scales, logits = self._scales, np.zeros(rows)
        for f, bags in enumerate(features):
            kernels.add_effects(*bags, f, self.key, per_id * scales[f], logits)
        for f in range(0, len(features) - 1, 2):
            one, other = np.zeros((2, rows))
            kernels.add_effects(*features[f], f + _FIRST_OF_PAIR, self.key, per_pair * scales[f], one)
            kernels.add_effects(*features[f + 1], f + _SECOND_OF_PAIR, self.key, scales[f + 1], other)
            logits += one * other
        return logits


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
    multi_hot: Sequence[int] = (1,),
    dense: int = DENSE,
    exponent: float = EXPONENT,
    progress: Callable[[int, int], None] | None = None,
) -> dict[str, Any]:
    """Writes a Criteo-shaped log of `rows` rows below the folder `output`, one file per core at a time, in constant
    memory.

    Columns label, i1 to i{dense} (int32, some null) and c1, c2, ... (int64 in [0, cardinality), Zipf(exponent)).
    multi_hot: the largest bag per column, or one number for all; columns with more than 1 hold lists of 1 to that many
    ids and stand behind the others. Two logs of one model_seed, cardinalities, multi_hot, dense and exponent but
    different seeds are samples of one distribution: one to train on, one to evaluate on. progress(rows done, rows) is
    called per block.

    Returns:
        {output, rows, positives, label_rate, files, best_auc}.

    Raises:
        DataError: sizes that make no sense, an output that exists, or a full disk.
    """
    bags = _checked(rows, cardinalities, multi_hot, dense, exponent)
    model = PlantedModel(cardinalities, bags, dense, exponent, model_seed)
    numbers = sorted(range(len(bags)), key=lambda f: bags[f] > 1)
    starts, done, lock = range(0, rows, _FILE_ROWS), 0, threading.Lock()

    def write_part(number: int) -> None:
        nonlocal done
        name, last = f"part-{number:05d}.parquet", min(starts[number] + _FILE_ROWS, rows)
        with (
            PartWriter(
                target.staged(name),
                source="generated",
                dense=[f"i{k + 1}" for k in range(dense)],
                categorical=[f"c{f + 1}" for f in numbers if bags[f] == 1],
                bags=[f"c{f + 1}" for f in numbers if bags[f] > 1],
                cardinalities=[cardinalities[f] for f in numbers],
                best_auc=round(model.best_auc, 6),
            ) as writer,
            writing_behind(writer) as write,
        ):
            for first in range(starts[number], last, model.block_rows):
                size = min(model.block_rows, last - first)
                write(model.draw(seed, first, size)[0])
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
            raise target.failed(error) from error
    positives = schema.positives or 0
    return {
        "output": target.name,
        "rows": schema.rows,
        "positives": positives,
        "label_rate": positives / schema.rows,
        "files": len(starts),
        "best_auc": schema.best_auc,
    }


def _checked(
    rows: int, cardinalities: Sequence[int], multi_hot: Sequence[int], dense: int, exponent: float
) -> list[int]:
    """The largest bag of each column."""
    if rows < 1:
        raise DataError(f"generate: {rows} rows; at least 1 is needed")
    if not cardinalities or not all(1 <= n <= 2**31 for n in cardinalities):
        raise DataError("generate: cardinalities must be 1 to 2^31 each, and at least one is needed")
    if dense < 0 or exponent < 0:
        raise DataError("generate: the number of dense columns and the Zipf exponent cannot be negative")
    bags = list(multi_hot) * (len(cardinalities) if len(multi_hot) == 1 else 1)
    if len(bags) != len(cardinalities) or not all(1 <= most <= _MOST_IDS for most in bags):
        raise DataError(
            f"generate: the largest bags must be 1 to {_MOST_IDS} each, one number for all columns or "
            f"{len(cardinalities)}, one per column"
        )
    return bags
