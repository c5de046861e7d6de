"""`RowMap` in torch's int64 arithmetic, on any device: the same rows as `kernels.map_ids`, bit for bit."""

from __future__ import annotations

import torch
from torch import Tensor

from .base import RowMap

_LOW = 0xFFFFFFFF


def map_rows(row_map: RowMap, ids: Tensor) -> Tensor:
    """int64 [N] -> int64 [N]. Ids that the map refuses are the caller's to find."""
    if row_map.wrap and row_map.limit:
        ids = ids % row_map.limit
    if row_map.kind == "hash":
        return _multiply_high(_mix64(_mix64(ids) ^ _signed(row_map.seed)), row_map.modulus)
    if row_map.limit == row_map.modulus and row_map.divisor == 1:
        return ids
    return torch.div(ids, row_map.divisor, rounding_mode="floor") % row_map.modulus


def _signed(word: int) -> int:
    """The int64 of the same bits as a 64-bit word: products, sums and exclusive ors wrap alike for both."""
    return word - (1 << 64) if word >> 63 else word


def _shifted(word: Tensor, bits: int) -> Tensor:
    """A logical shift right: torch's keeps the sign."""
    return (word >> bits) & ((1 << (64 - bits)) - 1)


def _mix64(word: Tensor) -> Tensor:
    word = (word ^ _shifted(word, 30)) * _signed(0xBF58476D1CE4E5B9)
    word = (word ^ _shifted(word, 27)) * _signed(0x94D049BB133111EB)
    return word ^ _shifted(word, 31)


def _multiply_high(word: Tensor, factor: int) -> Tensor:
    """The upper 64 bits of the unsigned product; factor below 2^63. See `kernels.multiply_high`."""
    a_high, a_low = _shifted(word, 32), word & _LOW
    b_high, b_low = factor >> 32, factor & _LOW
    middle = a_high * b_low + _shifted(a_low * b_low, 32)
    other = a_low * b_high + (middle & _LOW)
    return a_high * b_high + _shifted(middle, 32) + _shifted(other, 32)
