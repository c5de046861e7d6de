"""How fast training goes, how well, and what it waits for."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager

import torch

from ..datasets.stream import ParquetStream
from ..parameter_server.store import Store
from .group import Group
from .pipeline import Pipeline

# Seconds of one worker; the rest is added up over the workers.
_OWN = "seconds"
_SECONDS = ("pull_wait_seconds", "stall_seconds")
_PER_STEP = ("rows_pulled", "rows_pushed", "wire_bytes")
# Calls repeated after a lost connection, blocks found at another shard: degraded paths, shown and never silent.
_DEGRADED = ("retries", "moved")
# Requests to an object store that were repeated, from opening the data on and also while training pauses.
_DATA = ("data_retries",)


class Meter:
    """Readings of one worker's training, without what happens in a `pause`; added up over the group when asked.

    pull_wait_seconds: waiting for rows; stall_seconds: waiting for data.
    """

    def __init__(self, store: Store, stream: ParquetStream, device: torch.device) -> None:
        self.last_loss: float | None = None  # of an earlier start of the run, until this one has trained
        self._store = store
        self._stream = stream
        self._pipeline: Pipeline | None = None
        self._steps = self._samples = 0
        self._loss = torch.zeros((), dtype=torch.float64, device=device)
        self._begin, self._window = self._readings(), self._readings()

    def start(self, pipeline: Pipeline) -> None:
        """Training begins now."""
        self._pipeline = pipeline
        self._begin = self._readings() | dict.fromkeys(_DATA, 0.0)
        self._window = dict(self._begin)

    def add(self, loss: torch.Tensor, rows: int) -> None:
        """A step is done. loss: this worker's share of the mean loss over the step's `rows`."""
        self._steps += 1
        self._samples += rows
        self._loss += loss * rows  # stays on the device: nobody waits for it here

    @contextmanager
    def pause(self) -> Iterator[None]:
        """What happens inside is no training."""
        before = self._readings()
        yield
        after = self._readings()
        for name in (_OWN, *_SECONDS, *_PER_STEP, *_DEGRADED):
            gone = after[name] - before[name]
            self._begin[name] += gone
            self._window[name] += gone

    def record(self, group: Group) -> dict[str, float]:
        """loss, samples_per_second and what a step cost since the last record. Called by all ranks alike."""
        now = self._readings()
        record = _per_step(self._window, now, group)
        self._window = now
        return record

    def summary(self, group: Group) -> dict[str, float | None]:
        """The same over all of training, with its seconds. Called by all ranks alike."""
        now = self._readings()
        summary: dict[str, float | None] = {"seconds": now[_OWN] - self._begin[_OWN]}
        summary |= _per_step(self._begin, now, group)
        loss = summary.pop("loss", self.last_loss)
        return summary | {"train_loss": loss}

    def mean_loss(self, group: Group) -> float | None:
        """Over all samples trained on. Called by all ranks alike."""
        loss = _per_step(self._begin, self._readings(), group).get("loss")
        return self.last_loss if loss is None else loss

    def _readings(self) -> dict[str, float]:
        counters = self._store.counters.as_dict()
        waited = 0.0 if self._pipeline is None else self._pipeline.wait_seconds
        return {
            "seconds": time.perf_counter(),
            "pull_wait_seconds": waited,
            "stall_seconds": self._stream.stall_seconds,
            "data_retries": self._stream.retries,
            "steps": self._steps,
            "samples": self._samples,
            "loss": float(self._loss),
            **{name: counters[name] for name in (*_PER_STEP, *_DEGRADED)},
        }


def _per_step(begin: dict[str, float], end: dict[str, float], group: Group) -> dict[str, float]:
    names = ("loss", *_SECONDS, *_PER_STEP, *_DEGRADED, *_DATA)
    sums = dict(zip(names, group.sums([end[name] - begin[name] for name in names]), strict=True))
    steps, samples = end["steps"] - begin["steps"], end["samples"] - begin["samples"]
    seconds = end["seconds"] - begin["seconds"]
    record = {"samples_per_second": samples / seconds if seconds > 0 else 0.0}
    record |= {name: sums[name] / group.workers for name in _SECONDS}
    record |= {name: sums[name] / max(steps, 1) for name in _PER_STEP}
    record |= {name: sums[name] for name in (*_DEGRADED, *_DATA)}
    return record | ({"loss": sums["loss"] / samples} if samples else {})
