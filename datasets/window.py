"""A window's rows as arrays, taken out of Arrow buffers in the order of the epoch."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import pyarrow as pa

from . import bag_kernels, kernels
from .decode import RowGroupReader
from .footers import is_list
from .order import Window
from .schema import DataError

_KINDS = {
    pa.int32(): kernels.INT32,
    pa.int64(): kernels.INT64,
    pa.float32(): kernels.FLOAT32,
    pa.float64(): kernels.FLOAT64,
}
_TRANSFORMS = {"log1p": kernels.LOG1P, "standardise": kernels.AFFINE, "none": kernels.AFFINE}
_NO_WEIGHTS = np.empty(0, np.float32)


class Piece(NamedTuple):
    """Rows of one window: labels [N], dense [N, D], and ids as in `Ids`, feature-major over these rows."""

    labels: np.ndarray
    dense: np.ndarray
    values: np.ndarray
    offsets: np.ndarray | None
    weights: np.ndarray | None


class _Bags(NamedTuple):
    """A feature's bags in the order of the file: where each begins in values, its size, and a weight per value."""

    begins: np.ndarray
    sizes: np.ndarray
    values: np.ndarray
    weights: np.ndarray


class DecodedWindow:
    """A window's rows as arrays, in reading order, cut where this rank's batches end.

    order: int32 [N], rows to read, numbered through the window; first: rows up to the first cut; share: rows between
    cuts after that.

    Raises:
        DataError: as `RowGroupReader.read`; a label that is not 0 or 1; a dense value that is NaN or infinite; a
            negative id other than missing_id; weights that are not finite or not as many as their bag.
    """

    def __init__(
        self, reader: RowGroupReader, window: Window, order: np.ndarray, first: int, share: int, missing_id: int
    ) -> None:
        self._reader, self._window = reader, window
        self._schema, self._cuts, self._at = reader.schema, (first, share), 0
        self._offsets: np.ndarray | None = None
        self._weights: np.ndarray | None = None
        chunks = [reader.read(group) for group in window.groups]
        rows = np.array([group.rows for group in window.groups], np.int64)
        dense = 1 + len(self._schema.dense)
        columns = [[arrays[k] for arrays in chunks] for k in range(len(self._schema.columns))]
        self._labels = _allocate(len(order), np.float32)
        self._gather_labels(order, rows, columns[0])
        self._dense = _allocate(len(order) * (dense - 1), np.float32).reshape(len(order), dense - 1)
        self._gather_dense(order, rows, columns[1:dense])
        ids = columns[dense : dense + len(self._schema.categorical)]
        if self._schema.has_bags:
            weights = dict(zip(self._schema.weight_names, columns[dense + len(ids) :], strict=True))
            self._gather_bags(order, rows, ids, weights, missing_id)
        else:
            self._gather_ids(order, rows, ids, missing_id)

    def _gather_labels(self, order: np.ndarray, rows: np.ndarray, column: Sequence[pa.Array]) -> None:
        bad = kernels.gather_labels(order, rows, *_addresses(column), self._labels)
        if bad >= 0:
            raise self._bad_value(self._schema.label, column, bad, "labels must be 0 or 1")

    def _gather_dense(self, order: np.ndarray, rows: np.ndarray, columns: Sequence[Sequence[pa.Array]]) -> None:
        schema = self._schema
        mean, scale = np.zeros(len(columns)), np.ones(len(columns))
        if schema.dense_transform == "standardise":
            mean = np.array([column.mean or 0.0 for column in schema.dense])
            scale = np.array([1.0 / column.deviation if column.deviation else 0.0 for column in schema.dense])
        data, valid, bit = _stacked(columns, len(rows))
        bad = kernels.gather_dense(
            order,
            rows,
            _kinds(columns),
            data,
            valid,
            bit,
            _TRANSFORMS[schema.dense_transform],
            kernels.LOG1P_TABLE,
            mean,
            scale,
            self._dense,
        )
        if bad >= 0:
            row, k = divmod(bad, len(columns))
            advice = "write a null where a value is missing"
            raise self._bad_value(schema.dense_names[k], columns[k], row, advice)

    def _gather_ids(
        self, order: np.ndarray, rows: np.ndarray, columns: Sequence[Sequence[pa.Array]], missing_id: int
    ) -> None:
        self._values = _allocate(len(order) * len(columns), np.int64)
        data, valid, bit = _stacked(columns, len(rows))
        bad = kernels.gather_ids(order, rows, *self._cuts, _kinds(columns), data, valid, bit, missing_id, self._values)
        if bad >= 0:
            row, f = divmod(bad, len(columns))
            raise self._bad_value(self._schema.categorical_names[f], columns[f], row, _negative(missing_id))

    def _gather_bags(
        self,
        order: np.ndarray,
        rows: np.ndarray,
        columns: Sequence[Sequence[pa.Array]],
        weights: dict[str, list[pa.Array]],
        missing_id: int,
    ) -> None:
        features = len(columns)
        bags = [
            self._stage(name, column, rows, weights.get(described.weights or ""), missing_id)
            for name, column, described in zip(
                self._schema.categorical_names, columns, self._schema.categorical, strict=True
            )
        ]
        offsets = np.zeros(features * len(order) + 1, np.int64)
        for f, bag in enumerate(bags):
            bag_kernels.bag_sizes(order, *self._cuts, f, features, bag.sizes, offsets)
        np.cumsum(offsets, out=offsets)
        self._values = _allocate(int(offsets[-1]), np.int64)
        found = _allocate(int(offsets[-1]) if weights else 0, np.float32)
        for f, bag in enumerate(bags):
            bag_kernels.fill_bags(
                order, *self._cuts, f, features, bag.begins, bag.values, bag.weights, offsets, self._values, found
            )
        self._offsets, self._weights = offsets, found if weights else None

    def _stage(
        self,
        name: str,
        column: Sequence[pa.Array],
        rows: np.ndarray,
        weights: Sequence[pa.Array] | None,
        missing_id: int,
    ) -> _Bags:
        """A column of ids, which are bags of one, or of lists; a null list is an empty bag."""
        begins, sizes = np.arange(rows.sum()), np.ones(rows.sum(), np.int64)
        inside = list(column)
        if is_list(column[0].type):
            begins, sizes, inside = _flat(column)
        counts = np.array([len(array) for array in inside], np.int64)
        values = np.empty(counts.sum(), np.int64)
        kind = _KINDS[inside[0].type]
        bad = kernels.stage_ids(kind, counts, *_addresses(inside), missing_id, values)
        if bad >= 0:
            row = int(np.flatnonzero((begins <= bad) & (bad < begins + sizes))[0])
            raise self._bad_value(name, column, row, _negative(missing_id))
        if weights is None:
            return _Bags(begins, sizes, values, _NO_WEIGHTS)
        _, own_sizes, inside = _flat(weights)
        if not np.array_equal(sizes, own_sizes):
            row = int(np.flatnonzero(sizes != own_sizes)[0])
            advice = f"expected a weight for each of the {sizes[row]} ids of {name!r}"
            raise self._bad_value(self._weights_of(name), weights, row, advice)
        staged = np.empty(sum(map(len, inside)), np.float32)
        bad = bag_kernels.stage_weights(
            np.array([len(array) for array in inside], np.int64), *_addresses(inside), staged
        )
        if bad >= 0:
            row = int(np.flatnonzero((begins <= bad) & (bad < begins + sizes))[0])
            raise self._bad_value(self._weights_of(name), weights, row, "weights must be finite")
        return _Bags(begins, sizes, values, staged)

    def _weights_of(self, name: str) -> str:
        return next(column.weights or "" for column in self._schema.categorical if column.name == name)

    @property
    def exhausted(self) -> bool:
        return self._at == len(self._labels)

    def take(self) -> Piece:
        """Views of the rows up to the next cut (the offsets are a copy)."""
        begin = self._at
        self._at = end = min(len(self._labels), begin + (self._cuts[1] if begin else self._cuts[0]))
        features = len(self._schema.categorical)
        first, last, offsets = features * begin, features * end, None
        if self._offsets is not None:
            offsets = self._offsets[first : last + 1] - self._offsets[first]
            first, last = int(self._offsets[first]), int(self._offsets[last])
        weights = None if self._weights is None else self._weights[first:last]
        return Piece(self._labels[begin:end], self._dense[begin:end], self._values[first:last], offsets, weights)

    def _bad_value(self, name: str, column: Sequence[pa.Array], row: int, advice: str) -> DataError:
        """row: of the window."""
        ends = np.cumsum([len(array) for array in column])
        chunk = int(np.searchsorted(ends, row, side="right"))
        within = row - int(ends[chunk]) + len(column[chunk])
        group = self._window.groups[chunk]
        file = self._reader.files[group.file]
        place = sum(file.rows[: group.group]) + within
        return DataError(f"{file.path}: column {name!r}, row {place}: found {column[chunk][within].as_py()}; {advice}")


def _negative(missing_id: int) -> str:
    return f"ids must be 0 or more; write a null, or {missing_id} (data.missing_id), where an id is missing"


def _flat(column: Sequence[pa.Array]) -> tuple[np.ndarray, np.ndarray, list[pa.Array]]:
    """(begins int64 [rows] in the values of all chunks, sizes int64 [rows], the values of each chunk)."""
    begins, sizes, inside, base = [], [], [], 0
    for array in column:
        offsets = array.offsets.to_numpy()
        begins.append(offsets[:-1] - offsets[0] + base)
        sizes.append(np.diff(offsets))
        inside.append(array.values.slice(offsets[0], offsets[-1] - offsets[0]))
        base += len(inside[-1])
    return np.concatenate(begins), np.concatenate(sizes), inside


def _kinds(columns: Sequence[Sequence[pa.Array]]) -> np.ndarray:
    return np.array([_KINDS[column[0].type] for column in columns], np.int64)


def _addresses(column: Sequence[pa.Array]) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Values, validity bitmaps (0: no nulls) and offsets into these, uint64 [chunks], of Arrow arrays."""
    data, valid, bit = np.array([_address(array) for array in column], np.uint64).T.copy()
    return data, valid, bit


def _stacked(columns: Sequence[Sequence[pa.Array]], chunks: int) -> np.ndarray:
    """`_addresses` of each column: uint64 [3, columns, chunks]."""
    found = [_address(array) for column in columns for array in column]
    return np.array(found, np.uint64).reshape(len(columns), chunks, 3).transpose(2, 0, 1).copy()


def _address(array: pa.Array) -> tuple[int, int, int]:
    bitmap, values = array.buffers()
    begin = (values.address if values is not None else 0) + array.offset * (array.type.bit_width // 8)
    return (begin, bitmap.address, array.offset) if array.null_count else (begin, 0, 0)


def _allocate(size: int, dtype: type[np.generic]) -> np.ndarray:
    """From Arrow's pool, which keeps pages: a fresh large numpy array costs a page fault every 4 KiB."""
    return np.frombuffer(pa.allocate_buffer(size * np.dtype(dtype).itemsize), dtype, size)
