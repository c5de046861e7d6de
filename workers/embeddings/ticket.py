"""A pull on its way to the device: what `prefetch` hands out and `forward` takes in."""

from __future__ import annotations

from concurrent.futures import Future

import numpy as np
import torch
from torch import Tensor

from ...datasets.schema import Ids
from ...parameter_server.requests import RowSet


class Ticket:
    """The rows that a batch needs, asked for and perhaps already here.

    parts: the distinct rows per slab; inverse: int32 [N] per slab, where each lookup's rows stand among them; segments:
    int64 [L + 1] per slab, which of them belong to each lookup. `leaves` collect the gradients: [U, width] per slab.
    """

    def __init__(
        self,
        ids: Ids,
        parts: list[RowSet],
        inverse: list[np.ndarray],
        segments: list[np.ndarray],
        pulled: Future[list[np.ndarray]],
        device: torch.device,
        stream: torch.cuda.Stream | None,
    ) -> None:
        self.ids = ids
        self.parts = parts
        self.inverse = inverse
        self.segments = segments
        self.leaves: list[Tensor] = []
        self._pulled = pulled
        self._device = device
        self._stream = stream
        self._copied: torch.cuda.Event | None = None

    def inverse_of(self, slab: int, first: int, lookups: int) -> np.ndarray:
        """int32 [N]: where the rows of neighbouring lookups stand among the slab's distinct rows."""
        segments = self.segments[slab]
        return self.inverse[slab][segments[first] : segments[first + lookups]]

    def wait(self) -> None:
        """Until the rows have arrived; on cuda their copy to the device has then begun, on a stream of its own.

        Raises:
            StoreError: the pull failed.
        """
        if self.leaves:
            return
        arrays = self._pulled.result()
        if self._stream is None:
            self.leaves = [torch.from_numpy(array) for array in arrays]
            return
        with torch.cuda.stream(self._stream):
            # The pinned copies come from torch's caching host allocator: not reused before the stream has read them.
            self.leaves = [torch.from_numpy(array).pin_memory().to(self._device, non_blocking=True) for array in arrays]
            self._copied = self._stream.record_event()

    def rows(self) -> list[Tensor]:
        """The pulled rows, usable on the current stream: float32 [U, width] per slab."""
        self.wait()
        if self._copied is not None:
            current = torch.cuda.current_stream(self._device)
            current.wait_event(self._copied)
            for leaf in self.leaves:
                leaf.record_stream(current)
            self._copied = None
        return self.leaves
