"""Row groups to arrays: decoding a window, and gathering batches out of its Arrow buffers."""

from __future__ import annotations

import math
from collections import OrderedDict
from collections.abc import Sequence

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from . import kernels
from .files import DataFile
from .order import RowGroup, Window
from .schema import DataError, Schema

_KINDS = {
    pa.int32(): kernels.INT32,
    pa.int64(): kernels.INT64,
    pa.float32(): kernels.FLOAT32,
    pa.float64(): kernels.FLOAT64,
}
_OPEN_FILES = 32


def storage(file: DataFile, schema: Schema) -> dict[str, pa.DataType]:
    """The type in which each column of a file is handed to the kernels.

    Raises:
        DataError: a column is missing or cannot be a label, a dense value or an id.
    """
    return {name: _storage(file, name, schema) for name in schema.columns}


def _storage(file: DataFile, name: str, schema: Schema) -> pa.DataType:
    names = file.arrow_schema.names
    if name not in names:
        shown = ", ".join(names[:8]) + (", ..." if len(names) > 8 else "")
        raise DataError(f"{file.path}: no column {name!r}; it has {shown}")
    found = file.arrow_schema.field(name).type
    whole, number = pa.types.is_integer(found), pa.types.is_integer(found) or pa.types.is_floating(found)
    if name == schema.label:
        stored, usable, wanted = pa.int8(), number or pa.types.is_boolean(found), "0 or 1"
    elif name in schema.dense_names:
        stored, usable, wanted = found if found in _KINDS else pa.float64(), number, "an integer or a float"
    else:
        stored, usable, wanted = found if found == pa.int32() else pa.int64(), whole, "an integer id"
    if not usable:
        raise DataError(f"{file.path}: column {name!r} is {found}, expected {wanted}")
    return stored


def _common_types(types: Sequence[dict[str, pa.DataType]]) -> dict[str, pa.DataType]:
    """One type per column for all files: where they differ, the widest of its kind."""
    found = {name: {each[name] for each in types} for name in types[0]}
    return {
        name: of.pop() if len(of) == 1 else pa.int64() if all(map(pa.types.is_integer, of)) else pa.float64()
        for name, of in found.items()
    }


class RowGroupReader:
    """Decodes row groups; keeps the files that it read last open. For one thread."""

    def __init__(self, files: Sequence[DataFile], schema: Schema) -> None:
        self.files = files
        self.schema = schema
        self.types = _common_types([storage(file, schema) for file in files])
        self._open: OrderedDict[int, pq.ParquetFile] = OrderedDict()

    def row_groups(self) -> list[RowGroup]:
        """All row groups, with the bytes that they take when decoded."""
        width = sum(found.bit_width // 8 for found in self.types.values())
        return [
            RowGroup(number, group, rows, rows * width)
            for number, file in enumerate(self.files)
            for group, rows in enumerate(file.rows)
        ]

    def read(self, group: RowGroup) -> list[pa.Array]:
        """One array per column of the schema.

        Raises:
            DataError: the file changed, is damaged, or holds a value that its column's role does not allow.
        """
        file = self.files[group.file]
        try:
            table = self._file(group.file).read_row_group(group.group, columns=self.schema.columns, use_threads=False)
        except (pa.ArrowException, OSError) as error:
            line = str(error).splitlines()[0].rstrip(".")
            raise DataError(
                f"{file.path}: row group {group.group} cannot be read, the file is damaged: {line}"
            ) from error
        if table.num_rows != group.rows:
            raise DataError(
                f"{file.path}: row group {group.group} has {table.num_rows} rows, its footer says {group.rows}"
            )
        return [self._column(file, name, table.column(name), self.types[name]) for name in self.schema.columns]

    def _column(self, file: DataFile, name: str, column: pa.ChunkedArray, wanted: pa.DataType) -> pa.Array:
        array = column.chunk(0) if column.num_chunks == 1 else column.combine_chunks()
        if isinstance(array, pa.ChunkedArray):
            array = pa.concat_arrays(array.chunks)
        if array.type == wanted:
            return array
        try:
            return pc.cast(array, wanted)
        except pa.ArrowInvalid as error:
            expected = "labels must be 0 or 1" if name == self.schema.label else f"values must fit {wanted}"
            raise DataError(f"{file.path}: column {name!r}: {expected}: {str(error).splitlines()[0]}") from error

    def _file(self, number: int) -> pq.ParquetFile:
        if number in self._open:
            self._open.move_to_end(number)
        else:
            self._open[number] = self.files[number].open()
            if len(self._open) > _OPEN_FILES:
                self._open.popitem(last=False)[1].close()
        return self._open[number]

    def close(self) -> None:
        while self._open:
            self._open.popitem()[1].close()


class DecodedWindow:
    """A window's rows as arrays, in reading order, cut where this rank's batches end.

    order: references of the rows to read; first: rows up to the first cut; share: rows between cuts after that.

    Raises:
        DataError: as `RowGroupReader.read`; a label that is not 0 or 1; a dense value that is NaN or infinite.
    """

    def __init__(
        self, reader: RowGroupReader, window: Window, order: np.ndarray, first: int, share: int, missing_id: int
    ) -> None:
        self._schema, self._cuts, self._at = reader.schema, (first, share), 0
        chunks = [reader.read(group) for group in window.groups]
        kinds = np.array([_KINDS.get(reader.types[name], kernels.INT8) for name in self._schema.columns], np.int64)
        data, valid, bit = _addresses(chunks)
        d = slice(1, 1 + len(self._schema.dense))
        f = slice(d.stop, None)
        self._labels = _allocate((len(order),), np.float32)
        self._dense = _allocate((len(order), len(self._schema.dense)), np.float32)
        self._ids = _allocate((len(order) * len(self._schema.categorical),), np.int64)
        bad = kernels.gather_labels(order, data[0], valid[0], bit[0], self._labels)
        if bad >= 0:
            raise _bad_value(reader, window, chunks, order[bad], 0, "labels must be 0 or 1")
        log1p = self._schema.dense_transform == "log1p"
        bad = kernels.gather_dense(order, kinds[d], data[d], valid[d], bit[d], log1p, kernels.LOG1P_TABLE, self._dense)
        if bad >= 0:
            row, column = divmod(bad, len(self._schema.dense))
            raise _bad_value(reader, window, chunks, order[row], 1 + column, "write a null where a value is missing")
        kernels.gather_ids(order, first, share, kinds[f], data[f], valid[f], bit[f], missing_id, self._ids)

    @property
    def exhausted(self) -> bool:
        return self._at == len(self._labels)

    def take(self) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Views of the rows up to the next cut: labels [N], dense [N, D], ids [F, N]."""
        begin = self._at
        self._at = min(len(self._labels), begin + (self._cuts[1] if begin else self._cuts[0]))
        features = len(self._schema.categorical)
        ids = self._ids[features * begin : features * self._at].reshape(features, self._at - begin)
        return self._labels[begin : self._at], self._dense[begin : self._at], ids


def _addresses(chunks: Sequence[Sequence[pa.Array]]) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Values, validity bitmaps (0: no nulls) and offsets into these, uint64 [columns, chunks], of Arrow arrays."""
    data, valid, bit = np.zeros((3, len(chunks[0]), len(chunks)), np.uint64)
    for c, arrays in enumerate(chunks):
        for k, array in enumerate(arrays):
            bitmap, values = array.buffers()
            data[k, c] = values.address + array.offset * (array.type.bit_width // 8)
            if array.null_count:
                valid[k, c], bit[k, c] = bitmap.address, array.offset
    return data, valid, bit


def _allocate(shape: tuple[int, ...], dtype: type[np.generic]) -> np.ndarray:
    """From Arrow's pool, which keeps pages: a fresh large numpy array costs a page fault every 4 KiB."""
    size = math.prod(shape)
    return np.frombuffer(pa.allocate_buffer(size * np.dtype(dtype).itemsize), dtype, size).reshape(shape)


def _bad_value(
    reader: RowGroupReader,
    window: Window,
    chunks: Sequence[Sequence[pa.Array]],
    reference: int,
    column: int,
    advice: str,
) -> DataError:
    chunk, row = int(reference) >> 32, int(reference) & 0xFFFFFFFF
    group = window.groups[chunk]
    file, value = reader.files[group.file], chunks[chunk][column][row].as_py()
    place = sum(file.rows[: group.group]) + row
    return DataError(f"{file.path}: column {reader.schema.columns[column]!r}, row {place}: found {value}; {advice}")
