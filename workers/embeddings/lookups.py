"""The ids of a batch become rows of a slab: all features in one kernel call."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from ...datasets.schema import MISSING_ID, Ids
from . import kernels
from .base import EmbeddingError, Feature, Lookup


class SlabLookups:
    """Every lookup into one slab, held as arrays. `features[l]` is the number of the feature that lookup l serves."""

    def __init__(self, slab: int, features: Sequence[Feature], lookups: Sequence[tuple[int, int, Lookup]]) -> None:
        """lookups: (number of the feature, table within the slab, lookup)."""
        self.slab = slab
        self.features = np.array([feature for feature, _, _ in lookups], np.int64)
        self.tables = np.array([table for _, table, _ in lookups], np.int32)
        maps = [lookup.map for _, _, lookup in lookups]
        self._names = [features[feature].name for feature, _, _ in lookups]
        self._kinds = np.array([m.code for m in maps], np.uint8)
        self._seeds = np.array([m.seed for m in maps], np.uint64)
        self._divisors = np.array([m.divisor for m in maps], np.int64)
        self._moduli = np.array([m.modulus for m in maps], np.int64)
        self._limits = np.array([m.bound for m in maps], np.int64)

    def map(self, ids: Ids, positions: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """(segments int64 [L + 1], rows int64 [N]); positions: where each of our features stands in `ids`.

        Raises:
            EmbeddingError: an id outside its feature's cardinality.
        """
        at = positions[self.features]
        batch = ids.batch_size
        begins, ends = at * batch, (at + 1) * batch
        if ids.offsets is not None:
            begins, ends = ids.offsets[begins], ids.offsets[ends]
        segments = np.concatenate([np.zeros(1, np.int64), np.cumsum(ends - begins)])
        rows = np.empty(segments[-1], np.int64)
        wrong = kernels.map_ids(
            ids.values,
            begins,
            ends,
            self._kinds,
            self._seeds,
            self._divisors,
            self._moduli,
            self._limits,
            segments,
            rows,
        )
        if wrong >= 0:
            lookup = int(np.searchsorted(segments, wrong, side="right")) - 1
            value = int(ids.values[begins[lookup] + wrong - segments[lookup]])
            raise EmbeddingError(self._outside(self._names[lookup], value, int(self._limits[lookup])))
        return segments, rows

    @staticmethod
    def _outside(name: str, value: int, limit: int) -> str:
        if value == MISSING_ID:
            return (
                f"feature {name!r}: a missing id ({MISSING_ID}) has no row in a table of cardinality {limit}: set "
                f"data.missing_id to an id that stands for it, or leave the cardinality out so that ids are hashed"
            )
        return (
            f"feature {name!r}: id {value} lies outside its cardinality [0, {limit}): declare a larger one, or set "
            f"embedding.out_of_range=modulo"
        )
