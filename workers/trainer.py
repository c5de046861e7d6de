"""The training loop of one worker: from the newest checkpoint to the last step."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import torch
from torch import nn

from ..datasets.files import load_schema
from ..datasets.order import Cursor
from ..datasets.schema import Batch, DataError, Schema
from ..datasets.stream import ParquetStream
from ..parameter_server.requests import Clock
from ..parameter_server.store import Store, StoreError
from .checkpoints import Checkpoints, Found, load_by_name, newest
from .evaluate import best_auc, measure
from .group import Group
from .job import CheckpointConfig, TrainConfig, TrainingJob
from .learner import Learner
from .network import Network, NetworkSpec, dense_tensors, describe, load_dense, methods_of
from .pipeline import Pipeline
from .progress import Meter
from .replicated import ReplicatedStore

__all__ = ["CheckpointConfig", "TrainConfig", "TrainingJob", "train"]

# Steps between two looks at the stop flag, where several workers have to agree on it.
AGREE_EVERY = 10


def train(
    job: TrainingJob,
    store: Store,
    *,
    rank: int = 0,
    workers: int = 1,
    generation: int = 1,
    reached: int | None = None,
    device: torch.device | str = "cpu",
    directory: str,
    report: Callable[[dict[str, Any]], object] = lambda record: None,
    stop_requested: Callable[[], bool] = lambda: False,
    wrap: Callable[[nn.Module], nn.Module] = lambda module: module,
) -> dict[str, Any]:
    """Trains what `job` says, as one of `workers` workers; returns the summary (the keys of `train --json`).

    A checkpoint in `directory` is gone on from, the newest that verifies. With several workers a torch.distributed
    process group must exist. generation: grows with every start of the run; older workers are fenced. reached: the step
    that an earlier generation had come to on this very store, which therefore goes back to the checkpoint, or without
    one to the initial values. report: takes {"note": text} and records with a step; called on rank 0 alone.
    stop_requested: asked at step boundaries; the run then ends with a checkpoint, and the summary says "stopped".
    wrap: DistributedDataParallel or the like.

    Raises:
        DataError, EmbeddingError, CheckpointError, TableError: the user's input is wrong; one line.
        StoreError: a shard failed or refused.
    """
    group = Group(rank, workers, torch.device(device))
    run = _Run(job, store, group, generation, reached, directory, report if rank == 0 else lambda record: None)
    try:
        return run.train(stop_requested, wrap)
    finally:
        run.close()


def open_stream(
    job: TrainingJob, path: str, schema: Schema, batch_size: int, *, shuffle: bool, rank: int, workers: int
) -> ParquetStream:
    """One worker's share of the data at `path`, in batches of `batch_size` rows over all workers together."""
    data = job.data
    return ParquetStream(
        path,
        batch_size=batch_size,
        schema=schema,
        window_bytes=data.window_bytes,
        read_ahead_bytes=data.read_ahead_bytes,
        missing_id=data.missing_id,
        rank=rank,
        workers=workers,
        seed=job.seed,
        shuffle=shuffle,
    )


class _Run:
    """State of one call of `train`."""

    def __init__(
        self,
        job: TrainingJob,
        store: Store,
        group: Group,
        generation: int,
        reached: int | None,
        directory: str,
        report: Callable[[dict[str, Any]], object],
    ) -> None:
        if job.data.path is None:
            raise DataError("data.path: nothing to train on; give a Parquet file, a folder of them or a URL")
        if job.train.threads is not None:
            torch.set_num_threads(job.train.threads)
        self.job, self.store, self.group, self.report = job, store, group, report
        self.generation, self.reached = generation, reached
        self.checkpoints = Checkpoints(directory, store, job.checkpoint.keep, report)
        self.schema = load_schema(job.data.path, job.data)
        self.stream = self._open(job.data.path, self.schema, job.data.batch_size, job.data.shuffle)
        self.eval_stream = (
            self._open(job.data.eval_path, self.schema, job.data.eval_batch_size, False) if job.data.eval_path else None
        )
        optimizer = job.optimizer.sparse.update
        self.spec = NetworkSpec.plan(self.schema, job.embedding, job.model, optimizer, job.seed)
        if group.rank:  # rank 0 creates the tables, the others find them
            group.barrier()
        self.network = Network(self.spec, store, group.device)
        if not group.rank:
            group.barrier()
        self.step = 0
        self.samples = 0
        self.meter = Meter(store, self.stream, group.device)

    @property
    def _replicated(self) -> bool:
        """Whether every worker has to do to its own store what rank 0 does to shared shards."""
        return isinstance(self.store, ReplicatedStore)

    def _open(self, path: str, schema: Schema, batch_size: int, shuffle: bool) -> ParquetStream:
        stream = open_stream(
            self.job, path, schema, batch_size, shuffle=shuffle, rank=self.group.rank, workers=self.group.workers
        )
        if stream.warning is not None:
            self.report({"note": stream.warning})
        return stream

    def train(self, stop_requested: Callable[[], bool], wrap: Callable[[nn.Module], nn.Module]) -> dict[str, Any]:
        found = self._begin_with()
        cursor = Cursor.from_dict(found.state["cursor"]) if found else None
        total = self._total_steps(cursor)
        self.learner = Learner(self.network, self.job.optimizer, total_steps=total, wrap=wrap, group=self.group)
        if found is not None:
            self._take_up(found)
        self.group.barrier()
        self._seed()
        return self._loop(total, cursor, stop_requested)

    def _begin_with(self) -> Found | None:
        """The checkpoint to go on from, if any; the generation has begun, the tables are loaded, the rest is not."""
        found: Found | None = None
        if self.group.rank == 0:
            found, skipped = newest(self.checkpoints.directory)
            for problem in skipped:
                self.report({"note": f"skipped: {problem}"})
        found = self.group.from_first(found)
        if found is not None:
            self.step, self.samples = found.step, int(found.state["samples"])
            self.checkpoints.newest = found.path
        if self.group.rank == 0 or self._replicated:
            # Fenced first: nothing that an older generation still sends reaches what is loaded now.
            self.store.begin(self.generation, self.group.workers, self.step)
            self._load(found)
        return found

    def _load(self, found: Found | None) -> None:
        if found is not None:
            self.store.load(found.path)
            self.report({"note": f"going on from {found.path}"})
        else:
            if self.reached is not None:
                self.store.reset()
                self.report({"note": "no checkpoint yet: going on from the beginning"})
            if self.job.train.init_from is not None:
                self.report({"note": load_by_name(self.store, self.job.train.init_from)})
        if self.reached is not None:
            redone = max(0, self.reached - self.step)
            who = f"generation {self.generation}, workers: {self.group.workers}"
            self.report({"note": f"{who}: {redone} steps after step {self.step} are done again"})
            self.report({"step": self.step, "steps_redone": redone, "workers": self.group.workers})

    def _take_up(self, found: Found) -> None:
        fresh = load_dense(self.network, found.tensors, self.learner.optimizer)
        if fresh:
            kind = self.job.optimizer.dense.kind
            self.report({"note": f"the checkpoint holds no {kind} state for the dense part; it begins anew"})
        self.meter.last_loss = found.state["train_loss"]

    def _total_steps(self, cursor: Cursor | None) -> int:
        """The number of the last step, from the beginning of the run."""
        first = 0 if cursor is None else cursor.epoch
        last = self.job.train.max_steps
        total = self.step
        for epoch in range(first, self.job.train.epochs):
            if last is not None and total >= last:
                break
            total += self.stream.steps(epoch, cursor if epoch == first else None)
        return total if last is None else min(total, max(self.step, last))

    def _batches(self, cursor: Cursor | None) -> Iterator[Batch]:
        first, last = 0 if cursor is None else cursor.epoch, self.job.train.epochs - 1
        for epoch in range(first, last + 1):
            following = epoch + 1 if epoch < last else None
            yield from self.stream.batches(epoch, cursor if epoch == first else None, then=following)

    def _clock(self, step: int) -> Clock:
        train = self.job.train
        return Clock(self.generation, step, self.group.rank, self.group.workers, train.lag, train.consistency == "sync")

    def _seed(self) -> None:
        """What a model draws after a boundary depends on (seed, step, rank) alone: no random state in checkpoints."""
        torch.manual_seed((self.job.seed * 1_000_003 + self.step) * 1_000_003 + self.group.rank)

    def _loop(self, total: int, cursor: Cursor | None, stop_requested: Callable[[], bool]) -> dict[str, Any]:
        job, network = self.job, self.network
        pipeline = Pipeline(self._batches(cursor), network.embeddings, self._clock, depth=job.train.lag, step=self.step)
        result: dict[str, Any] | None = None
        stopped = False
        self.meter.start(pipeline)
        while self.step < total:
            boundary = self._next_boundary(total)
            while self.step < boundary:
                batch, ticket = pipeline.next(boundary)
                self.step += 1
                loss = self.learner.step(batch, ticket, self._clock(self.step), pipeline.settle)
                self.samples += batch.global_rows
                self.meter.add(loss, batch.global_rows)
                if self.step % job.train.log_every == 0 or self.step == total:
                    self.report(self._record(total))
                if not stopped and self._agree_to_stop(stop_requested):
                    stopped = True
                    total = boundary = pipeline.issued  # what was asked for is trained, nothing more
            self._drain()
            result = self._at_boundary(total, stopped) or result
        self._last_checkpoint()
        if result is None and not stopped:
            result = self._evaluate(total)
        self.group.barrier()
        return self._summary(result, stopped)

    def _next_boundary(self, total: int) -> int:
        """The next step after which something wants to see the tables without a pull or push under way."""
        intervals = [self.job.checkpoint.every, self.job.train.eval_every if self.eval_stream else 0]
        return min([total, *((self.step // every + 1) * every for every in intervals if every)])

    def _agree_to_stop(self, stop_requested: Callable[[], bool]) -> bool:
        if self.group.workers > 1 and self.step % AGREE_EVERY:
            return False
        return self.group.any(stop_requested())

    def _drain(self) -> None:
        self.network.embeddings.drain()
        self.group.barrier()

    def _at_boundary(self, total: int, stopped: bool) -> dict[str, Any] | None:
        """Checkpoint and evaluation, whichever are due; returns the evaluation."""
        every, last = self.job.checkpoint.every, self.step == total
        saved = last or (every and self.step % every == 0)
        if saved:
            self._save()
        every = self.job.train.eval_every
        due = (last and not stopped) or (every and self.step % every == 0)
        result = self._evaluate(total) if due else None
        if saved and result is not None and self.group.rank == 0:
            metric = self.network.objective.judged_by
            if (value := result[metric]) is not None:
                self.checkpoints.judge(self.step, metric, value)
        return result

    def _save(self) -> None:
        with self.meter.pause():
            cursors = self.group.gather(self.stream.cursor())
            loss = self.meter.mean_loss(self.group)
            if self.group.rank == 0:
                state = {
                    "cursor": Cursor.merge(cursors).to_dict(),
                    "samples": self.samples,
                    "train_loss": loss,
                    "network": self.spec.model_dump(mode="json"),
                }
                self.checkpoints.save(self.step, dense_tensors(self.network, self.learner.optimizer), state)
            self.group.barrier()
            self._seed()

    def _last_checkpoint(self) -> None:
        if self.group.any(not self.checkpoints.finish()):
            self._save()
            if self.group.any(not self.checkpoints.finish()):
                raise StoreError(f"the checkpoint of step {self.step}, the last one, could not be written twice")

    def _evaluate(self, total: int) -> dict[str, Any] | None:
        if self.eval_stream is None:
            return None
        with self.meter.pause():
            begin = time.perf_counter()
            mine = measure(self.network, self.eval_stream.batches(0))
            result = self.network.objective.metrics().merge(self.group.gather(mine)).compute()
            seconds = time.perf_counter() - begin
        shown = {key: value for key, value in result.items() if key != "samples"}
        self.report({"step": self.step, "steps_total": total, **shown, "eval_seconds": seconds})
        return result

    def _record(self, total: int) -> dict[str, Any]:
        factor = self.learner.factor(self.step)
        rate = factor * self.job.optimizer.sparse.learning_rate
        return {"step": self.step, "steps_total": total, **self.meter.record(self.group), "learning_rate": rate}

    def _summary(self, result: Mapping[str, Any] | None, stopped: bool) -> dict[str, Any]:
        summary: dict[str, Any] = {
            "steps": self.step,
            "samples": self.samples,
            **self.meter.summary(self.group),
            "workers": self.group.workers,
            "method": methods_of(self.spec.features),
            "placement": self.job.embedding.placement,
            "consistency": self.job.train.consistency,
            "eval": dict(result) if result else None,
            **describe(self.network),
            "checkpoint": self.checkpoints.newest,
            "best_checkpoint": self.checkpoints.best,
            "stopped": stopped,
        }
        if self.job.data.eval_path:
            summary["best_auc"] = best_auc(self.job.data.eval_path)
        return summary

    def close(self) -> None:
        self.stream.close()
        if self.eval_stream is not None:
            self.eval_stream.close()
