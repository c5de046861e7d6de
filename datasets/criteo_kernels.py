"""Splitting and parsing Criteo lines: bytes in, columns out."""

from __future__ import annotations

from typing import Any

import numpy as np

from .jit import jit

Array = np.ndarray[Any, Any]

DENSE, CATEGORICAL = 13, 26
FIELDS = 1 + DENSE + CATEGORICAL

# What can be wrong with a line; `field` says where. BAD_FIELDS is any number of fields other than 40.
BAD_FIELDS, BAD_LABEL, BAD_INTEGER, BAD_ID = range(1, 5)

_TAB, _NEWLINE, _RETURN, _MINUS, _ZERO, _NINE = 9, 10, 13, 45, 48, 57


@jit
def _hexadecimal(text: Array, begin: int, end: int) -> int:
    """8 hexadecimal digits as a number, -1 if they are not that."""
    if end - begin != 8:
        return -1
    value = 0
    for i in range(begin, end):
        byte = text[i]
        if _ZERO <= byte <= _NINE:
            digit = byte - _ZERO
        elif 97 <= (byte | 32) <= 102:
            digit = (byte | 32) - 87
        else:
            return -1
        value = (value << 4) | digit
    return value


@jit
def _decimal(text: Array, begin: int, end: int) -> int:
    """A decimal number below 2^63 without sign, -1 if it is not that."""
    if begin == end or end - begin > 19:
        return -1
    value = 0
    for i in range(begin, end):
        if not _ZERO <= text[i] <= _NINE:
            return -1
        value = value * 10 + (text[i] - _ZERO)
    return value if value >= 0 else -1  # 19 digits overflow at most once, into the sign


@jit
def parse_lines(
    text: Array,
    begin: int,
    row: int,
    hexadecimal: bool,
    labels: Array,
    dense: Array,
    dense_null: Array,
    ids: Array,
    ids_null: Array,
    bounds: Array,
) -> tuple[int, int, int, int, int]:
    """Parses whole lines of text (uint8 [N]) from `begin`, until the arrays are full, the lines end or one is bad.

    labels int8 [R], dense int32 [13, R], ids int64 [26, R] and bool masks of the nulls are filled from `row` on; bounds
    int64 [41] is scratch. Returns (row after the last one filled, byte after the last line consumed, lines consumed,
    what is wrong with the last line consumed or 0, the field or the number of fields). A bad line fills no row.
    """
    lines, size = 0, len(text)
    while row < len(labels):
        at, field = begin, 0
        bounds[0] = begin
        while at < size and text[at] != _NEWLINE:
            if text[at] == _TAB:
                field += 1
                if field < FIELDS:
                    bounds[field] = at + 1
            at += 1
        if at == size:  # not a whole line
            break
        end = at - 1 if at > begin and text[at - 1] == _RETURN else at
        begin, lines = at + 1, lines + 1
        if field + 1 != FIELDS:
            return row, begin, lines, BAD_FIELDS, field + 1
        bounds[FIELDS] = end + 1
        if bounds[1] - bounds[0] != 2 or not _ZERO <= text[bounds[0]] <= _ZERO + 1:
            return row, begin, lines, BAD_LABEL, 0
        labels[row] = text[bounds[0]] - _ZERO
        for k in range(DENSE):
            first, last = bounds[1 + k], bounds[2 + k] - 1
            dense_null[k, row] = first == last
            dense[k, row] = 0
            if first != last:
                negative = text[first] == _MINUS
                value = _decimal(text, first + negative, last)
                if value < 0 or value > 2147483647:
                    return row, begin, lines, BAD_INTEGER, 1 + k
                dense[k, row] = -value if negative else value
        for f in range(CATEGORICAL):
            first, last = bounds[1 + DENSE + f], bounds[2 + DENSE + f] - 1
            ids_null[f, row] = first == last
            ids[f, row] = 0
            if first != last:
                value = _hexadecimal(text, first, last) if hexadecimal else _decimal(text, first, last)
                if value < 0:
                    return row, begin, lines, BAD_ID, 1 + DENSE + f
                ids[f, row] = value
        row += 1
    return row, begin, lines, 0, 0
