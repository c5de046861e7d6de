"""Parquet as a stream of shuffled batches that stops anywhere and goes on with any number of workers."""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor

import numpy as np

from .batch import MISSING_ID, Batch, Ids
from .decode import DecodedWindow, RowGroupReader
from .files import read_footers, schema_of
from .order import Cursor, CursorError, EpochPlan, Window, plan_digest, row_order, windows
from .schema import DataError, Schema

WINDOW_BYTES = 32 << 20
READ_AHEAD_BYTES = 128 << 20


class ParquetStream:
    """The rows of a Parquet data set, this rank's share of each step of `batch_size` rows over all ranks.

    path: a file, a folder (all *.parquet below it) or an fsspec URL. The order of an epoch depends on (seed, epoch,
    files, window_bytes) alone; all ranks take the same number of steps. Decoding and shuffling happen on another
    thread, outside the GIL; a batch's arrays are views of its window. For one consuming thread; one epoch at a time.

    window_bytes: decoded bytes shuffled together, at most; read_ahead_bytes: decoded bytes held, at most, except that
    the window being read is always held; missing_id: the id of a null.

    Raises:
        DataError: missing, unreadable or unsuitable files.
    """

    def __init__(
        self,
        path: str,
        *,
        batch_size: int,
        schema: Schema | None = None,
        window_bytes: int = WINDOW_BYTES,
        read_ahead_bytes: int = READ_AHEAD_BYTES,
        missing_id: int = MISSING_ID,
        rank: int = 0,
        workers: int = 1,
        seed: int = 0,
        shuffle: bool = True,
    ) -> None:
        if not 0 <= rank < workers:
            raise ValueError(f"rank {rank} is not one of {workers} workers")
        if batch_size < workers:
            raise DataError(
                f"data.batch_size: {batch_size} rows cannot be divided over {workers} workers; use {workers} or more"
            )
        files = read_footers(path)
        self.schema = schema if schema is not None else schema_of(path, files)
        self.batch_size, self.rank, self.workers = batch_size, rank, workers
        self.stall_seconds = 0.0
        self.seed, self.shuffle = seed, shuffle
        self.window_bytes, self.read_ahead_bytes, self.missing_id = window_bytes, read_ahead_bytes, missing_id
        self.reader = RowGroupReader(files, self.schema)
        self._groups = self.reader.row_groups()
        self.rows = sum(group.rows for group in self._groups)
        if not self.rows:
            raise DataError(f"{path}: the files hold no rows")
        self._plan_digest = plan_digest(seed, shuffle, window_bytes, [file.name for file in files], self._groups)
        self._features = tuple(self.schema.categorical_names)
        self._epoch: EpochPlan | None = None
        self._taken = 0
        self._windows: _ReadAhead | None = None

    def steps(self, epoch: int, cursor: Cursor | None = None) -> int:
        """Steps of an epoch, or of what `cursor` leaves of it; the same on every rank."""
        return self._plan(epoch, cursor)[1].steps

    def batches(self, epoch: int, cursor: Cursor | None = None) -> Iterator[Batch]:
        """The batches of an epoch, or of what `cursor` (merged over ranks) leaves of it. Reading ahead begins at once.

        Raises:
            CursorError: the cursor is of another epoch, other files, or another seed, shuffle or window_bytes.
            DataError: (while iterating) damaged or unsuitable data.
        """
        self.close()
        cut, plan = self._plan(epoch, cursor)
        self._epoch, self._taken = plan, 0
        self._windows = _ReadAhead(self, epoch, cut, plan)
        return self._consume(self._windows, plan)

    def cursor(self) -> Cursor:
        """This rank's position after the last batch that was handed out (not those read ahead).

        Raises:
            CursorError: no epoch was begun.
        """
        if self._epoch is None:
            raise CursorError("cursor: no epoch was begun; call batches() first")
        return self._epoch.after(self.rank, self._taken)

    def close(self) -> None:
        """Ends reading ahead and closes files. The stream can be used again."""
        if self._windows is not None:
            self._windows.close()
            self._windows = None
        self.reader.close()

    def _plan(self, epoch: int, cursor: Cursor | None) -> tuple[list[Window], EpochPlan]:
        if cursor is None:
            cursor = Cursor(self._plan_digest, epoch, self.workers)
        if cursor.plan != self._plan_digest or cursor.epoch != epoch:
            raise CursorError(
                "cursor: it was taken in another epoch or with other files, another seed, data.shuffle or "
                "data.window_bytes; go on with the same ones, or start the epoch anew"
            )
        cut = windows(self.seed, epoch, self._groups, window_bytes=self.window_bytes, shuffled=self.shuffle)
        return cut, EpochPlan.resume([window.rows for window in cut], cursor, self.workers, self.batch_size)

    def _consume(self, windows: _ReadAhead, plan: EpochPlan) -> Iterator[Batch]:
        try:
            window: DecodedWindow | None = None
            for step in range(plan.steps):
                pieces, missing = [], plan.step_rows(self.rank, step)
                while missing:
                    if window is None or window.exhausted:
                        window = None  # let go of it before waiting for the next
                        window = self._wait(windows)
                    pieces.append(window.take())
                    missing -= len(pieces[-1][0])
                windows.check_open()
                batch = self._batch(pieces, plan.global_rows(step))
                self._taken += batch.rows
                yield batch
        finally:
            windows.close()

    def _wait(self, windows: _ReadAhead) -> DecodedWindow:
        begin = time.perf_counter()
        window = windows.next()
        self.stall_seconds += time.perf_counter() - begin
        return window

    def _batch(self, pieces: list[tuple[np.ndarray, np.ndarray, np.ndarray]], global_rows: int) -> Batch:
        if not pieces:
            dense, features = len(self.schema.dense), len(self._features)
            pieces = [(np.empty(0, np.float32), np.empty((0, dense), np.float32), np.empty((features, 0), np.int64))]
        labels, dense_rows, ids = pieces[0]
        if len(pieces) > 1:
            labels, dense_rows = (np.concatenate([piece[i] for piece in pieces]) for i in range(2))
            ids = np.concatenate([piece[2] for piece in pieces], axis=1)
        return Batch(labels, dense_rows, Ids(self._features, ids.reshape(-1)), global_rows)


class _ReadAhead:
    """This rank's windows, decoded on another thread in the order of the plan, bounded in bytes."""

    def __init__(self, stream: ParquetStream, epoch: int, cut: list[Window], plan: EpochPlan) -> None:
        self._stream, self._epoch = stream, epoch
        self._share = plan.share(stream.rank)
        self._queue = deque((cut[window], taken) for window, taken in plan.queue(stream.rank))
        self._position = 0
        self._decoding: deque[tuple[Future[DecodedWindow], int]] = deque()
        self._held = self._current = 0
        self._closed = False
        self._decoder = ThreadPoolExecutor(1, thread_name_prefix="parquet-decode")
        self._submit(1)

    def next(self) -> DecodedWindow:
        """The next window; keeps as many further ones under way as the read-ahead allows.

        Raises:
            DataError: what decoding raised.
        """
        self.check_open()
        self._held -= self._current
        self._submit(1)
        future, self._current = self._decoding.popleft()
        self._submit(0)
        return future.result()

    def check_open(self) -> None:
        """Raises RuntimeError after `close`: what follows would be read as the end of the epoch."""
        if self._closed:
            raise RuntimeError("the stream was closed, or another epoch begun, before this epoch was read to its end")

    def close(self) -> None:
        self._closed = True
        self._decoder.shutdown(wait=True, cancel_futures=True)

    def _submit(self, at_least: int) -> None:
        while self._queue and (
            len(self._decoding) < at_least or self._held + self._queue[0][0].bytes <= self._stream.read_ahead_bytes
        ):
            window, taken = self._queue.popleft()
            first = self._share - self._position % self._share
            self._position += window.rows - taken
            self._held += window.bytes
            self._decoding.append((self._decoder.submit(self._decode, window, taken, first), window.bytes))

    def _decode(self, window: Window, taken: int, first: int) -> DecodedWindow:
        stream = self._stream
        order = row_order(stream.seed, self._epoch, window, shuffled=stream.shuffle)[taken:]
        return DecodedWindow(stream.reader, window, order, first, self._share, stream.missing_id)
