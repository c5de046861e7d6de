"""What the workers of a run tell each other; alone, a worker agrees with itself at no cost."""

from collections.abc import Sequence
from typing import Any

import torch
import torch.distributed as dist


class Group:
    """`workers` ranks of torch.distributed's default process group; every method is called by all of them alike."""

    def __init__(self, rank: int, workers: int, device: torch.device) -> None:
        self.rank = rank
        self.workers = workers
        self.device = device

    def barrier(self) -> None:
        if self.workers > 1:
            self.sums([0.0])  # unlike dist.barrier, the same on every backend and device

    def sums(self, values: Sequence[float]) -> list[float]:
        """Element-wise sum over all ranks, in float64."""
        if self.workers == 1:
            return list(values)
        total = torch.tensor(list(values), dtype=torch.float64, device=self.device)
        dist.all_reduce(total)
        return [float(value) for value in total.tolist()]

    def any(self, flag: bool) -> bool:
        return flag if self.workers == 1 else self.sums([float(flag)])[0] > 0

    def gather(self, value: Any) -> list[Any]:
        """Every rank's value, in rank order."""
        if self.workers == 1:
            return [value]
        values: list[Any] = [None] * self.workers
        dist.all_gather_object(values, value)
        return values

    def from_first(self, value: Any) -> Any:
        """Rank 0's value."""
        if self.workers == 1:
            return value
        values = [value]
        dist.broadcast_object_list(values, src=0, device=self.device)
        return values[0]


# DDP looks at the annotations themselves: no `from __future__ import annotations` in this file.
def sum_gradients(_: object, bucket: dist.GradBucket) -> torch.futures.Future[torch.Tensor]:  # type: ignore[name-defined]
    """DDP hook: adds gradients over the ranks. DDP would average, but each rank's loss is a share of the batch's."""
    work = dist.all_reduce(bucket.buffer(), async_op=True)
    future: torch.futures.Future[torch.Tensor] = work.get_future().then(lambda done: done.value()[0])
    return future
