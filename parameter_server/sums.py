"""What of pushes is applied, and the sum of several pushes of one step, in a fixed order."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from .requests import BlockStatus, PushRequest, RowSet
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


def sum_decided(
    decided: Sequence[tuple[PushRequest, np.ndarray]],
) -> list[tuple[int, np.ndarray, np.ndarray, float]]:
    """What pushes change together: slab, index [U], grads [U, width] added in their order, learning rate.

    decided: each push with its statuses, uint8 [blocks]; of several learning rates for a slab the last one counts.
    """
    taken: dict[int, list[tuple[np.ndarray, np.ndarray]]] = {}
    rates: dict[int, float] = {}
    for request, statuses in decided:
        for part, grads, rate in zip(request.parts, request.grads, request.learning_rates, strict=True):
            taken.setdefault(part.slab, []).append(accepted(part, grads, statuses))
            rates[part.slab] = rate
    return [(slab, *sum_pushes(contributions), rates[slab]) for slab, contributions in taken.items()]


def accepted(part: RowSet, grads: np.ndarray, statuses: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """The rows and gradients of those blocks whose status (uint8 [blocks]) says that their part is new."""
    found = statuses[part.blocks]
    if not found.any():  # zero is APPLIED
        return part.index, grads
    keep = found == BlockStatus.APPLIED
    selected, rows = part.select(keep)
    return readable(selected.index), readable(grads[rows])
