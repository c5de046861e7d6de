"""Splitting and parsing lines of separated fields: bytes in, columns out."""

from __future__ import annotations

from .criteo_kernels import _decimal, _hexadecimal
from .jit import jit
from .kernels import Array

# What a field may be. ID: a decimal number; OPTIONAL: the same, or empty or -1 where it is missing; HEX: 8 hexadecimal
# digits; RATING: a decimal number with up to three digits after the point, in thousandths.
SKIP, LABEL, ID, OPTIONAL, HEX, RATING = range(6)
BAD_COUNT, BAD_VALUE = 1, 2

_NEWLINE, _RETURN, _MINUS, _POINT, _ZERO, _NINE = 10, 13, 45, 46, 48, 57


@jit
def _rating(text: Array, begin: int, end: int) -> int:
    """A number such as 3 or 4.5 in thousandths, -1 if it is not that."""
    value, digits, after = 0, 0, -1
    for i in range(begin, end):
        if text[i] == _POINT and after < 0:
            after = 0
        elif _ZERO <= text[i] <= _NINE and digits < 12 and after < 3:
            value, digits = value * 10 + (text[i] - _ZERO), digits + 1
            after += after >= 0
        else:
            return -1
    for _ in range(3 - max(after, 0)):
        value *= 10
    return value if digits else -1


@jit
def _value(kind: int, text: Array, begin: int, end: int) -> tuple[int, bool]:
    """(value, is missing); a value below 0 that is not missing is bad."""
    if kind == OPTIONAL and (begin == end or (end - begin == 2 and text[begin] == _MINUS and text[begin + 1] == 49)):
        return 0, True
    if kind == HEX:
        return _hexadecimal(text, begin, end), False
    if kind == RATING:
        return _rating(text, begin, end), False
    value = _decimal(text, begin, end)
    return (-1 if kind == LABEL and value > 1 else value), False


@jit
def parse_fields(
    text: Array, begin: int, row: int, separator: Array, kinds: Array, out: Array, null: Array, bounds: Array
) -> tuple[int, int, int, int, int]:
    """Parses whole lines of text (uint8 [N]) from `begin`, until the arrays are full, the lines end or one is bad.

    separator uint8 [1 or 2]; kinds int64 [K]; out int64 [K, R] and null bool [K, R] are filled from `row` on; bounds
    int64 [2 * K] is scratch: where each field begins and ends. Returns (row after the last one filled, byte after the
    last line consumed, lines consumed, what is wrong with the last line consumed or 0, the field or the number of
    fields). A bad line fills no row.
    """
    lines, size, fields, width = 0, len(text), len(kinds), len(separator)
    while row < out.shape[1]:
        at, field = begin, 0
        bounds[0] = begin
        while at < size and text[at] != _NEWLINE:
            if text[at] == separator[0] and (width == 1 or (at + 1 < size and text[at + 1] == separator[1])):
                if field < fields:
                    bounds[2 * field + 1] = at
                field += 1
                at += width
                if field < fields:
                    bounds[2 * field] = at
            else:
                at += 1
        if at == size:  # not a whole line
            break
        end = at - 1 if at > begin and text[at - 1] == _RETURN else at
        begin, lines = at + 1, lines + 1
        if field + 1 != fields:
            return row, begin, lines, BAD_COUNT, field + 1
        bounds[2 * field + 1] = end
        for k in range(fields):
            if kinds[k] != SKIP:
                value, missing = _value(kinds[k], text, bounds[2 * k], bounds[2 * k + 1])
                if value < 0:
                    return row, begin, lines, BAD_VALUE, k
                out[k, row], null[k, row] = value, missing
        row += 1
    return row, begin, lines, 0, 0
