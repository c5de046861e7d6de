"""What each Ray Train worker runs: connects to shards and coordinator, then hands over to `workers.trainer`."""

from __future__ import annotations

import os
import threading
from collections.abc import Mapping
from typing import Any

import ray
import ray.train
import ray.train.torch
import torch
from pydantic import SecretStr

from ..parameter_server.allocator import keep_freed_memory
from ..parameter_server.store import Store
from ..workers.job import TrainingJob
from ..workers.replicated import ReplicatedStore, all_gather_bytes
from ..workers.trainer import train
from .coordinator import NAME

STOP_POLL_SECONDS = 0.5
CONTROL_SECONDS = 30.0  # for one small call to the coordinator


def run_worker(assignment: Mapping[str, Any]) -> dict[str, Any]:
    """assignment: job, namespace, addresses of the shards, blocks, timeout, generation, folder of the checkpoints."""
    keep_freed_memory()
    coordinator = ray.get_actor(NAME, namespace=assignment["namespace"])
    context = ray.train.get_context()
    job: TrainingJob = assignment["job"]
    _use_threads(job, context.get_local_world_size())
    stop = StopFlag(coordinator)
    # Asked for, not assigned: Ray Train shows the assignment in its dashboard and state files.
    token = ray.get(coordinator.token.remote(), timeout=CONTROL_SECONDS)
    with _open_store(job, assignment, context.get_world_size(), token) as store:
        try:
            return train(
                job,
                store,
                rank=context.get_world_rank(),
                workers=context.get_world_size(),
                generation=assignment["generation"],
                device=ray.train.torch.get_device(),
                directory=assignment["checkpoints"],
                report=coordinator.report.remote,  # fire and forget: training never waits for its own progress line
                stop_requested=stop.is_set,
                wrap=ray.train.torch.prepare_model,
            )
        finally:
            stop.close()


def _open_store(job: TrainingJob, assignment: Mapping[str, Any], workers: int, token: SecretStr) -> Store:
    timeout = assignment["timeout"]
    if job.embedding.placement == "sharded":
        return Store.connect(assignment["addresses"], timeout=timeout, token=token)
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
            if ray.get(self._coordinator.stop_requested.remote()):
                self._stop.set()
                return
