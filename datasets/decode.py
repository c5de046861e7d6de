"""Row groups to Arrow arrays of few types: what a column may hold, and reading it."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Sequence

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from . import bag_kernels
from .footers import DataFile, is_list, is_string
from .order import RowGroup
from .schema import DataError, Schema

LABEL = pa.int8()
HASHED = pa.string()  # stands for all types of text and bytes; handed out as int64
_NUMBERS = (pa.int32(), pa.int64(), pa.float32(), pa.float64())
_WEIGHTS = pa.large_list(pa.float32())
_OPEN_FILES = 256
_FOOTER_BYTES = 128 << 20  # of open files together; reading a footer anew takes as long as decoding thousands of rows
_FOOTER_GROWTH = 6  # bytes in memory per byte on disk
_OFFSET_BYTES = _ID_BYTES = 8


def storage(file: DataFile, schema: Schema) -> dict[str, pa.DataType]:
    """The type in which each column of a file is handed on; HASHED, also in a list, for strings.

    Raises:
        DataError: a column is missing or cannot be a label, a dense value, an id, a bag or weights.
    """
    dense, weights = set(schema.dense_names), set(schema.weight_names)
    bags = {column.name for column in schema.categorical if column.bag}
    types = {}
    for name in schema.columns:
        found = _found(file, name)
        if name == schema.label:
            usable, wanted = _is_number(found) or pa.types.is_boolean(found), "0 or 1"
            stored = LABEL
        elif name in dense:
            usable, wanted = _is_number(found), "an integer or a float"
            stored = found if found in _NUMBERS else pa.float64()
        elif name in bags:
            usable, wanted = is_list(found) and _is_id(found.value_type), "a list of integer or string ids"
            stored = pa.large_list(_stored_id(found.value_type, widest=True)) if usable else found
        elif name in weights:
            usable, wanted = is_list(found) and _is_number(found.value_type), "a list of weights"
            stored = _WEIGHTS
        else:
            usable, wanted = _is_id(found), "an integer id or a string (lists of ids go into data.bags)"
            stored = _stored_id(found)
        if not usable:
            raise DataError(f"{file.path}: column {name!r} is {found}, expected {wanted}")
        types[name] = stored
    return types


def _found(file: DataFile, name: str) -> pa.DataType:
    names = file.arrow_schema.names
    if name not in names:
        shown = ", ".join(names[:8]) + (", ..." if len(names) > 8 else "")
        raise DataError(f"{file.path}: no column {name!r}; it has {shown}")
    if names.count(name) > 1:
        raise DataError(f"{file.path}: {names.count(name)} columns are called {name!r}: write it with one of them")
    return file.arrow_schema.field(name).type


def _is_number(found: pa.DataType) -> bool:
    return bool(pa.types.is_integer(found) or pa.types.is_floating(found))


def _is_id(found: pa.DataType) -> bool:
    return bool(pa.types.is_integer(found)) or is_string(found)


def _stored_id(found: pa.DataType, widest: bool = False) -> pa.DataType:
    if is_string(found):
        return HASHED
    return found if found == pa.int32() and not widest else pa.int64()


def _common_types(files: Sequence[DataFile], types: Sequence[dict[str, pa.DataType]]) -> dict[str, pa.DataType]:
    """One type per column for all files: where they differ, the widest of its kind."""
    common = dict(types[0])
    for file, own in zip(files, types, strict=True):
        for name, found in own.items():
            if found == common[name]:
                continue
            if not (_is_number(found) and _is_number(common[name])):
                raise DataError(
                    f"{file.path}: column {name!r} holds {_found(file, name)}, that of {files[0].path} "
                    f"{_found(files[0], name)}: give each kind of data a folder"
                )
            whole = pa.types.is_integer(found) and pa.types.is_integer(common[name])
            common[name] = pa.int64() if whole else pa.float64()
    return common


class Columns:
    """The columns of a decoded row group, each to be asked for once: then its memory is free for the next."""

    def __init__(self, group: RowGroup, decoded: dict[str, pa.Array]) -> None:
        self.group, self._decoded = group, decoded

    def take(self, name: str) -> pa.Array:
        return self._decoded.pop(name)


class RowGroupReader:
    """Decodes row groups; keeps the files that it read last open, in bounded memory. For one thread.

    Where there are bags or strings, their kernels are compiled, or loaded from the cache, before anything is read.
    """

    def __init__(self, files: Sequence[DataFile], schema: Schema) -> None:
        self.files = files
        self.schema = schema
        self.types = _common_types(files, [storage(file, schema) for file in files])
        self._hashed = [name for name, found in self.types.items() if found == HASHED]
        self._open: OrderedDict[int, pq.ParquetFile] = OrderedDict()
        if self._hashed or any(is_list(found) for found in self.types.values()):
            bag_kernels.warm_up()

    def row_groups(self) -> list[RowGroup]:
        """All row groups, with the bytes that they take when decoded."""
        flat = [found for found in self.types.values() if not is_list(found)]
        lists = {name: found.value_type for name, found in self.types.items() if is_list(found)}
        width = sum(_ID_BYTES if found == HASHED else found.bit_width // 8 for found in flat)
        width += len(lists) * _OFFSET_BYTES
        return [
            RowGroup(
                number,
                group,
                rows,
                rows * width + sum(file.cells[n][group] * (4 if of == pa.float32() else 8) for n, of in lists.items()),
            )
            for number, file in enumerate(self.files)
            for group, rows in enumerate(file.rows)
        ]

    def read(self, group: RowGroup) -> Columns:
        """The columns of a row group; ids that are strings as int64.

        Raises:
            DataError: the file changed, is damaged, or holds a value that its column's role does not allow.
        """
        names, parquet = self.schema.columns, self._file(group)
        file = self.files[group.file]
        stored = [name for name in names if name not in file.partitions]
        try:
            table = parquet.read_row_group(group.group, columns=stored, use_threads=False)
        except (pa.ArrowException, OSError) as error:
            raise _unreadable(file, group, error) from error
        if table.num_rows != group.rows:
            raise DataError(
                f"{file.path}: row group {group.group} has {table.num_rows} rows, its footer says {group.rows}"
            )
        arrays = {name: _whole(table.column(name)) for name in stored}
        return Columns(
            group,
            {
                name: self._column(file, name, arrays[name] if name in arrays else _constant(file, name, group.rows))
                for name in names
            },
        )

    def _column(self, file: DataFile, name: str, array: pa.Array) -> pa.Array:
        wanted = self.types[name]
        strings = wanted == HASHED or (is_list(wanted) and wanted.value_type == HASHED)
        if array.type == wanted and not strings:
            return array
        try:
            if wanted == HASHED:
                return _hashed(array)
            if pa.types.is_fixed_size_list(array.type):
                array = _variable(array)
            if strings:
                return _hashed_lists(array)
            return pc.cast(array, wanted)
        except pa.ArrowInvalid as error:
            expected = "labels must be 0 or 1" if name == self.schema.label else f"values must fit {wanted}"
            raise DataError(f"{file.path}: column {name!r}: {expected}: {str(error).splitlines()[0]}") from error

    def _file(self, group: RowGroup) -> pq.ParquetFile:
        """The row group's file. Raises DataError when it has vanished, changed or cannot be read."""
        number = group.file
        if number in self._open:
            self._open.move_to_end(number)
            if self.files[number].is_local:  # one system call; remote files are listed again at the end
                self.files[number].check()
        else:
            file = self.files[number]
            try:
                self._open[number] = file.open([name for name in self._hashed if name not in file.partitions])
            except (pa.ArrowException, OSError) as error:
                raise _unreadable(file, group, error) from error
            while len(self._open) > 1 and (len(self._open) > _OPEN_FILES or self._footers() > _FOOTER_BYTES):
                self._open.popitem(last=False)[1].close()
        return self._open[number]

    def _footers(self) -> int:
        return sum(int(parquet.metadata.serialized_size) for parquet in self._open.values()) * _FOOTER_GROWTH

    def close(self) -> None:
        while self._open:
            self._open.popitem()[1].close()


def _unreadable(file: DataFile, group: RowGroup, error: Exception) -> DataError:
    line = str(error).splitlines()[0].rstrip(".")
    return DataError(f"{file.path}: row group {group.group} cannot be read, the file is damaged: {line}")


def _whole(column: pa.ChunkedArray) -> pa.Array:
    if column.num_chunks == 1:
        return column.chunk(0)
    joined = column.combine_chunks()
    return pa.concat_arrays(joined.chunks) if isinstance(joined, pa.ChunkedArray) else joined


def _constant(file: DataFile, name: str, rows: int) -> pa.Array:
    value, found = file.partitions[name], file.arrow_schema.field(name).type
    return pa.nulls(rows, found) if value is None else pa.repeat(pa.scalar(value, found), rows)


def _hashed(array: pa.Array) -> pa.Array:
    """int64 ids of strings, nulls where they are; strings of a dictionary are hashed once each."""
    if pa.types.is_dictionary(array.type):
        return _hashed(array.dictionary).take(array.indices)
    wide = pa.types.is_large_string(array.type) or pa.types.is_large_binary(array.type)
    _, offsets, content = array.buffers()
    ends = np.frombuffer(offsets, np.int64 if wide else np.int32)[array.offset : array.offset + len(array) + 1]
    ids = np.empty(len(array), np.int64)
    if content is not None:
        bag_kernels.hash_strings(np.uint64(content.address), ends.astype(np.int64), ids)
    else:
        bag_kernels.hash_strings(np.uint64(0), np.zeros(len(array) + 1, np.int64), ids)
    return pa.array(ids, mask=array.is_null().to_numpy(zero_copy_only=False) if array.null_count else None)


def _hashed_lists(array: pa.Array) -> pa.Array:
    """Large lists of int64 ids of lists of strings."""
    offsets = pc.cast(array.offsets, pa.int64())
    missing = array.is_null() if array.null_count else None
    return pa.LargeListArray.from_arrays(offsets, _hashed(array.values), mask=missing)


def _variable(array: pa.Array) -> pa.Array:
    """A fixed-size list as a large list; a null takes no values, as in every other list that comes out of Parquet."""
    missing = array.is_null().to_numpy(zero_copy_only=False)
    offsets = np.concatenate([[0], np.cumsum(np.where(missing, 0, array.type.list_size))])
    return pa.LargeListArray.from_arrays(pa.array(offsets), array.flatten(), mask=pa.array(missing))
