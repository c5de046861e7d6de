"""Windows decoded before they are asked for, within a bound of bytes."""

from __future__ import annotations

from collections import deque
from collections.abc import Iterable
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass

from .decode import RowGroupReader
from .order import Window, row_order
from .window import DecodedWindow


@dataclass(frozen=True, slots=True)
class Order:
    """How rows are read: the seed and whether rows are permuted, rows per batch, the id of a null."""

    seed: int
    shuffled: bool
    share: int
    missing_id: int


@dataclass(frozen=True, slots=True)
class _Job:
    """A window of an epoch, the rows of it that were read earlier, and the rows up to the end of the first batch."""

    epoch: int
    window: Window
    taken: int
    first: int


class ReadAhead:
    """One rank's windows, decoded on another thread in the order in which they were added.

    limit: decoded bytes held, at most, except that the window being read is always held.
    """

    def __init__(self, reader: RowGroupReader, order: Order, limit: int) -> None:
        self._reader, self._order, self._limit = reader, order, limit
        self._queue: deque[_Job] = deque()
        self._decoding: deque[tuple[Future[DecodedWindow], int]] = deque()
        self._held = self._current = 0
        self._closed = False
        self._decoder = ThreadPoolExecutor(1, thread_name_prefix="parquet-decode")

    def add(self, epoch: int, queue: Iterable[tuple[Window, int]]) -> None:
        """An epoch's windows, and the rows of each that were read earlier, behind what is queued."""
        position, share = 0, self._order.share
        for window, taken in queue:
            self._queue.append(_Job(epoch, window, taken, share - position % share))
            position += window.rows - taken
        self._submit(1)

    def next(self) -> DecodedWindow:
        """The next window; keeps as many further ones under way as the limit allows.

        Raises:
            DataError: what decoding raised.
        """
        self.check_open()
        self.release()
        self._submit(1)
        future, self._current = self._decoding.popleft()
        self._submit(0)
        return future.result()

    def release(self) -> None:
        """The window handed out last is no longer held by whoever reads."""
        self._held -= self._current
        self._current = 0
        self._submit(0)

    def check_open(self) -> None:
        """Raises RuntimeError after `close`: what follows would be read as the end of the epoch."""
        if self._closed:
            raise RuntimeError("the stream was closed, or another epoch begun, before this epoch was read to its end")

    def close(self) -> None:
        self._closed = True
        self._decoder.shutdown(wait=True, cancel_futures=True)

    def _submit(self, at_least: int) -> None:
        while self._queue and (
            len(self._decoding) < at_least or self._held + self._queue[0].window.bytes <= self._limit
        ):
            job = self._queue.popleft()
            self._held += job.window.bytes
            self._decoding.append((self._decoder.submit(self._decode, job), job.window.bytes))

    def _decode(self, job: _Job) -> DecodedWindow:
        rows = row_order(self._order.seed, job.epoch, job.window, shuffled=self._order.shuffled)[job.taken :]
        return DecodedWindow(self._reader, job.window, rows, job.first, self._order.share, self._order.missing_id)
