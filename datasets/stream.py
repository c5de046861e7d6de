"""Parquet as a stream of shuffled batches that stops anywhere and goes on with any number of workers."""

from __future__ import annotations

import threading
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
_PREPARED_BATCHES = 4


class ParquetStream:
    """The rows of a Parquet data set, this rank's share of each step of `batch_size` rows over all ranks.

    path: a file, a folder (all *.parquet below it) or an fsspec URL. The order of an epoch depends on (seed, epoch,
    files, window_bytes) alone; all ranks take the same number of steps. Decoding and shuffling happen on other threads,
    outside the GIL. For one consuming thread; one epoch at a time.

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
        self._seed, self._shuffle = seed, shuffle
        self._window_bytes, self._read_ahead_bytes, self._missing_id = window_bytes, read_ahead_bytes, missing_id
        self._reader = RowGroupReader(files, self.schema)
        self._groups = self._reader.row_groups()
        self.rows = sum(group.rows for group in self._groups)
        if not self.rows:
            raise DataError(f"{path}: the files hold no rows")
        self._plan_digest = plan_digest(seed, shuffle, window_bytes, [file.name for file in files], self._groups)
        self._features = tuple(self.schema.categorical_names)
        self._epoch: EpochPlan | None = None
        self._taken = 0
        self._prefetch: _Prefetch | None = None

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
        self._prefetch = _Prefetch(self, epoch, cut, plan)
        return self._consume(self._prefetch)

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
        if self._prefetch is not None:
            self._prefetch.close()
            self._prefetch = None
        self._reader.close()

    def _plan(self, epoch: int, cursor: Cursor | None) -> tuple[list[Window], EpochPlan]:
        if cursor is None:
            cursor = Cursor(self._plan_digest, epoch, self.workers)
        if cursor.plan != self._plan_digest or cursor.epoch != epoch:
            raise CursorError(
                "cursor: it was taken in another epoch or with other files, another seed, data.shuffle or "
                "data.window_bytes; go on with the same ones, or start the epoch anew"
            )
        cut = windows(self._seed, epoch, self._groups, window_bytes=self._window_bytes, shuffled=self._shuffle)
        return cut, EpochPlan.resume([window.rows for window in cut], cursor, self.workers, self.batch_size)

    def _consume(self, prefetch: _Prefetch) -> Iterator[Batch]:
        try:
            while True:
                begin = time.perf_counter()
                batch = prefetch.get()
                self.stall_seconds += time.perf_counter() - begin
                if batch is None:
                    return
                self._taken += batch.rows
                yield batch
        finally:
            prefetch.close()

    def _decode(self, epoch: int, window: Window) -> DecodedWindow:
        return DecodedWindow(self._reader, window, row_order(self._seed, epoch, window, shuffled=self._shuffle))

    def _empty(self, rows: int, global_rows: int) -> Batch:
        ids = np.empty((len(self._features), rows), np.int64)
        dense = np.empty((rows, len(self.schema.dense)), np.float32)
        return Batch(np.empty(rows, np.float32), dense, Ids(self._features, ids.reshape(-1)), global_rows)


class _Prefetch:
    """Two threads that read ahead: one decodes windows, bounded in bytes; one gathers batches, a few at a time."""

    def __init__(self, stream: ParquetStream, epoch: int, cut: list[Window], plan: EpochPlan) -> None:
        self._stream, self._number, self._plan = stream, epoch, plan
        self._queue = deque((cut[window], taken) for window, taken in plan.queue(stream.rank))
        self._decoding: deque[tuple[Future[DecodedWindow], int, int]] = deque()
        self._held = 0
        self._ready: deque[Batch | BaseException | None] = deque()
        self._changed = threading.Condition()
        self._closed = False
        self._decoder = ThreadPoolExecutor(1, thread_name_prefix="parquet-decode")
        self._gatherer = threading.Thread(target=self._run, name="parquet-gather", daemon=True)
        self._gatherer.start()

    def get(self) -> Batch | None:
        """The next batch, None at the end; raises what the threads raised, or RuntimeError after `close`."""
        with self._changed:
            self._changed.wait_for(lambda: bool(self._ready) or self._closed)
            if self._closed:
                raise RuntimeError(
                    "the stream was closed, or another epoch begun, before this epoch was read to its end"
                )
            item = self._ready.popleft()
            self._changed.notify_all()
        if isinstance(item, BaseException):
            raise item
        return item

    def close(self) -> None:
        with self._changed:
            self._closed = True
            self._ready.clear()
            self._changed.notify_all()
        self._decoder.shutdown(wait=True, cancel_futures=True)
        self._gatherer.join()

    def _put(self, item: Batch | BaseException | None) -> bool:
        with self._changed:
            self._changed.wait_for(lambda: len(self._ready) < _PREPARED_BATCHES or self._closed)
            if not self._closed:
                self._ready.append(item)
            self._changed.notify_all()
            return not self._closed

    def _run(self) -> None:
        try:
            for batch in self._batches():
                if not self._put(batch):
                    return
            self._put(None)
        except BaseException as error:  # handed to the consumer, which raises it
            self._put(error)

    def _batches(self) -> Iterator[Batch]:
        stream, plan = self._stream, self._plan
        window: DecodedWindow | None = None
        begin = size = 0
        for step in range(plan.steps):
            rows = plan.step_rows(stream.rank, step)
            batch = stream._empty(rows, plan.global_rows(step))
            ids = batch.ids.values.reshape(len(stream._features), rows)
            at = 0
            while at < rows:
                if window is None or begin == len(window.order):
                    window = None  # let go of it before waiting for the next
                    self._held -= size
                    window, begin, size = self._next_window()
                take = min(rows - at, len(window.order) - begin)
                window.gather(begin, begin + take, at, batch.labels, batch.dense, ids, stream._missing_id)
                begin, at = begin + take, at + take
            yield batch

    def _next_window(self) -> tuple[DecodedWindow, int, int]:
        """(window, rows already taken, bytes); keeps as many further ones under way as the read-ahead allows."""
        self._submit(1)
        future, taken, size = self._decoding.popleft()
        self._submit(0)
        return future.result(), taken, size

    def _submit(self, at_least: int) -> None:
        while self._queue and (
            len(self._decoding) < at_least or self._held + self._queue[0][0].bytes <= self._stream._read_ahead_bytes
        ):
            window, taken = self._queue.popleft()
            self._held += window.bytes
            self._decoding.append(
                (self._decoder.submit(self._stream._decode, self._number, window), taken, window.bytes)
            )
