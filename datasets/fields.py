"""Text files of separated fields, as blocks of columns."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np

from .convert import BadRows, LineBlocks
from .field_kernels import BAD_COUNT, HEX, ID, LABEL, OPTIONAL, RATING, parse_fields
from .writer import ROW_GROUP_ROWS

_EXPECTED = {
    LABEL: "0 or 1",
    ID: "a decimal number below 2^63",
    OPTIONAL: "a decimal number below 2^63, or nothing or -1 where it is missing",
    HEX: "8 hexadecimal digits",
    RATING: "a number such as 3 or 4.5",
}


@dataclass(frozen=True)
class Layout:
    """The fields of each line: names, kinds (field_kernels.py), what separates them, whether line 1 is a header."""

    names: Sequence[str]
    kinds: Sequence[int]
    separator: bytes
    header: bool


def read_fields(text: LineBlocks, bad: BadRows, layout: Layout) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """(values int64 [fields, rows], nulls bool [fields, rows]) of at most ROW_GROUP_ROWS rows at a time.

    Raises:
        DataError: bad rows, unless they are skipped.
    """
    fields, row = len(layout.names), 0
    kinds, separator = np.array(layout.kinds), np.frombuffer(layout.separator, np.uint8)
    bounds = np.empty(2 * fields, np.int64)
    out, null = np.zeros((fields, ROW_GROUP_ROWS), np.int64), np.zeros((fields, ROW_GROUP_ROWS), np.bool_)
    if layout.header:
        text.peek()
        text.skip_line()
    for data in text:
        at, end = 0, False
        array = np.frombuffer(data, np.uint8)
        while not end:
            row, after, lines, wrong, field = parse_fields(array, at, row, separator, kinds, out, null, bounds)
            text.line += lines
            if wrong:
                bad.add(text.name, text.line, _explain(data[bounds[0] : after], wrong, field, layout))
            end, at = not wrong and row < ROW_GROUP_ROWS, after
            if row == ROW_GROUP_ROWS:
                yield out, null
                out, null, row = np.zeros_like(out), np.zeros_like(null), 0
        text.consumed(at)
    if row:
        yield out[:, :row], null[:, :row]


def _explain(line: bytes, wrong: int, field: int, layout: Layout) -> str:
    shown = {b"\t": "tabs", b",": "commas"}.get(layout.separator, layout.separator.decode())
    if wrong == BAD_COUNT:
        return f"{field} fields separated by {shown}, expected {len(layout.names)}"
    found = line.rstrip(b"\r\n").split(layout.separator)[field][:40].decode("latin-1")
    return f"column {layout.names[field]!r} is {found!a}, expected {_EXPECTED[layout.kinds[field]]}"
