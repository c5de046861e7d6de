"""Who chose what: (user, item) or (user, item, rating) logs, and MovieLens, with sampled negatives."""

from __future__ import annotations

import os
import zlib
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import numpy as np

from .convert import BadRows, Input, LineBlocks, Source, convert, find_inputs
from .field_kernels import ID, RATING, SKIP
from .fields import Layout, read_fields
from .footers import list_files
from .interaction_kernels import add_pairs, sample_negatives
from .kernels import mix
from .schema import DataError
from .writer import Block

_PAIRS_BYTES = 64 << 20
_USERS, _ITEMS = ("user", "user_id", "userid"), ("item", "item_id", "itemid", "movie", "movie_id", "movieid")
_RATINGS = ("ratings.dat", "ratings.csv", "ratings.csv.gz", "ratings.dat.gz")


def convert_movielens(inputs: Sequence[str], output: str, **arguments: Any) -> dict[str, Any]:
    """As `convert_interactions`, for MovieLens's `ratings.dat` or `ratings.csv`, or folders that hold one of them."""
    return convert_interactions([ratings_file(path) for path in inputs], output, name="movielens", **arguments)


def ratings_file(path: str) -> str:
    """MovieLens's file of ratings: the path itself, or the one in the folder."""
    fs, files = list_files(path, suffix="")
    if len(files) == 1:
        return path
    found = [file for file in files if os.path.basename(file) in _RATINGS]
    if len(found) != 1:
        raise DataError(f"{path}: {len(found)} files named {' or '.join(_RATINGS)} in this folder, expected one")
    return str(fs.unstrip_protocol(found[0]))


def convert_interactions(
    inputs: Sequence[str],
    output: str,
    *,
    negatives: int = 0,
    seed: int = 0,
    positive_from: float = 4.0,
    on_bad_rows: str = "fail",
    name: str = "interactions",
    progress: Callable[[int, int], None] | None = None,
) -> dict[str, Any]:
    """Converts lines `user, item[, rating]` to Parquet: label, user and item (int64).

    Fields are separated by commas, tabs or `::`. With a header, its columns user (user_id), item (item_id, movie,
    movie_id) and rating are taken; without one the first, the second and, where there are three or more, the third.
    Rows rated `positive_from` or more have label 1, others 0; without ratings all have 1. Each row with label 1 is
    followed by `negatives` rows with label 0: the same user with items drawn uniformly from those that occur; seed,
    file name and row decide. A drawn item that the user chose is drawn again, up to 32 times. Memory: the different
    items, and 64 MiB for the pairs (a Bloom filter: it may redraw needlessly and never overlooks a pair).

    Result and errors as `convert_criteo`; with neither ratings nor negatives every label would be 1, which is an error.
    """
    if negatives < 0:
        raise DataError(f"--negatives: {negatives}; it cannot be negative")
    files = find_inputs(inputs)
    layouts = {file.path: layout_of(file) for file in files}
    rated = {RATING in layout.kinds for layout in layouts.values()}
    if len(rated) > 1:
        raise DataError("some of the files have ratings and some have not: convert them one by one")
    if not rated.pop() and not negatives:
        raise DataError(f"{files[0].path}: no ratings, so every label would be 1: give --negatives N")
    pairs, items = _scan(files, layouts, on_bad_rows) if negatives else (np.zeros(1, np.uint8), np.zeros(0, np.int64))
    threshold = round(positive_from * 1000)
    parts = {file.path: file.part.encode() for file in files}

    def parse(text: LineBlocks, bad: BadRows) -> Iterator[Block]:
        layout, row = layouts[text.name], 0
        key = np.uint64(mix(np.uint64(zlib.crc32(parts[text.name])), np.uint64(seed)))
        for values, _ in read_fields(text, bad, layout):
            users, chosen, labels = columns_of(values, layout, threshold)
            size = len(labels)
            if negatives:
                users, chosen, labels = sample_negatives(users, chosen, labels, pairs, items, negatives, key, row)
            row += size
            nothing = np.empty((0, len(labels)), np.int32)
            ids = np.stack([users, chosen])
            yield Block(labels, nothing, nothing.astype(np.bool_), ids, np.zeros(ids.shape, np.bool_))

    columns = ("user", "movie" if name == "movielens" else "item")
    drawn_from = [(file.path, file.size) for file in files] if negatives else []
    source = Source(name, (), columns, parse, options=repr((negatives, seed, positive_from, drawn_from)))
    return convert(source, inputs, output, on_bad_rows=on_bad_rows, progress=progress)


def layout_of(file: Input) -> Layout:
    """What the fields of a file of interactions are, from its first line."""
    with file.open() as raw:
        first = LineBlocks(raw, file.path, BadRows("fail")).peek().partition(b"\n")[0].rstrip(b"\r")
    separator = next((s for s in (b"::", b"\t", b",") if s in first), None)
    if separator is None:
        raise DataError(f"{file.path}, line 1: expected user and item separated by a comma, a tab or `::`")
    fields = [field.decode("latin-1").strip().lower() for field in first.split(separator)]
    if fields[0].isdigit():
        names = ["user", "item", "rating", *(f"field {k + 1}" for k in range(3, len(fields)))][: len(fields)]
        return Layout(names, [ID, ID, RATING, *[SKIP] * len(fields)][: len(fields)], separator, header=False)
    user = next((k for k, name in enumerate(fields) if name in _USERS), None)
    item = next((k for k, name in enumerate(fields) if name in _ITEMS), None)
    if user is None or item is None:
        raise DataError(
            f"{file.path}, line 1: the header must name the columns user and item; it has {', '.join(fields)}"
        )
    kinds = [ID if k in (user, item) else RATING if name == "rating" else SKIP for k, name in enumerate(fields)]
    fields[user], fields[item] = "user", "item"
    return Layout(fields, kinds, separator, header=True)


def columns_of(values: np.ndarray, layout: Layout, threshold: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """(users, items, labels): label 1 from a rating of `threshold` thousandths on, and for all rows without ratings."""
    users, items = values[layout.names.index("user")], values[layout.names.index("item")]
    labels = np.ones(len(users), np.int8)
    if RATING in layout.kinds:
        labels = (values[layout.kinds.index(RATING)] >= threshold).astype(np.int8)
    return users, items, labels


def _scan(files: Sequence[Input], layouts: dict[str, Layout], on_bad_rows: str) -> tuple[np.ndarray, np.ndarray]:
    """(Bloom filter of all pairs, the different items in order)."""
    pairs = np.zeros(_PAIRS_BYTES, np.uint8)

    def scan(file: Input) -> np.ndarray:
        items = np.zeros(0, np.int64)
        with file.open() as raw:
            text, layout = LineBlocks(raw, file.path, BadRows(on_bad_rows)), layouts[file.path]
            for values, _ in read_fields(text, BadRows(on_bad_rows), layout):
                users, chosen, _ = columns_of(values, layout, 0)
                add_pairs(users, chosen, pairs)
                items = np.union1d(items, chosen)
        return items

    return pairs, np.unique(np.concatenate([scan(file) for file in files]))
