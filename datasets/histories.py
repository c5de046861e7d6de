"""What people liked, dealt into what a ranker sees and what it should find: one row per person."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from .convert import BadRows, LineBlocks, find_inputs
from .fields import read_fields
from .interactions import columns_of, layout_of, ratings_file
from .schema import METADATA_KEY, CategoricalColumn, DataError, Schema
from .writer import ROW_GROUP_ROWS, DatasetWriter

HISTORY, LIKED = "history", "liked"
HELD_OUT = 0.2  # of the people
_PART = "part-00000.parquet"


def convert_histories(
    inputs: Sequence[str],
    output: str,
    *,
    seed: int = 0,
    positive_from: float = 4.0,
    found_by: int = 1,
    deals: int = 1,
    on_bad_rows: str = "fail",
    name: str = "interactions",
    progress: Callable[[int, int], None] | None = None,
) -> dict[str, Any]:
    """Converts lines `user, item[, rating]` (as `convert_interactions` takes them) to OUTPUT/train and OUTPUT/eval.

    A person's items rated `positive_from` or more (all, where there are no ratings) are dealt at random into the lists
    `history`, the larger half, and `liked`; a pair that repeats counts once. A fifth of the people stand in eval,
    nobody in both. Items are numbered by how many people of train have them, most first (ties by their id). `liked`
    keeps those that at least `found_by` of these people have: its cardinality is their number. Who then has nothing to
    find is left out. With several `deals` everybody in train has so many rows, each dealt anew, so that a ranker does
    not learn one split by heart. label is 1. All pairs are held in memory.

    Returns:
        output, bytes, people and rows (by folder), items, items_to_find, bad_rows, examples.

    Raises:
        DataError: as `convert_interactions`, or nobody is left.
    """
    bad = BadRows(on_bad_rows)
    if name == "movielens":
        inputs = [ratings_file(path) for path in inputs]
    users, items = _read(inputs, positive_from, bad, progress)
    pairs = np.unique(np.stack([users, items], 1), axis=0)
    people, person = np.unique(pairs[:, 0], return_inverse=True)
    rng = np.random.default_rng(seed)
    held_out = rng.permutation(len(people)) < HELD_OUT * len(people)
    number, to_find = _numbered(pairs[:, 1], ~held_out[person], found_by)
    dealt = []
    for _ in range(deals):
        seen = _larger_half(person, len(people), rng)
        dealt.append([_Lists(person[half], number[half], len(people)) for half in (seen, ~seen & (number < to_find))])
    rows = {
        "train": [np.flatnonzero(~held_out & liked.filled) for _, liked in dealt],
        "eval": [np.flatnonzero(held_out & dealt[0][1].filled)],
    }
    for folder, chosen in rows.items():
        if not any(map(len, chosen)):
            raise DataError(f"{inputs[0]}: nobody is left for {folder}: give more rows, or a lower --found-by")
    cardinalities = {HISTORY: int(number.max()) + 1, LIKED: to_find}
    with ExitStack() as both:  # a failure of one leaves nothing of the other
        writers = {folder: both.enter_context(DatasetWriter(f"{output}/{folder}")) for folder in rows}
        try:
            for writer, own in zip(writers.values(), rows.values(), strict=True):
                _write(writer.staged(_PART), name, dealt[: len(own)], own, cardinalities)
                writer.publish(_PART)
            for writer in writers.values():
                writer.finish()
        except OSError as error:
            raise writer.failed(error) from error
    return {
        "output": output,
        "bytes": sum(writer.bytes for writer in writers.values()),
        "people": {folder: len(np.unique(np.concatenate(own))) for folder, own in rows.items()},
        "rows": {folder: sum(map(len, own)) for folder, own in rows.items()},
        "items": cardinalities[HISTORY],
        "items_to_find": to_find,
        "bad_rows": bad.count,
        "examples": bad.examples,
    }


def _read(
    inputs: Sequence[str], positive_from: float, bad: BadRows, progress: Callable[[int, int], None] | None
) -> tuple[np.ndarray, np.ndarray]:
    """(users, items) of what was liked, int64 [N]."""
    files = find_inputs(inputs)
    parts: list[np.ndarray] = []
    done, total = 0, sum(file.size for file in files)
    for file in files:
        layout = layout_of(file)
        with file.open() as raw:
            text = LineBlocks(raw, file.path, bad)
            for values, _ in read_fields(text, bad, layout):
                users, items, labels = columns_of(values, layout, round(positive_from * 1000))
                parts.append(np.stack([users, items])[:, labels > 0])
                if progress is not None:
                    progress(done + text.position, total)
        done += file.size
    if not parts:
        raise DataError(f"{files[0].path}: no usable row in the whole file")
    users, items = np.concatenate(parts, 1)
    return users, items


def _numbered(items: np.ndarray, counted: np.ndarray, found_by: int) -> tuple[np.ndarray, int]:
    """New numbers of the items, most frequent among the `counted` first, and how many occur there `found_by` times."""
    _, place = np.unique(items, return_inverse=True)
    counts = np.bincount(place[counted], minlength=place.max(initial=-1) + 1)
    number = np.empty_like(counts)
    number[np.argsort(-counts, kind="stable")] = np.arange(len(counts))
    return number[place], int(np.count_nonzero(counts >= found_by))


def _larger_half(person: np.ndarray, people: int, rng: np.random.Generator) -> np.ndarray:
    """bool [N]: of each person's pairs, which stand together, the larger half at random."""
    sizes = np.bincount(person, minlength=people)
    order = np.lexsort((rng.random(len(person)), person))
    place = np.arange(len(person)) - np.repeat(np.cumsum(sizes) - sizes, sizes)
    seen = np.empty(len(person), np.bool_)
    seen[order] = place < (sizes[person] + 1) // 2
    return seen


class _Lists:
    """A list of items per person, in ascending order."""

    def __init__(self, person: np.ndarray, items: np.ndarray, people: int) -> None:
        order = np.lexsort((items, person))
        sizes = np.bincount(person, minlength=people)
        self.filled = sizes > 0
        offsets = pa.array(np.concatenate([[0], np.cumsum(sizes)]).astype(np.int32))
        self.array = pa.ListArray.from_arrays(offsets, pa.array(items[order].astype(np.int64)))


def _write(
    path: Path,
    source: str,
    dealt: Sequence[Sequence[_Lists]],
    rows: Sequence[np.ndarray],
    cardinalities: dict[str, int],
) -> None:
    """rows: the people of each deal."""
    size = sum(map(len, rows))
    lists = [
        pa.chunked_array([own[k].array.take(pa.array(chosen)) for own, chosen in zip(dealt, rows, strict=True)])
        for k in range(len(cardinalities))
    ]
    bags = [CategoricalColumn(name=name, cardinality=items, bag=True) for name, items in cardinalities.items()]
    schema = Schema(source=source, label="label", dense=[], categorical=bags, rows=size, positives=size)
    table = pa.table([pa.array(np.ones(size, np.int8)), *lists], names=["label", *cardinalities])
    stated = {METADATA_KEY: schema.model_dump_json(exclude_none=True).encode()}
    pq.write_table(table.replace_schema_metadata(stated), path, row_group_size=ROW_GROUP_ROWS)
