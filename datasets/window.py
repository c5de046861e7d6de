"""A window's rows as arrays, taken out of Arrow buffers in the order of the epoch."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import pyarrow as pa

from . import bag_kernels, kernels
from .decode import Columns, RowGroupReader
from .footers import is_list
from .order import RowGroup, Window
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
        self._reader, self._missing_id = reader, missing_id
        self._schema, self._cuts, self._at = reader.schema, (first, share), 0
        self._offsets: np.ndarray | None = None
        self._weights: np.ndarray | None = None
        groups = [reader.read(group) for group in window.groups]
        self._labels = self._take_labels(order, groups)
        self._dense = self._take_dense(order, groups)
        if self._schema.has_bags:
            self._take_bags(order, groups)
        else:
            self._take_ids(order, groups)

    def _take_labels(self, order: np.ndarray, groups: Sequence[Columns]) -> np.ndarray:
        name, staged, begin = self._schema.label, np.empty(_rows(groups), np.int8), 0
        for columns in groups:
            column, end = columns.take(name), begin + columns.group.rows
            bad = kernels.stage_labels(*_address(column), staged[begin:end])
            if bad >= 0:
                raise self._bad_value(name, columns.group, column, bad, "labels must be 0 or 1")
            begin = end
        labels = _allocate(len(order), np.float32)
        kernels.take_labels(order, staged, labels)
        return labels

    def _take_dense(self, order: np.ndarray, groups: Sequence[Columns]) -> np.ndarray:
        names, rows = self._schema.dense_names, _rows(groups)
        staged, begin = _allocate(rows * len(names), np.float32).reshape(rows, len(names)), 0
        for columns in groups:
            end = begin + columns.group.rows
            self._stage_dense(columns.group, [columns.take(name) for name in names], staged[begin:end])
            begin = end
        dense = _allocate(len(order) * len(names), np.float32).reshape(len(order), len(names))
        kernels.take_dense(order, staged, dense)
        return dense

    def _stage_dense(self, group: RowGroup, columns: Sequence[pa.Array], out: np.ndarray) -> None:
        schema = self._schema
        mean, scale = np.zeros(len(columns)), np.ones(len(columns))
        if schema.dense_transform == "standardise":
            mean = np.array([column.mean or 0.0 for column in schema.dense])
            scale = np.array([1.0 / column.deviation if column.deviation else 0.0 for column in schema.dense])
        kinds = np.array([_KINDS[column.type] for column in columns], np.int64)
        data, valid, bit = np.array([_address(column) for column in columns], np.uint64).reshape(-1, 3).T.copy()
        way = _TRANSFORMS[schema.dense_transform]
        bad = kernels.stage_dense(kinds, data, valid, bit, way, kernels.LOG1P_TABLE, mean, scale, out)
        if bad >= 0:
            row, k = divmod(bad, len(columns))
            advice = "write a null where a value is missing"
            raise self._bad_value(schema.dense_names[k], group, columns[k], row, advice)

    def _take_ids(self, order: np.ndarray, groups: Sequence[Columns]) -> None:
        names = self._schema.categorical_names
        self._values = _allocate(len(order) * len(names), np.int64)
        narrow, wide = (_allocate(_rows(groups), dtype) for dtype in (np.int32, np.int64))
        for f, name in enumerate(names):
            staged, begin = narrow, 0
            for columns in groups:
                column, end = columns.take(name), begin + columns.group.rows
                bad = self._stage_ids(column, staged[begin:end])
                if bad == kernels.TOO_WIDE:
                    staged = wide
                    staged[:begin] = narrow[:begin]
                    bad = self._stage_ids(column, staged[begin:end])
                if bad >= 0:
                    raise self._bad_value(name, columns.group, column, bad, _negative(self._missing_id))
                begin = end
            kernels.take_ids(order, *self._cuts, f, len(names), staged, self._values)

    def _stage_ids(self, column: pa.Array, out: np.ndarray) -> int:
        return int(kernels.stage_ids(_KINDS[column.type], *_address(column), self._missing_id, out))

    def _take_bags(self, order: np.ndarray, groups: Sequence[Columns]) -> None:
        features, weighted = len(self._schema.categorical), bool(self._schema.weight_names)
        weights = {name: [columns.take(name) for columns in groups] for name in self._schema.weight_names}
        bags = []
        for feature in self._schema.categorical:
            name = feature.weights or ""
            own = weights.get(name, [None] * len(groups))
            chunks = [
                self._stage_bags(columns.group, feature.name, columns.take(feature.name), name, weight)
                for columns, weight in zip(groups, own, strict=True)
            ]
            bags.append(_joined(chunks))
        offsets = np.zeros(features * len(order) + 1, np.int64)
        for f, bag in enumerate(bags):
            bag_kernels.bag_sizes(order, *self._cuts, f, features, bag.sizes, offsets)
        np.cumsum(offsets, out=offsets)
        self._values = _allocate(int(offsets[-1]), np.int64)
        found = _allocate(int(offsets[-1]) if weighted else 0, np.float32)
        for f, bag in enumerate(bags):
            bag_kernels.fill_bags(
                order, *self._cuts, f, features, bag.begins, bag.values, bag.weights, offsets, self._values, found
            )
        self._offsets, self._weights = offsets, found if weighted else None

    def _stage_bags(
        self, group: RowGroup, name: str, column: pa.Array, weights_name: str, weights: pa.Array | None
    ) -> _Bags:
        """A column of ids, which are bags of one, or of lists; a null list is an empty bag."""
        begins, sizes, inside = np.arange(len(column)), np.ones(len(column), np.int64), column
        if is_list(column.type):
            begins, sizes, inside = _flat(column)
        values = np.empty(len(inside), np.int64)
        bad = self._stage_ids(inside, values)
        if bad >= 0:
            row = int(np.flatnonzero((begins <= bad) & (bad < begins + sizes))[0])
            raise self._bad_value(name, group, column, row, _negative(self._missing_id))
        if weights is None:
            return _Bags(begins, sizes, values, _NO_WEIGHTS)
        _, own_sizes, inside = _flat(weights)
        if not np.array_equal(sizes, own_sizes):
            row = int(np.flatnonzero(sizes != own_sizes)[0])
            advice = f"expected a weight for each of the {sizes[row]} ids of {name!r}"
            raise self._bad_value(weights_name, group, weights, row, advice)
        staged = np.empty(len(inside), np.float32)
        bad = bag_kernels.stage_weights(*_address(inside), staged)
        if bad >= 0:
            row = int(np.flatnonzero((begins <= bad) & (bad < begins + sizes))[0])
            raise self._bad_value(weights_name, group, weights, row, "weights must be finite")
        return _Bags(begins, sizes, values, staged)

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

    def _bad_value(self, name: str, group: RowGroup, column: pa.Array, row: int, advice: str) -> DataError:
        """row: of the row group."""
        file = self._reader.files[group.file]
        place = sum(file.rows[: group.group]) + row
        return DataError(f"{file.path}: column {name!r}, row {place}: found {column[row].as_py()}; {advice}")


def _negative(missing_id: int) -> str:
    return f"ids must be 0 or more; write a null, or {missing_id} (data.missing_id), where an id is missing"


def _flat(array: pa.Array) -> tuple[np.ndarray, np.ndarray, pa.Array]:
    """(begins int64 [rows] in the values, sizes int64 [rows], the values) of lists."""
    offsets = array.offsets.to_numpy()
    inside = array.values.slice(offsets[0], offsets[-1] - offsets[0])
    return offsets[:-1] - offsets[0], np.diff(offsets), inside


def _rows(groups: Sequence[Columns]) -> int:
    return sum(columns.group.rows for columns in groups)


def _joined(chunks: Sequence[_Bags]) -> _Bags:
    """A feature's bags in all row groups of a window, one after another."""
    bases = np.cumsum([0, *(len(chunk.values) for chunk in chunks[:-1])])
    return _Bags(
        np.concatenate([chunk.begins + base for chunk, base in zip(chunks, bases, strict=True)]),
        np.concatenate([chunk.sizes for chunk in chunks]),
        np.concatenate([chunk.values for chunk in chunks]),
        np.concatenate([chunk.weights for chunk in chunks]),
    )


def _address(array: pa.Array) -> tuple[np.uint64, np.uint64, np.uint64]:
    """Values, validity bitmap (0: no nulls) and offset into it of an Arrow array."""
    bitmap, values = array.buffers()
    begin = (values.address if values is not None else 0) + array.offset * (array.type.bit_width // 8)
    nulls = (bitmap.address, array.offset) if array.null_count else (0, 0)
    return np.uint64(begin), np.uint64(nulls[0]), np.uint64(nulls[1])


def _allocate(size: int, dtype: type[np.generic]) -> np.ndarray:
    """From Arrow's pool, which keeps pages: a fresh large numpy array costs a page fault every 4 KiB."""
    return np.frombuffer(pa.allocate_buffer(size * np.dtype(dtype).itemsize), dtype, size)
