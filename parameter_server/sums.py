"""What of pushes is applied, and the sum of several pushes of one step, in a fixed order."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from .requests import BlockStatus, RowSet
from .row_kernels import add_rows
from .validation import readable


def sum_pushes(contributions: Sequence[tuple[np.ndarray, np.ndarray]]) -> tuple[np.ndarray, np.ndarray]:
    """Distinct rows and their summed gradients.

    Args:
        contributions: (index [U_r], grads float32 [U_r, width]) of one slab, in the order in which they are added;
            each index distinct in itself.

    Returns:
        index [U] in order of first occurrence, and grads [U, width], both read-only.
    """
    if len(contributions) == 1:
        return contributions[0]
    total = sum(len(index) for index, _ in contributions)
    index, grads = contributions[0]
    merged = np.empty(total, index.dtype)
    sums = np.empty((total, grads.shape[1]), np.float32)
    slots = np.full(1 << (2 * total + 1).bit_length(), -1, np.int64)
    count = 0
    for index, grads in contributions:
        count = add_rows(slots, index, grads, merged, sums, count)
    return readable(merged[:count]), readable(sums[:count])


def accepted(part: RowSet, grads: np.ndarray, statuses: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """The rows and gradients of those blocks whose status (uint8 [blocks]) says that their part is new."""
    found = statuses[part.blocks]
    if not found.any():  # zero is APPLIED
        return part.index, grads
    keep = found == BlockStatus.APPLIED
    selected, rows = part.select(keep)
    return readable(selected.index), readable(grads[rows])
