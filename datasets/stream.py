"""Parquet as a stream of shuffled batches that stops anywhere and goes on with any number of workers."""

from __future__ import annotations

import time
import warnings
from collections.abc import Iterator

import numpy as np

from .batch import MISSING_ID, Batch, Ids
from .decode import RowGroupReader
from .files import schema_of
from .footers import check_unchanged, read_footers
from .order import Cursor, CursorError, EpochPlan, Window, plan_digest, windows
from .readahead import Order, ReadAhead
from .remote import RETRIES
from .schema import DataError, Schema
from .window import DecodedWindow, Piece

WINDOW_BYTES = 32 << 20
READ_AHEAD_BYTES = 128 << 20


class ParquetStream:
    """The rows of a Parquet data set, this rank's share of each step of `batch_size` rows over all ranks.

    path: a file, a folder (all *.parquet below it), a pattern or an fsspec URL. The order of an epoch depends on (seed,
    epoch, files, window_bytes) alone; all ranks take the same number of steps. Decoding and shuffling happen on another
    thread, outside the GIL; a batch's arrays are views of its window. For one consuming thread; one epoch at a time.

    window_bytes: decoded bytes shuffled together, at most, but at least one row group; read_ahead_bytes: decoded bytes
    held, at most, except that the window being read is always held; missing_id: the id of a null. A row group is read
    whole: `warning` (also a Python warning) names the largest where it alone goes beyond read_ahead_bytes.

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
        retries_before = RETRIES.count
        files = read_footers(path)
        self.schema = schema if schema is not None else schema_of(path, files)
        self.path, self.batch_size, self.rank, self.workers = path, batch_size, rank, workers
        self.stall_seconds = 0.0
        self.seed, self.shuffle = seed, shuffle
        self.window_bytes, self.read_ahead_bytes, self.missing_id = window_bytes, read_ahead_bytes, missing_id
        self.reader = RowGroupReader(files, self.schema)
        self._groups = self.reader.row_groups()
        self.rows = sum(group.rows for group in self._groups)
        if not self.rows:
            raise DataError(f"{path}: the files hold no rows")
        self.warning = self._too_large()
        if self.warning is not None:
            warnings.warn(self.warning, stacklevel=2)
        self._plan_digest = plan_digest(seed, shuffle, window_bytes, [file.name for file in files], self._groups)
        self._features = tuple(self.schema.categorical_names)
        self._epoch: EpochPlan | None = None
        self._taken = 0
        self._ahead: ReadAhead | None = None
        self._ready: int | None = None  # the epoch that is being read ahead, the one before read to its end
        self._retries_before = retries_before

    @property
    def retries(self) -> int:
        """Requests to an object store that this process repeated since the stream was opened."""
        return RETRIES.count - self._retries_before

    def steps(self, epoch: int, cursor: Cursor | None = None) -> int:
        """Steps of an epoch, or of what `cursor` leaves of it; the same on every rank."""
        return self._plan(epoch, cursor)[1].steps

    def batches(self, epoch: int, cursor: Cursor | None = None, *, then: int | None = None) -> Iterator[Batch]:
        """The batches of an epoch, or of what `cursor` (merged over ranks) leaves of it. Reading ahead begins at once.

        then: the epoch that will be asked for next, from its beginning: it is read ahead while this one ends.

        Raises:
            CursorError: the cursor is of another epoch, other files, or another seed, shuffle or window_bytes.
            DataError: (while iterating) damaged or unsuitable data, or a file that appeared, changed or vanished.
        """
        cut, plan = self._plan(epoch, cursor)
        if self._ahead is None or self._ready != epoch or cursor is not None:
            self.close()
            order = Order(self.seed, self.shuffle, plan.share(self.rank), self.missing_id)
            self._ahead = ReadAhead(self.reader, order, self.read_ahead_bytes)
            self._ahead.add(epoch, [(cut[window], taken) for window, taken in plan.queue(self.rank)])
        self._epoch, self._taken, self._ready = plan, 0, None
        if then is not None:
            cut, following = self._plan(then, None)
            self._ahead.add(then, [(cut[window], taken) for window, taken in following.queue(self.rank)])
        return self._consume(self._ahead, plan, then)

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
        if self._ahead is not None:
            self._ahead.close()
        self._ahead = self._ready = None
        self.reader.close()

    def _too_large(self) -> str | None:
        largest = max(self._groups, key=lambda group: group.bytes)
        if largest.bytes <= self.read_ahead_bytes:
            return None
        rows = max(1, largest.rows * min(self.window_bytes, self.read_ahead_bytes) // largest.bytes)
        return (
            f"{self.reader.files[largest.file].path}: row group {largest.group} has {largest.bytes:,} bytes when "
            f"decoded, beyond data.read_ahead_bytes ({self.read_ahead_bytes:,}), and is read whole: write the file in "
            f"row groups of at most {rows:,} rows"
        )

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

    def _consume(self, ahead: ReadAhead, plan: EpochPlan, then: int | None) -> Iterator[Batch]:
        complete = False
        try:
            window: DecodedWindow | None = None
            for step in range(plan.steps):
                pieces, missing = [], plan.step_rows(self.rank, step)
                while missing:
                    if window is None or window.exhausted:
                        window = None  # let go of it before waiting for the next
                        window = self._wait(ahead)
                    pieces.append(window.take())
                    missing -= len(pieces[-1].labels)
                ahead.check_open()
                batch = join(
                    self._features, pieces, len(self.schema.dense), self.schema.has_bags, plan.global_rows(step)
                )
                self._taken += batch.rows
                yield batch
            window = None
            ahead.release()
            check_unchanged(self.path, self.reader.files)
            complete = True
        finally:
            if complete and then is not None:
                self._ready = then
            else:
                ahead.close()

    def _wait(self, ahead: ReadAhead) -> DecodedWindow:
        begin = time.perf_counter()
        window = ahead.next()
        self.stall_seconds += time.perf_counter() - begin
        return window


def join(features: tuple[str, ...], pieces: list[Piece], dense: int, bags: bool, global_rows: int) -> Batch:
    """The rows of pieces one after another as one batch; a copy only where there are several."""
    if not pieces:
        offsets = np.zeros(1, np.int64) if bags else None
        empty = np.empty(0, np.float32)
        return Batch(
            empty, np.empty((0, dense), np.float32), Ids(features, np.empty(0, np.int64), offsets), global_rows
        )
    labels, dense_rows, values, offsets, weights = pieces[0]
    if len(pieces) > 1:
        labels = np.concatenate([piece.labels for piece in pieces])
        dense_rows = np.concatenate([piece.dense for piece in pieces])
        values = _by_feature([piece.values for piece in pieces], pieces, len(features))
        if weights is not None:
            weights = _by_feature([np.asarray(piece.weights) for piece in pieces], pieces, len(features))
        if offsets is not None:
            sizes = [np.diff(np.asarray(piece.offsets)).reshape(len(features), -1) for piece in pieces]
            offsets = np.zeros(len(features) * len(labels) + 1, np.int64)
            np.cumsum(np.concatenate(sizes, axis=1).reshape(-1), out=offsets[1:])
    return Batch(labels, dense_rows, Ids(features, values, offsets, weights), global_rows)


def _by_feature(arrays: list[np.ndarray], pieces: list[Piece], features: int) -> np.ndarray:
    """All pieces' values of the first feature, then of the second, and so on."""
    if pieces[0].offsets is None:
        return np.concatenate(
            [array.reshape(features, len(piece.labels)) for array, piece in zip(arrays, pieces, strict=True)], axis=1
        ).reshape(-1)
    ends = [np.asarray(piece.offsets)[:: len(piece.labels)] for piece in pieces]
    return np.concatenate(
        [array[end[f] : end[f + 1]] for f in range(features) for array, end in zip(arrays, ends, strict=True)]
    )
