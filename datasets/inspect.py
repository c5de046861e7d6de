"""What a data set holds, for a person who wants to train on it."""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from .batch import MISSING_ID
from .decode import RowGroupReader
from .files import check_labels, frequent_ids, schema_of
from .footers import DataFile, is_list, is_string, read_footers
from .order import Window, row_order
from .schema import METADATA_KEY, DataConfig, DataError, Schema
from .sketch import IdSketch
from .window import DecodedWindow

_EXAMPLES = _SHOWN_IDS = 3
_COUNTED_GROUPS = 16
_LABELS = ("label", "click", "clicked", "is_click", "target", "y")
_DENSE = re.compile(r"(i|int|dense|num)_?\d+", re.IGNORECASE)
_ROW_NUMBER = re.compile(r"__index_level_\d+__")  # what pandas calls an index that nobody named


def describe(path: str, verify: bool = False) -> dict[str, Any]:
    """Summarises the Parquet data set at `path`, also one that was not written by embershard.

    Returns:
        {source, files, row_groups, rows, bytes (on disk), positives, label_rate, counted_rows, best_auc, columns,
        examples, mapping, not_counted}, None where nobody counted. not_counted, only where `train` would refuse the
        columns of the mapping too: why. counted_rows: the rows that positives, label_rate, distinct and
        frequent were counted on, all or a sample. columns: a dict per column with name, role (label, dense,
        categorical, bag, weights, unused), type, distinct, cardinality, missing (share of nulls), frequent (the most
        frequent ids, each with how often it comes at least). examples: the first rows. mapping: the settings
        data.label, data.dense and so on, proposed from names and types where the files do not state them. With `verify`
        every row is read, and problems lists what is wrong with it, nothing if all is well.

    Raises:
        DataError: nothing there, a file that is not Parquet, or files of different columns.
    """
    files = read_footers(path)
    stated = all(METADATA_KEY in file.metadata for file in files)
    mapping = None if stated else _propose(files[0])
    schema = None if mapping and mapping["label"] is None else schema_of(path, files, DataConfig(**(mapping or {})))
    if schema is not None:
        mapping = mapping or _stated(schema)
    rows = sum(sum(file.rows) for file in files)
    positives = schema.positives if schema is not None else None
    sketch: IdSketch | None = None
    counted_rows, reason = (rows if positives is not None else None), None
    if schema is not None and positives is None and rows:
        try:
            check_labels(files, schema)
            counted_rows, positives, sketch = _count(files, schema)
        except DataError as error:
            reason = str(error)
    summary: dict[str, Any] = {
        "source": schema.source if stated and schema is not None else "parquet",
        "files": len(files),
        "row_groups": sum(len(file.rows) for file in files),
        "rows": rows,
        "bytes": sum(file.size for file in files),
        "positives": positives,
        "label_rate": positives / counted_rows if positives is not None and counted_rows else None,
        "counted_rows": counted_rows,
        "best_auc": schema.best_auc if schema is not None else None,
        "columns": _columns(files, schema, mapping or {}, sketch),
        "examples": _examples(files[0]),
        "mapping": {f"data.{role}": names for role, names in (mapping or {}).items()},
    }
    if reason is not None:
        summary["not_counted"] = reason
    if verify:
        summary["problems"] = ["no label column was found"] if schema is None else _verify(files, schema)
    return summary


def _propose(file: DataFile) -> dict[str, Any]:
    """Roles by name and type: a label; floats and i1, i2, ... as dense values; other integers and strings as ids; lists
    of these as bags, with lists of floats called like a bag and _weights as its weights."""
    fields = {field.name: field.type for field in file.arrow_schema}
    known = {name.lower(): name for name in fields}
    label = next((known[name] for name in _LABELS if name in known), None)
    rest = {name: of for name, of in fields.items() if name != label and not _ROW_NUMBER.fullmatch(name)}
    dense = [
        n for n, of in rest.items() if pa.types.is_floating(of) or (pa.types.is_integer(of) and _DENSE.fullmatch(n))
    ]
    categorical = [n for n, of in rest.items() if (pa.types.is_integer(of) or is_string(of)) and n not in dense]
    lists = {name: of.value_type for name, of in rest.items() if is_list(of)}
    bags = [name for name, of in lists.items() if pa.types.is_integer(of) or is_string(of)]
    weights = {
        n: w for n in bags for w in (f"{n}_weights", f"{n}_weight") if pa.types.is_floating(lists.get(w, pa.null()))
    }
    found: dict[str, Any] = {"label": label, "dense": dense, "categorical": categorical}
    return found | ({"bags": bags} if bags else {}) | ({"bag_weights": weights} if weights else {})


def _stated(schema: Schema) -> dict[str, Any]:
    """The mapping that the files' own metadata states."""
    plain = [column.name for column in schema.categorical if not column.bag]
    bags = [column.name for column in schema.categorical if column.bag]
    stated = {"label": schema.label, "dense": schema.dense_names, "categorical": plain}
    return stated | ({"bags": bags} if bags else {})


def _count(files: Sequence[DataFile], schema: Schema) -> tuple[int, int, IdSketch]:
    """(rows, those of label 1, the ids per column) of at most 16 row groups spread over the data set."""
    reader, rows, positives = RowGroupReader(files, schema), 0, 0
    sketch = IdSketch(schema.categorical_names)
    groups = reader.row_groups()
    first = 1 + len(schema.dense)
    for group in groups[:: -(-len(groups) // _COUNTED_GROUPS) or 1]:
        columns = reader.read(group)
        arrays = [columns.take(name) for name in schema.columns]
        rows += group.rows
        positives += pc.sum(pc.equal(arrays[0], 1)).as_py() or 0
        for f, array in enumerate(arrays[first : first + len(sketch.columns)]):
            values = (array.flatten() if is_list(array.type) else array).drop_null()
            sketch.add(f, values.to_numpy().astype(np.int64))
    reader.close()
    return rows, positives, sketch


def _columns(
    files: Sequence[DataFile], schema: Schema | None, mapping: dict[str, Any], sketch: IdSketch | None
) -> list[dict[str, Any]]:
    roles = dict.fromkeys(mapping.get("dense", []), "dense")
    roles |= dict.fromkeys(mapping.get("categorical", []), "categorical") | {mapping.get("label"): "label"}
    roles |= dict.fromkeys(mapping.get("bags", []), "bag")
    roles |= dict.fromkeys(mapping.get("bag_weights", {}).values(), "weights")
    known = {column.name: column for column in schema.categorical} if schema is not None else {}
    distinct = {name: column.distinct for name, column in known.items()}
    frequent = {name: column.frequent or [] for name, column in known.items()}
    if sketch is not None:
        distinct |= sketch.distinct()
        frequent |= frequent_ids(sketch)
    nulls = _nulls(files)
    return [
        {
            "name": field.name,
            "role": roles.get(field.name, "unused"),
            "type": str(field.type),
            "distinct": distinct.get(field.name),
            "cardinality": known[field.name].cardinality if field.name in known else None,
            "missing": nulls.get(field.name),
            "frequent": dict(frequent.get(field.name, [])[:_SHOWN_IDS]) or None,
        }
        for field in files[0].arrow_schema
    ]


def _nulls(files: Sequence[DataFile]) -> dict[str, float]:
    """Shares of nulls from the statistics in the footers, for the columns that have them everywhere."""
    nulls: dict[str, int] = {}
    unknown: set[str] = set()
    for file in files:
        with file.open() as parquet:
            footer = parquet.metadata
            for group in range(footer.num_row_groups):
                for number in range(footer.num_columns):
                    chunk = footer.row_group(group).column(number)
                    if chunk.statistics is not None and chunk.statistics.has_null_count:
                        nulls[chunk.path_in_schema] = nulls.get(chunk.path_in_schema, 0) + chunk.statistics.null_count
                    else:
                        unknown.add(chunk.path_in_schema)
    rows = max(1, sum(sum(file.rows) for file in files))
    return {name: count / rows for name, count in nulls.items() if name not in unknown}


def _examples(file: DataFile) -> list[dict[str, Any]]:
    with file.open() as parquet:
        return _first_rows(parquet)


def _first_rows(parquet: pq.ParquetFile) -> list[dict[str, Any]]:
    for batch in parquet.iter_batches(batch_size=_EXAMPLES):
        rows: list[dict[str, Any]] = batch.to_pylist()
        return rows
    return []


def _verify(files: Sequence[DataFile], schema: Schema) -> list[str]:
    """Reads every row as training would."""
    problems: list[str] = []
    positives = 0
    try:
        reader = RowGroupReader(files, schema)
    except DataError as error:
        return [str(error)]
    for group in reader.row_groups():
        window = Window(0, (group,))
        try:
            order = row_order(0, 0, window, shuffled=False)
            labels = DecodedWindow(reader, window, order, group.rows, group.rows, MISSING_ID).take().labels
            positives += int(labels.sum(dtype=np.float64))
        except DataError as error:
            problems.append(str(error))
    reader.close()
    if not problems and schema.positives is not None and positives != schema.positives:
        problems.append(f"{positives} rows have label 1, the metadata says {schema.positives}")
    return problems
