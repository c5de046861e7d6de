"""What each Ray Train worker runs: connects to coordinator and shards, then hands over to `workers.trainer`."""

from __future__ import annotations

import os
import threading
import time
from collections.abc import Mapping
from contextlib import suppress
from typing import Any

import ray
import ray.train
import ray.train.torch
import torch
from pydantic import SecretStr
from ray.exceptions import RayError

from ..parameter_server.allocator import keep_freed_memory
from ..parameter_server.blocks import BlockMap
from ..parameter_server.store import Store
from ..workers.group import Group
from ..workers.job import TrainingJob
from ..workers.replicated import ReplicatedStore, all_gather_bytes
from ..workers.trainer import train
from .calls import CONTROL_SECONDS, ask
from .errors import Resized
from .generations import Assignment
from .shard_group import NAME

STOP_POLL_SECONDS = 0.5
FIND_SECONDS = 5.0  # for one answer of the coordinator in the background


def run_worker(assignment: Mapping[str, Any]) -> dict[str, Any]:
    """assignment: job, namespace, blocks, timeout, start_timeout, folder of the checkpoints.

    Ray Train runs this once for every incarnation of the group; the coordinator gives each its generation.
    """
    keep_freed_memory()
    coordinator = ray.get_actor(NAME, namespace=assignment["namespace"])
    context = ray.train.get_context()
    job: TrainingJob = assignment["job"]
    _use_threads(job, context.get_local_world_size())
    group = Group(context.get_world_rank(), context.get_world_size(), ray.train.torch.get_device())
    within = CONTROL_SECONDS + 2 * assignment["start_timeout"]
    first = group.rank == 0
    joined: Assignment = group.from_first(ask(coordinator, "join", group.workers, within=within) if first else None)

    def report(record: dict[str, Any]) -> None:
        # Fire and forget: training never waits for its own progress line.
        now = round(time.time(), 3)  # not when the driver hears of it: a coordinator may be restarting in between
        coordinator.report.remote({"time": now, "generation": joined.generation, **record})

    stop = StopFlag(coordinator)
    # Asked for, not assigned: Ray Train shows the assignment in its dashboard and state files.
    token = ask(coordinator, "token")
    with _open_store(job, assignment, joined, coordinator, token, group.workers) as store:
        try:
            summary = train(
                job,
                store,
                rank=group.rank,
                workers=group.workers,
                generation=joined.generation,
                reached=joined.reached,
                device=group.device,
                directory=assignment["checkpoints"],
                report=report,
                stop_requested=stop.is_set,
                wrap=ray.train.torch.prepare_model,
            )
            if summary["stopped"] and group.from_first(first and ask(coordinator, "at_rest", joined.generation)):
                raise Resized(f"{group.workers} workers made place at step {summary['steps']}")
            return summary
        finally:
            stop.close()


def _open_store(
    job: TrainingJob,
    assignment: Mapping[str, Any],
    joined: Assignment,
    coordinator: Any,
    token: SecretStr,
    workers: int,
) -> Store:
    timeout = assignment["timeout"]

    def find_map() -> BlockMap | None:
        try:
            block_map: BlockMap = ray.get(coordinator.block_map.remote(), timeout=FIND_SECONDS)
        except RayError:  # it is restarting itself: asked again soon
            return None
        return block_map

    if job.embedding.placement == "sharded":
        return Store.connect(joined.addresses, timeout=timeout, token=token, find_map=find_map)
    others = {"exchange": all_gather_bytes()} if workers > 1 else {}
    return ReplicatedStore(blocks=assignment["blocks"], seed=job.seed, timeout=timeout, **others)


def _use_threads(job: TrainingJob, workers_here: int) -> None:
    """Ray sets one thread for a worker that asks for one CPU or less; CPUs asked for are for placement only here."""
    cores = len(os.sched_getaffinity(0))
    torch.set_num_threads(job.train.threads or max(1, cores // workers_here))


class StopFlag:
    """The coordinator's stop request, asked for in the background so that a step never waits for the answer."""

    def __init__(self, coordinator: Any) -> None:
        self._coordinator = coordinator
        self._stop = threading.Event()
        self._closed = threading.Event()
        threading.Thread(target=self._poll, name="stop-poll", daemon=True).start()

    def is_set(self) -> bool:
        return self._stop.is_set()

    def close(self) -> None:
        self._closed.set()

    def _poll(self) -> None:
        while not self._closed.wait(STOP_POLL_SECONDS):
            with suppress(RayError):  # it is restarting: asked again soon
                if ray.get(self._coordinator.stop_requested.remote(), timeout=FIND_SECONDS):
                    self._stop.set()
                    return
