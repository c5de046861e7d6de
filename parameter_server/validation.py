"""What must hold of a pull or push before anything is done with it; a message for the sender where it does not."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import replace

import numpy as np

from .kernels import row_of
from .requests import PullRequest, PushRequest, RowSet
from .row_kernels import BLOCK_TWICE, FITS, NO_SUCH_BLOCK, WRONG_COUNT, all_finite, check_rows
from .tables import Slab


class InvalidRequest(ValueError):
    """Sizes, rows or values that cannot be right."""


def readable(array: np.ndarray) -> np.ndarray:
    """The array as a contiguous, aligned, read-only view (a copy only if it has to be).

    Received frames are read-only and arrays of this process are not; kernels are compiled once, for the former.
    """
    flags = array.flags
    if not (flags.c_contiguous and flags.aligned):
        array = np.require(array, requirements=["C", "A"])
    elif not flags.writeable:
        return array
    view = array.view()
    view.flags.writeable = False
    return view


def checked_pull(request: PullRequest, slabs: Sequence[Slab]) -> PullRequest:
    """The request with its parts ready for the kernels.

    Raises:
        InvalidRequest: names slab, and row if there is one.
    """
    return replace(request, parts=[_checked_part(part, slabs) for part in request.parts])


def checked_push(request: PushRequest, slabs: Sequence[Slab]) -> PushRequest:
    """The request with its parts and gradients ready for the kernels.

    Raises:
        InvalidRequest: names step and table, and row if there is one.
    """
    if not len(request.parts) == len(request.grads) == len(request.learning_rates):
        raise InvalidRequest(
            f"push of {len(request.parts)} parts with {len(request.grads)} gradients and "
            f"{len(request.learning_rates)} learning rates"
        )
    if not (0 <= request.sequence < 2**63 and 0 <= request.client < 2**64):
        raise InvalidRequest(f"push number {request.sequence} of client {request.client} is out of range")
    parts, grads = [], []
    for part, grad, rate in zip(request.parts, request.grads, request.learning_rates, strict=True):
        parts.append(_checked_part(part, slabs))
        grads.append(_checked_grads(grad, rate, parts[-1], slabs[part.slab], request))
    return replace(request, parts=parts, grads=grads)


def _checked_part(part: RowSet, slabs: Sequence[Slab]) -> RowSet:
    if not 0 <= part.slab < len(slabs):
        raise InvalidRequest(f"slab {part.slab} does not exist: there are {len(slabs)}")
    slab = slabs[part.slab]
    for name, array, dtype in (
        ("index", part.index, slab.index_dtype),
        ("blocks", part.blocks, np.uint16),
        ("counts", part.counts, np.uint32),
    ):
        if array.dtype != dtype or array.ndim != 1:
            raise InvalidRequest(
                f"slab {slab.id}: {name} is {array.dtype}{list(array.shape)}, not {np.dtype(dtype)} [N]"
            )
    checked = RowSet(slab.id, readable(part.index), readable(part.blocks), readable(part.counts))
    if len(part.blocks) != len(part.counts):
        raise InvalidRequest(f"slab {slab.id}: {len(part.blocks)} blocks with {len(part.counts)} counts")
    code, at = check_rows(checked.index, checked.blocks, checked.counts, slab.rows_per_block, slab.blocks)
    if code != FITS:
        raise InvalidRequest(f"slab {slab.id}: {_what_is_wrong(code, at, checked, slab)}")
    return checked


def _what_is_wrong(code: int, at: int | np.int64, part: RowSet, slab: Slab) -> str:
    if code == NO_SUCH_BLOCK:
        return f"block {part.blocks[at]} does not exist: there are {slab.blocks}"
    if code == BLOCK_TWICE:
        return f"block {part.blocks[at]} stands twice in one call"
    if code == WRONG_COUNT:
        return f"the counts state {at} rows, and there are {len(part.index)}"
    block = int(np.repeat(part.blocks, part.counts)[at])
    first = block * slab.rows_per_block
    return (
        f"row {part.index[at]} does not lie in block {block}, which holds rows {first} to "
        f"{first + slab.rows_per_block - 1}"
    )


def _checked_grads(grads: np.ndarray, rate: float, part: RowSet, slab: Slab, request: PushRequest) -> np.ndarray:
    where = f"push {request.sequence}" if request.clock is None else f"step {request.clock.step}"
    if grads.dtype != np.float32 or grads.shape != (len(part.index), slab.width):
        raise InvalidRequest(
            f"{where}, slab {slab.id}: gradients are {grads.dtype}{list(grads.shape)}, "
            f"not float32[{len(part.index)}, {slab.width}]"
        )
    if not math.isfinite(rate):
        raise InvalidRequest(f"{where}, slab {slab.id}: the learning rate is {rate}")
    checked = readable(grads)
    if not all_finite(checked.reshape(-1).view(np.uint32)):
        spec, row = row_of(slab, int(part.index[np.isfinite(checked).all(axis=1).argmin()]))
        raise InvalidRequest(
            f"{where}: the gradient of row {row} of table {spec.name!r} is not finite: nothing was applied"
        )
    return checked
