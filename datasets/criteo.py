"""Criteo's click logs: the raw lines of Kaggle and Terabyte, and the variant with a header and decimal ids."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import numpy as np

from .convert import BadRows, LineBlocks, Source, convert
from .criteo_kernels import BAD_FIELDS, BAD_ID, BAD_INTEGER, BAD_LABEL, CATEGORICAL, DENSE, FIELDS, parse_lines
from .schema import DataError
from .writer import ROW_GROUP_ROWS, Block

DENSE_NAMES = tuple(f"i{k + 1}" for k in range(DENSE))
CATEGORICAL_NAMES = tuple(f"c{f + 1}" for f in range(CATEGORICAL))
NAMES = ("label", *DENSE_NAMES, *CATEGORICAL_NAMES)
_SAMPLE_LINES = 100
_HEXADECIMAL = re.compile(rb"[0-9a-fA-F]{8}")


def convert_criteo(
    inputs: Sequence[str],
    output: str,
    *,
    on_bad_rows: str = "fail",
    progress: Callable[[int, int], None] | None = None,
) -> dict[str, Any]:
    """Converts Criteo logs to Parquet: label, i1 to i13 (int32) and c1 to c26 (int64), nulls where a field is empty.

    inputs: files (plain or gzip) or folders of them, local or fsspec URLs. Lines are `label I1..I13 C1..C26`, separated
    by tabs; ids are 8 hexadecimal digits, or decimal numbers where the first lines show it; a header is recognised.
    on_bad_rows: `fail`, or `skip`, which counts them. progress(input bytes done, input bytes).

    Returns:
        As `convert`: output, rows, positives, label_rate, files, input_bytes, output_bytes, bad_rows, examples.

    Raises:
        DataError: no input, an output that exists, a bad row (file, line and field are named), or damaged gzip data.
    """
    source = Source("criteo", DENSE_NAMES, CATEGORICAL_NAMES, parse)
    return convert(source, inputs, output, on_bad_rows=on_bad_rows, progress=progress)


def parse(text: LineBlocks, bad: BadRows) -> Iterator[Block]:
    """Blocks of at most ROW_GROUP_ROWS rows from one file's bytes.

    Raises:
        DataError: as `convert_criteo`.
    """
    hexadecimal = _detect(text)
    block, row, bounds = _allocate(), 0, np.empty(FIELDS + 1, np.int64)
    for data in text:
        at, end = 0, False
        array = np.frombuffer(data, np.uint8)
        while not end:
            row, after, lines, wrong, field = parse_lines(
                array,
                at,
                row,
                hexadecimal,
                block.labels,
                block.dense,
                block.dense_null,
                block.ids,
                block.ids_null,
                bounds,
            )
            text.line += lines
            if wrong:
                bad.add(text.name, text.line, _explain(data[:after], wrong, field, hexadecimal))
            end = not wrong and row < ROW_GROUP_ROWS
            at = after
            if row == ROW_GROUP_ROWS:
                yield block
                block, row = _allocate(), 0
        text.consumed(at)
    if row:
        yield Block(
            block.labels[:row],
            block.dense[:, :row],
            block.dense_null[:, :row],
            block.ids[:, :row],
            block.ids_null[:, :row],
        )


def _allocate() -> Block:
    rows = ROW_GROUP_ROWS
    return Block(
        np.empty(rows, np.int8),
        np.empty((DENSE, rows), np.int32),
        np.empty((DENSE, rows), np.bool_),
        np.empty((CATEGORICAL, rows), np.int64),
        np.empty((CATEGORICAL, rows), np.bool_),
    )


def _detect(text: LineBlocks) -> bool:
    """Skips a header; true where ids are hexadecimal."""
    lines = text.peek().split(b"\n")[:_SAMPLE_LINES]
    first = lines[0].rstrip(b"\r").lower().split(b"\t")
    if first[0] == b"label":
        if tuple(name.decode("latin-1") for name in first) != NAMES:
            raise DataError(f"{text.name}, line 1: the header must be label, i1 to i13, c1 to c26, separated by tabs")
        text.skip_line()
        lines = lines[1:]
    fields = [f for line in lines for f in line.rstrip(b"\r").split(b"\t")[1 + DENSE : FIELDS] if f]
    return 2 * sum(_HEXADECIMAL.fullmatch(f) is not None for f in fields) >= len(fields)


def _explain(text: bytes, wrong: int, field: int, hexadecimal: bool) -> str:
    """What is wrong with the last line of `text`."""
    if wrong == BAD_FIELDS:
        return f"{field} fields separated by tabs, expected {FIELDS}"
    line = text.rstrip(b"\r\n").rsplit(b"\n", 1)[-1]
    expected = {
        BAD_LABEL: "0 or 1",
        BAD_INTEGER: "an integer of 32 bits",
        BAD_ID: "8 hexadecimal digits" if hexadecimal else "a decimal number below 2^63",
    }[wrong]
    found = line.split(b"\t")[field][:40].decode("latin-1")
    return f"column {NAMES[field]!r} is {found!a}, expected {expected}"
