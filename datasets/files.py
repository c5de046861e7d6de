"""What the files of a data set hold: their own metadata, the columns that the settings name, and both together."""

from __future__ import annotations

import base64
import fnmatch
import json
import math
from collections.abc import Callable, Sequence
from glob import has_magic
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc
from pydantic import ValidationError

from .batch import MISSING_ID
from .decode import RowGroupReader
from .footers import DataFile, is_list, is_string, read_footers
from .order import Window, row_order
from .schema import (
    FREQUENT_IDS,
    METADATA_KEY,
    SKETCH_KEY,
    CategoricalColumn,
    DataConfig,
    DataError,
    DenseColumn,
    Schema,
)
from .sketch import IdSketch
from .window import DecodedWindow

_STATISTICS_GROUPS = 1024


def load_schema(path: str, config: DataConfig | None = None, *, labels: bool = False) -> Schema:
    """The schema of the data set at `path`, from its files' metadata; columns named in `config` take precedence.

    labels: read those of the first row group, too.

    Raises:
        DataError: files of different columns, columns that are missing or of a type that their role does not allow,
            files that were not written by embershard and no columns named, or a label that is neither 0 nor 1.
    """
    files = read_footers(path)
    schema = schema_of(path, files, config)
    RowGroupReader(files, schema)  # said before anything is started, not when the first row is read
    if labels:
        check_labels(files, schema)
    return schema


def check_labels(files: Sequence[DataFile], schema: Schema) -> None:
    """Reads the labels of the first row group: a column that holds ratings shows there.

    Raises:
        DataError: one of them is neither 0 nor 1; its row is named.
    """
    reader = RowGroupReader(files, schema.model_copy(update={"dense": [], "categorical": []}))
    if first := next((group for group in reader.row_groups() if group.rows), None):
        window = Window(0, (first,))
        order = row_order(0, 0, window, shuffled=False)
        DecodedWindow(reader, window, order, first.rows, first.rows, MISSING_ID)
    reader.close()


def schema_of(path: str, files: Sequence[DataFile], config: DataConfig | None = None) -> Schema:
    """As `load_schema`, for footers that have been read."""
    config = config or DataConfig()
    schemas = [_embedded(file) for file in files]
    if any(schema is None for schema in schemas):
        bare = files[schemas.index(None)]
        stated = _foreign(path, bare, files, config)
    else:
        stated = _merge(files, [schema for schema in schemas if schema is not None])
    schema = _select(stated, files[0], config)
    if schema.dense_transform == "standardise" and any(c.mean is None or c.deviation is None for c in schema.dense):
        schema = schema.model_copy(update={"dense": _with_moments(files, schema.dense)})
    return schema


def _embedded(file: DataFile) -> Schema | None:
    if METADATA_KEY not in file.metadata:
        return None
    try:
        return Schema.model_validate_json(file.metadata[METADATA_KEY])
    except ValidationError as error:
        raise DataError(
            f"{file.path}: its embershard metadata cannot be read (written by another version?): convert it again"
        ) from error


def _foreign(path: str, bare: DataFile, files: Sequence[DataFile], config: DataConfig) -> Schema:
    if config.label is None or (config.categorical is None and config.bags is None):
        raise DataError(
            f"{bare.path}: no embershard metadata, so name its columns: give data.label=..., data.categorical=[...] or "
            f"data.bags=[...], and data.dense=[...] if there are any (`embershard inspect {path}` proposes them)"
        )
    names = _match(config.dense, "data.dense", bare, {config.label}, _is_number)
    types = [file.arrow_schema.field(n).type for file in files for n in names if n in file.arrow_schema.names]
    return Schema(
        source="parquet",
        label=config.label,
        dense=[],
        categorical=[],
        # A count is heavy-tailed; a float has usually been scaled by its owner.
        dense_transform="log1p" if all(pa.types.is_integer(t) for t in types) else "none",
        rows=sum(sum(file.rows) for file in files),
    )


def _select(schema: Schema, file: DataFile, config: DataConfig) -> Schema:
    """The schema with the columns that the settings name, in their order."""
    label = config.label or schema.label
    plain = [column.name for column in schema.categorical if not column.bag]
    bags = [column.name for column in schema.categorical if column.bag]
    named = {label, *(n for given in (config.dense, config.categorical, config.bags) for n in given or ())}
    chosen = {
        "dense": _match(config.dense, "data.dense", file, named, _is_number, schema.dense_names),
        "categorical": _match(config.categorical, "data.categorical", file, named, _is_plain, plain),
        "bags": _match(config.bags, "data.bags", file, named, _is_bag, bags),
    }
    _check_roles(label, chosen)
    if unknown := sorted(set(config.bag_weights) - set(chosen["bags"])):
        raise DataError(
            f"data.bag_weights: {unknown[0]!r} is not one of data.bags: {', '.join(chosen['bags']) or 'none'}"
        )
    dense = {column.name: column for column in schema.dense}
    categorical = {column.name: column for column in schema.categorical}
    columns = [categorical.get(name, CategoricalColumn(name=name)) for name in chosen["categorical"]]
    for name in chosen["bags"]:
        found = categorical.get(name, CategoricalColumn(name=name))
        weights = config.bag_weights.get(name, found.weights)
        columns.append(found.model_copy(update={"bag": True, "weights": weights}))
    changes: dict[str, Any] = {
        "dense": [dense.get(name, DenseColumn(name=name)) for name in chosen["dense"]],
        "categorical": columns,
        "dense_transform": config.dense_transform or schema.dense_transform,
    }
    if label != schema.label:
        changes |= {"label": label, "positives": None, "best_auc": None}
    return schema.model_copy(update=changes)


def _is_number(found: pa.DataType) -> bool:
    return bool(pa.types.is_integer(found) or pa.types.is_floating(found))


def _is_plain(found: pa.DataType) -> bool:
    return bool(pa.types.is_integer(found) or is_string(found))


def _is_bag(found: pa.DataType) -> bool:
    return is_list(found) and _is_plain(found.value_type)


def _match(
    given: Sequence[str] | None,
    setting: str,
    file: DataFile,
    named: set[str],
    fits: Callable[[pa.DataType], bool],
    otherwise: Sequence[str] = (),
) -> list[str]:
    """Names as they are; patterns as the columns of a fitting type that no setting names, in the file's order."""
    if given is None:
        return list(otherwise)
    chosen: list[str] = []
    for name in given:
        if not has_magic(name) or name in file.arrow_schema.names:
            chosen.append(name)
            continue
        found = [f.name for f in file.arrow_schema if fnmatch.fnmatchcase(f.name, name) and f.name not in named]
        found = [n for n in found if fits(file.arrow_schema.field(n).type)]
        if not found:
            has = ", ".join(file.arrow_schema.names[:8])
            raise DataError(f"{setting}: no column of {file.path} that fits matches {name!r}; it has {has}")
        chosen += [n for n in found if n not in chosen]
    return chosen


def _check_roles(label: str, chosen: dict[str, list[str]]) -> None:
    roles = {label: "data.label"}
    for role, names in chosen.items():
        for name in names:
            if name in roles:
                raise DataError(f"data.{role}: column {name!r} is named twice, also in {roles[name]}")
            roles[name] = f"data.{role}"


def _with_moments(files: Sequence[DataFile], columns: Sequence[DenseColumn]) -> list[DenseColumn]:
    """The columns with mean and deviation, from one pass over at most 1,024 row groups spread over the data set."""
    groups = [(file, group) for file in files for group in range(len(file.rows))]
    step = -(-len(groups) // _STATISTICS_GROUPS)
    moments = {column.name: (0, 0.0, 0.0) for column in columns}
    for file, group in groups[::step]:
        stored = [name for name in moments if name in file.arrow_schema.names and name not in file.partitions]
        with file.open() as parquet:
            table = parquet.read_row_group(group, columns=stored)
        for name in stored:
            values = table.column(name).cast(pa.float64())
            present = len(values) - values.null_count
            if present:
                one = (present, pc.mean(values).as_py(), pc.variance(values).as_py() * present)
                if not math.isfinite(one[2]):
                    raise DataError(
                        f"{file.path}: column {name!r}: found nan or inf; write a null where a value is missing"
                    )
                moments[name] = join_moments(moments[name], one)
    return [
        column.model_copy(update={"mean": mean, "deviation": math.sqrt(squares / max(1, count))})
        for column in columns
        for count, mean, squares in [moments[column.name]]
    ]


def join_moments(a: tuple[int, float, float], b: tuple[int, float, float]) -> tuple[int, float, float]:
    """(count, mean, sum of squared differences from the mean) of two samples together (Chan et al. 1979)."""
    count = a[0] + b[0]
    if not count:
        return a
    delta = b[1] - a[1]
    return count, a[1] + delta * b[0] / count, a[2] + b[2] + delta * delta * a[0] * b[0] / count


def _merge(files: Sequence[DataFile], schemas: Sequence[Schema]) -> Schema:
    """One schema for all files: rows and positives added, shares weighted, distinct counts from the merged sketches."""
    first = schemas[0]
    for file, schema in zip(files, schemas, strict=True):
        if schema.columns != first.columns or schema.dense_transform != first.dense_transform:
            raise DataError(
                f"{file.path}: its columns differ from those of {files[0].path}: give each kind of data a folder"
            )
    rows = sum(schema.rows for schema in schemas)
    positives = [schema.positives for schema in schemas]
    sketch = merged_sketch(files)
    distinct = sketch.distinct() if sketch is not None else {}
    frequent = frequent_ids(sketch) if sketch is not None else {}
    dense = [_merge_dense([s.dense[i] for s in schemas], schemas) for i in range(len(first.dense))]
    cardinalities = [_common([s.categorical[i].cardinality for s in schemas]) for i in range(len(first.categorical))]
    categorical = [
        CategoricalColumn(
            name=column.name,
            distinct=_at_most(distinct.get(column.name), cardinalities[i], None if column.bag else rows),
            frequent=frequent.get(column.name),
            cardinality=cardinalities[i],
            missing=_share([s.categorical[i].missing for s in schemas], schemas),
            bag=column.bag,
            weights=column.weights,
        )
        for i, column in enumerate(first.categorical)
    ]
    return first.model_copy(
        update={
            "rows": rows,
            "positives": None if None in positives else sum(p or 0 for p in positives),
            "dense": dense,
            "categorical": categorical,
            "best_auc": first.best_auc if len({s.best_auc for s in schemas}) == 1 else None,
        }
    )


def _merge_dense(columns: Sequence[DenseColumn], schemas: Sequence[Schema]) -> DenseColumn:
    missing = _share([column.missing for column in columns], schemas)
    moments = (0, 0.0, 0.0)
    for column, schema in zip(columns, schemas, strict=True):
        if column.mean is None or column.deviation is None or column.missing is None:
            return DenseColumn(name=columns[0].name, missing=missing)
        count = round(schema.rows * (1.0 - column.missing))
        moments = join_moments(moments, (count, column.mean, column.deviation**2 * count))
    deviation = math.sqrt(moments[2] / max(1, moments[0]))
    return DenseColumn(name=columns[0].name, missing=missing, mean=moments[1], deviation=deviation)


def _share(shares: Sequence[float | None], schemas: Sequence[Schema]) -> float | None:
    rows = sum(schema.rows for schema in schemas)
    if rows == 0 or None in shares:
        return None
    return sum((share or 0.0) * schema.rows for share, schema in zip(shares, schemas, strict=True)) / rows


def _at_most(estimate: int | None, *limits: int | None) -> int | None:
    return None if estimate is None else min(estimate, *(limit for limit in limits if limit is not None), estimate)


def _common(cardinalities: Sequence[int | None]) -> int | None:
    known = [n for n in cardinalities if n is not None]
    return max(known) if len(known) == len(cardinalities) and known else None


def merged_sketch(files: Sequence[DataFile]) -> IdSketch | None:
    """What was counted of the ids over all files, None where a file has nothing of it."""
    merged: IdSketch | None = None
    for file in files:
        if SKETCH_KEY not in file.metadata:
            return None
        sketch = IdSketch.from_bytes(base64.b64decode(file.metadata[SKETCH_KEY]))
        if merged is None:
            merged = sketch
        else:
            merged.merge(sketch)
    return merged


def frequent_ids(sketch: IdSketch) -> dict[str, list[tuple[int, int]]]:
    """(id, count) of each column's most frequent ids, the most frequent first."""
    return {
        name: list(zip(ids.tolist(), counts.tolist(), strict=True))
        for name, (ids, counts) in sketch.frequent(FREQUENT_IDS).items()
    }


def file_metadata(schema: Schema, sketch: IdSketch) -> dict[str, str]:
    """What is written into a Parquet file's key-value metadata."""
    return {
        METADATA_KEY.decode(): json.dumps(schema.model_dump(exclude_none=True)),
        SKETCH_KEY.decode(): base64.b64encode(sketch.to_bytes()).decode(),
    }
