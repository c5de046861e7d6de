"""The workers of a run, under Ray Train."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import ray
from ray.train import FailureConfig, ScalingConfig
from ray.train import RunConfig as RayRunConfig
from ray.train.torch import TorchTrainer
from ray.train.v2.api.config import LoggingConfig

from .config import ClusterConfig, RunConfig
from .errors import RunFailed
from .restarts import ElasticWorkers, FixedWorkers, RestartPolicy, lacks_room
from .run_folder import RunFolder
from .worker_loop import run_worker

# Callbacks that each cost a process of their own and seconds of every start: Ray Data is not used here, and what a
# dead controller leaves behind the coordinator ends.
_UNUSED_CALLBACKS = {"DatasetsCallback", "PlacementGroupCleanerCallback"}


class _WorkerTrainer(TorchTrainer):  # type: ignore[misc]  # Ray has no types
    """TorchTrainer with our policies, and without the helpers that a run has no use for.

    A Ray that names those otherwise starts them; one that is built otherwise retries what is final, too. namespace: of
    the coordinator.
    """

    def __init__(self, *arguments: Any, namespace: str, **settings: Any) -> None:
        super().__init__(*arguments, **settings)
        self._namespace = namespace

    def _create_default_callbacks(self) -> list[Any]:
        callbacks: list[Any] = super()._create_default_callbacks()
        return [callback for callback in callbacks if type(callback).__name__ not in _UNUSED_CALLBACKS]

    def _initialize_and_run_controller(self, **parts: Any) -> Any:
        scaling = self.scaling_config
        ours = {
            "failure_policy": RestartPolicy(
                self.run_config.failure_config.max_failures, scaling.min_workers, self._namespace
            ),
            "scaling_policy": ElasticWorkers(scaling, self._namespace)
            if scaling.elasticity_enabled
            else FixedWorkers(scaling),
        }
        return super()._initialize_and_run_controller(**parts | ours)


def start_workers(config: RunConfig, folder: RunFolder, namespace: str) -> dict[str, Any]:
    """Trains to the end and returns rank 0's summary. Not on the main thread: Ray Train would take SIGINT there.

    Raises:
        RunFailed: the cluster has no room for the workers.
        ray.train.WorkerGroupError: a worker failed once more than `cluster.max_restarts`, or for a reason that would
            come again; `errors.root_cause` has the cause.
    """
    cluster = config.cluster
    per_worker = {"CPU": cluster.worker_cpus} | ({"GPU": 1.0} if _use_gpu(cluster) else {})
    trainer = _WorkerTrainer(
        run_worker,
        namespace=namespace,
        train_loop_config={
            "job": config.job(),
            "namespace": namespace,
            "blocks": config.store.blocks,
            "timeout": config.store.timeout,
            "start_timeout": cluster.start_timeout,
            "checkpoints": str(folder.checkpoints),
        },
        scaling_config=ScalingConfig(
            num_workers=cluster.workers, use_gpu="GPU" in per_worker, resources_per_worker=per_worker
        ),
        run_config=RayRunConfig(
            name=f"generation-{folder.generation}",
            storage_path=str(Path(folder.logs, "ray_train")),  # Ray's default would litter ~/ray_results
            failure_config=FailureConfig(max_failures=cluster.max_restarts),
            logging_config=LoggingConfig(log_level="ERROR"),
            worker_runtime_env={"env_vars": thread_settings()},
        ),
    )
    try:
        summary: dict[str, Any] = trainer.fit().return_value
    except Exception as error:
        if lacks_room(error):
            raise RunFailed(_no_room(cluster, per_worker)) from error
        raise
    return summary


def thread_settings() -> dict[str, str]:
    """OpenMP threads that sleep where they wait for each other instead of spinning, unless the user chose otherwise.

    Shards, Ray and whatever else runs on a worker's machine take a core away for a moment; threads that spin meanwhile
    make a step up to four times slower (docs/results.md), and sleeping costs a few per cent on an idle machine.
    """
    return {"OMP_WAIT_POLICY": os.environ.get("OMP_WAIT_POLICY", "passive")}


def _use_gpu(cluster: ClusterConfig) -> bool:
    if cluster.gpus == "auto":
        return bool(ray.cluster_resources().get("GPU", 0) >= cluster.least_workers)
    return cluster.gpus


def _no_room(cluster: ClusterConfig, per_worker: dict[str, float]) -> str:
    free = ray.available_resources()
    wants = " and ".join(f"{amount:g} {name}" for name, amount in per_worker.items())
    has = " and ".join(f"{free.get(name, 0.0):g} {name}" for name in per_worker)
    return (
        f"cluster: {cluster.least_workers} workers ask for {wants} each, and the cluster has {has} free beside the "
        f"shards; after {cluster.start_timeout:g} s they were still not there: lower cluster.workers or "
        f"cluster.worker_cpus, or raise cluster.start_timeout"
    )
