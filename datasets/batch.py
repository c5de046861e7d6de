"""What the reader hands out: labels, dense values and ids as contiguous arrays, ready for `torch.from_numpy`."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

MISSING_ID = -1


@dataclass(frozen=True, slots=True)
class Ids:
    """Ids of F features for B samples, feature-major.

    features: the F names. offsets None: exactly one id per (feature, sample), values int64 [F * B]. Otherwise the ids
    of (feature f, sample b) are values[offsets[f * B + b] : offsets[f * B + b + 1]], offsets int64 [F * B + 1].
    weights: float32, one per value; None where every value counts as 1.
    """

    features: tuple[str, ...]
    values: np.ndarray
    offsets: np.ndarray | None = None
    weights: np.ndarray | None = None

    @property
    def batch_size(self) -> int:
        cells = len(self.values) if self.offsets is None else len(self.offsets) - 1
        return cells // len(self.features) if self.features else 0

    def __getitem__(self, name: str) -> tuple[np.ndarray, np.ndarray | None]:
        """Views of one feature's (values, offsets); the offsets, int64 [B + 1], begin at 0 (a copy unless f is 0)."""
        if name not in self.features:
            raise KeyError(f"no feature {name!r}: the batch holds {', '.join(self.features) or 'none'}")
        f, rows = self.features.index(name), self.batch_size
        if self.offsets is None:
            return self.values[f * rows : (f + 1) * rows], None
        offsets = self.offsets[f * rows : (f + 1) * rows + 1]
        values = self.values[offsets[0] : offsets[-1]]
        return values, offsets if offsets[0] == 0 else offsets - offsets[0]

    def __iter__(self) -> Iterator[str]:
        return iter(self.features)

    def __len__(self) -> int:
        return len(self.features)

    @classmethod
    def from_dict(cls, ids: Mapping[str, Any]) -> Ids:
        """Builds from {name: ids [B]} or {name: (values [N], offsets [B + 1])}.

        Arrays or torch tensors on the CPU. The two forms mix; plain ids then become bags of one.

        Raises:
            ValueError: features of different batch sizes, or offsets that do not fit their values; the name is given.
        """
        columns = {name: _column(name, column) for name, column in ids.items()}
        sizes = {name: len(v) if o is None else len(o) - 1 for name, (v, o) in columns.items()}
        if len(set(sizes.values())) > 1:
            stated = ", ".join(f"{name} {size}" for name, size in sizes.items())
            raise ValueError(f"ids: every feature needs the same number of samples, these have {stated}")
        values = [v for v, _ in columns.values()]
        joined = np.concatenate(values) if values else np.empty(0, np.int64)
        if all(o is None for _, o in columns.values()):
            return cls(tuple(columns), joined)
        parts, base = [np.zeros(1, np.int64)], 0
        for v, o in columns.values():
            parts.append(base + (np.arange(1, len(v) + 1) if o is None else o[1:]))
            base += len(v)
        return cls(tuple(columns), joined, np.concatenate(parts))


def _column(name: str, column: Any) -> tuple[np.ndarray, np.ndarray | None]:
    values, offsets = column if isinstance(column, tuple) else (column, None)
    v = np.asarray(values)
    if v.ndim != 1 or v.dtype.kind not in "iu":
        raise ValueError(f"ids[{name!r}]: expected integers [N], found {v.dtype} {list(v.shape)}")
    v = v.astype(np.int64, copy=False)
    if offsets is None:
        return v, None
    o = np.asarray(offsets).astype(np.int64, copy=False)
    if o.ndim != 1 or len(o) < 1 or o[0] != 0 or o[-1] != len(v) or np.any(np.diff(o) < 0):
        raise ValueError(
            f"ids[{name!r}]: offsets must be [B + 1], not decreasing, from 0 to {len(v)} (the number of ids)"
        )
    return v, o


@dataclass(frozen=True, slots=True)
class Batch:
    """This rank's rows of one step.

    labels: float32 [B]; dense: float32 [B, D], C-contiguous; ids: F features of B samples; global_rows: rows of this
    step over all ranks (the divisor of the loss). B may be 0.
    """

    labels: np.ndarray
    dense: np.ndarray
    ids: Ids
    global_rows: int

    @property
    def rows(self) -> int:
        return len(self.labels)
