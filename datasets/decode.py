"""Row groups to arrays: decoding a window, and gathering batches out of its Arrow buffers."""

from __future__ import annotations

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
    """A window's columns in memory, and the addresses of their buffers for the gather kernels."""

    def __init__(self, reader: RowGroupReader, window: Window, order: np.ndarray) -> None:
        self.order = order
        self._groups = window.groups
        self._files, self._schema = reader.files, reader.schema
        self._chunks = [reader.read(group) for group in window.groups]  # keeps the buffers alive
        shape = (len(self._schema.columns), len(self._chunks))
        self._data, self._valid, self._bit = (
            np.zeros(shape, np.uint64),
            np.zeros(shape, np.uint64),
            np.zeros(shape, np.int64),
        )
        for c, arrays in enumerate(self._chunks):
            for k, array in enumerate(arrays):
                bitmap, values = array.buffers()
                self._data[k, c] = values.address + array.offset * (array.type.bit_width // 8)
                if array.null_count:
                    self._valid[k, c], self._bit[k, c] = bitmap.address, array.offset
        self._kinds = np.array([_KINDS.get(array.type, kernels.INT8) for array in self._chunks[0]], np.int64)

    def gather(
        self, begin: int, end: int, at: int, labels: np.ndarray, dense: np.ndarray, ids: np.ndarray, missing_id: int
    ) -> None:
        """Rows begin to end of the window's order into labels [B], dense [B, D], ids [F, B], from place `at` on.

        Raises:
            DataError: a label that is not 0 or 1, a dense value that is NaN or infinite.
        """
        rows, schema = self.order[begin:end], self._schema
        d = slice(1, 1 + len(schema.dense))
        f = slice(d.stop, None)
        bad = kernels.gather_labels(rows, at, self._data[0], self._valid[0], self._bit[0], labels)
        if bad >= 0:
            raise self._bad_value(rows[bad], 0, "labels must be 0 or 1")
        bad = kernels.gather_dense(
            rows, at, self._kinds[d], self._data[d], self._valid[d], self._bit[d],
            schema.dense_transform == "log1p", kernels.LOG1P_TABLE, dense,
        )  # fmt: skip
        if bad >= 0:
            row, column = divmod(bad, len(schema.dense))
            raise self._bad_value(rows[row], 1 + column, "write a null where a value is missing")
        kernels.gather_ids(rows, at, self._kinds[f], self._data[f], self._valid[f], self._bit[f], missing_id, ids)

    def _bad_value(self, reference: int, column: int, advice: str) -> DataError:
        chunk, row = int(reference) >> 32, int(reference) & 0xFFFFFFFF
        group = self._groups[chunk]
        file, value = self._files[group.file], self._chunks[chunk][column][row].as_py()
        place = sum(file.rows[: group.group]) + row
        name = self._schema.columns[column]
        return DataError(f"{file.path}: column {name!r}, row {place}: found {value}; {advice}")
