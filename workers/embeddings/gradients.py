"""What is sent after a backward pass: one summed gradient per distinct row, checked before anything leaves."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np
import torch
from torch import Tensor

from ...parameter_server.kernels import all_finite, row_of
from ...parameter_server.requests import RowSet
from ...parameter_server.store import StoreError
from ...parameter_server.tables import Slab
from .ticket import Ticket


class GradientError(StoreError):
    """A gradient that must not be applied: names the step and the table or parameter; nothing was sent."""


def collect(tickets: Sequence[Ticket], block_rank: np.ndarray) -> tuple[list[RowSet], list[np.ndarray]]:
    """The rows that took part in the backward passes of `tickets` and their gradients, float32 [U, width] per slab.

    block_rank: uint16 [blocks], the order in which blocks are sent. Where several forwards read the same row, its
    gradients are added in the order of the forwards.
    """
    found: dict[int, list[tuple[RowSet, Tensor]]] = {}
    for ticket in tickets:
        for part, leaf in zip(ticket.parts, ticket.leaves, strict=True):
            if leaf.grad is not None and len(part.index):
                found.setdefault(part.slab, []).append((part, leaf.grad))
    arrays = _to_host([grad for entries in found.values() for _, grad in entries])
    parts, grads = [], []
    for entries in found.values():
        own = [arrays.pop(0) for _ in entries]
        part, grad = (entries[0][0], own[0]) if len(own) == 1 else _add([p for p, _ in entries], own, block_rank)
        parts.append(part)
        grads.append(grad)
    return parts, grads


def _to_host(grads: Sequence[Tensor]) -> list[np.ndarray]:
    """Views on the CPU; from cuda one pinned copy each, all under way at once."""
    if not grads or grads[0].device.type == "cpu":
        return [grad.contiguous().numpy() for grad in grads]
    copies = [torch.empty(grad.shape, dtype=grad.dtype, pin_memory=True) for grad in grads]
    for copy, grad in zip(copies, grads, strict=True):
        copy.copy_(grad, non_blocking=True)
    torch.cuda.current_stream(grads[0].device).synchronize()
    return [copy.numpy() for copy in copies]


def _add(parts: Sequence[RowSet], grads: Sequence[np.ndarray], block_rank: np.ndarray) -> tuple[RowSet, np.ndarray]:
    index, inverse = np.unique(np.concatenate([part.index for part in parts]), return_inverse=True)
    block_of = np.concatenate([np.repeat(part.blocks, part.counts) for part in parts])
    blocks = np.empty(len(index), np.uint16)
    blocks[inverse] = block_of
    order = np.argsort(block_rank[blocks], kind="stable")
    place = np.empty(len(order), np.int64)
    place[order] = np.arange(len(order))
    total = np.zeros((len(index), grads[0].shape[1]), np.float32)
    begin = 0
    for grad in grads:  # distinct rows within one forward, so += adds each once
        total[place[inverse[begin : begin + len(grad)]]] += grad
        begin += len(grad)
    sorted_blocks = blocks[order]
    starts = np.flatnonzero(np.concatenate([[True], sorted_blocks[1:] != sorted_blocks[:-1]]))
    counts = np.diff(np.concatenate([starts, [len(order)]])).astype(np.uint32)
    return RowSet(parts[0].slab, index[order], sorted_blocks[starts], counts), total


def not_finite(
    parts: Sequence[RowSet], grads: Sequence[np.ndarray], slabs: Sequence[Slab], step: int | None
) -> GradientError | None:
    """The error that names the first table with a gradient that is NaN or infinite; None if there is none."""
    for part, grad in zip(parts, grads, strict=True):
        if not all_finite(grad.reshape(-1).view(np.uint32)):
            row = int(np.flatnonzero(~np.isfinite(grad).all(1))[0])
            return gradient_error(f"table {row_of(slabs[part.slab], int(part.index[row]))[0].name!r}", step)
    return None


def gradient_error(where: str, step: int | None) -> GradientError:
    """The error for a gradient of `where` that is NaN or infinite."""
    when = "" if step is None else f"step {step}: "
    return GradientError(
        f"{when}the gradient of {where} is NaN or infinite, so nothing of this step was sent; "
        f"lower the learning rates, or look for such values in the dense columns"
    )


def first_not_finite(grads: Mapping[str, Tensor]) -> str | None:
    """The name of the first gradient that holds NaN or infinity; None if there is none."""
    for name, grad in grads.items():
        if grad.device.type != "cpu":  # asked of the device once, for all of them
            total = torch.nn.utils.get_total_norm(grads.values(), torch.inf)
            return None if bool(total.isfinite()) else next(n for n, g in grads.items() if not bool(g.isfinite().all()))
        if not all_finite(grad.detach().contiguous().view(-1).numpy().view(np.uint32)):
            return name
    return None
