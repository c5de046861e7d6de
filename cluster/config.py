"""The configuration of a run: each room's settings, put together."""

from __future__ import annotations

import os
import time
from collections.abc import Sequence
from functools import cached_property
from pathlib import Path
from typing import Any, Literal

import yaml
from pydantic import BaseModel, ConfigDict, Field, field_validator, model_validator

from ..datasets.schema import DataConfig
from ..parameter_server.store import StoreConfig
from ..workers.embeddings.planning import EmbeddingConfig
from ..workers.job import CheckpointConfig, TrainConfig, TrainingJob
from ..workers.models.build import ModelConfig
from ..workers.optimizers import OptimizerConfig
from .settings import resolve

MAX_WORKERS = 4096


class RunSection(BaseModel):
    """The `run` section: where the run lives."""

    model_config = ConfigDict(extra="forbid")
    dir: str | None = Field(default=None, description="folder of the run; None: runs/DATE-NAME")
    name: str = Field(default="train", pattern=r"^[\w.-]+$", description="NAME in the default folder")


class ClusterConfig(BaseModel):
    """The `cluster` section. CPUs are what Ray is asked for, not what a process may use; the defaults fit one CPU."""

    model_config = ConfigDict(extra="forbid")
    address: str | None = Field(
        None, description="Ray cluster to join (auto or host:port); None: a local one for this run"
    )
    shards: int = Field(default=2, ge=1, le=4096, description="parameter-server shards")
    workers: int | tuple[int, int] = Field(
        default=1,
        description="data-parallel workers; [least, most]: as many as there is room for, also while the run goes on",
    )
    shard_cpus: float = Field(default=0.25, ge=0, description="CPUs to ask Ray for, per shard")
    worker_cpus: float = Field(default=0.5, ge=0, description="CPUs to ask Ray for, per worker")
    gpus: bool | Literal["auto"] = Field(
        default="auto", description="one GPU per worker; auto: if the cluster has as many (of a range, as its least)"
    )
    start_timeout: float = Field(default=120.0, gt=0, description="seconds to wait for the cluster to have room")
    driver_timeout: float = Field(
        default=30.0, gt=0, description="seconds after which a silent driver is taken for dead"
    )
    lease: float = Field(
        default=30.0, ge=5, description="seconds that a shard serves without hearing from the coordinator"
    )
    max_restarts: int = Field(
        default=3, ge=0, description="times the workers of a start may go back to the last checkpoint by themselves"
    )

    @field_validator("workers", mode="before")
    @classmethod
    def _check_workers(cls, value: Any) -> Any:
        ends = list(value) if isinstance(value, (list, tuple)) else [value, value]
        if len(ends) != 2 or any(type(end) is not int for end in ends) or not 1 <= ends[0] <= ends[1] <= MAX_WORKERS:
            raise ValueError(f"expected a number from 1 to {MAX_WORKERS}, or two, [least, most]")
        return (ends[0], ends[1]) if isinstance(value, (list, tuple)) else ends[0]

    @property
    def least_workers(self) -> int:
        return self.workers[0] if isinstance(self.workers, tuple) else self.workers

    @property
    def most_workers(self) -> int:
        return self.workers[1] if isinstance(self.workers, tuple) else self.workers


class RunConfig(BaseModel):
    """Everything that a run depends on. `RunConfig.load("criteo.yaml", "train.epochs=2")` reads one."""

    model_config = ConfigDict(extra="forbid", ignored_types=(cached_property,))
    run: RunSection = Field(default_factory=RunSection)
    data: DataConfig = Field(default_factory=DataConfig)
    model: ModelConfig = Field(default_factory=ModelConfig)
    embedding: EmbeddingConfig = Field(default_factory=EmbeddingConfig)
    optimizer: OptimizerConfig = Field(default_factory=OptimizerConfig)
    train: TrainConfig = Field(default_factory=TrainConfig)
    store: StoreConfig = Field(default_factory=StoreConfig)
    cluster: ClusterConfig = Field(default_factory=ClusterConfig)
    checkpoint: CheckpointConfig = Field(default_factory=CheckpointConfig)
    seed: int = Field(default=0, ge=0, lt=2**63, description="of initial values, order and hashes")

    @model_validator(mode="after")
    def _every_worker_has_rows(self) -> RunConfig:
        most = self.cluster.most_workers
        for name in ("batch_size", "eval_batch_size"):
            if (rows := getattr(self.data, name)) < most:
                raise ValueError(f"data.{name}: {rows} rows cannot be divided over {most} workers (cluster.workers)")
        return self

    @classmethod
    def load(cls, path: str | Path | None = None, *assignments: str) -> RunConfig:
        """Reads a YAML file (or none), then EMBERSHARD_SECTION__KEY from the environment, then key=value strings.

        Relative paths in it are taken from the current folder.

        Raises:
            ConfigError: one line that names the key, where it was given, and the nearest key that exists.
        """
        return resolve(cls, None if path is None else Path(path), os.environ, assignments)

    @cached_property
    def run_dir(self) -> Path:
        """Absolute; the default is fixed the first time it is asked for."""
        chosen = self.run.dir or f"runs/{time.strftime('%Y%m%d-%H%M%S')}-{self.run.name}"
        return Path(chosen).expanduser().resolve()

    def job(self) -> TrainingJob:
        """What the workers need of it; local paths are absolute, since workers run elsewhere."""
        data = self.data.model_copy(update={name: absolute(getattr(self.data, name)) for name in ("path", "eval_path")})
        return TrainingJob(
            data=data,
            model=self.model,
            embedding=self.embedding,
            optimizer=self.optimizer,
            train=self.train,
            checkpoint=self.checkpoint,
            seed=self.seed,
        )

    def to_yaml(self) -> str:
        """The resolved configuration; `load` reads it back, from any folder."""
        job = self.job()
        values: dict[str, Any] = self.model_dump(mode="json")
        values["data"] = job.data.model_dump(mode="json")
        values["run"]["dir"] = str(self.run_dir)
        return yaml.safe_dump(values, sort_keys=False)


def absolute(path: str | None) -> str | None:
    """A local path made absolute; a URL is left as it is."""
    return path if path is None or "://" in path else str(Path(path).expanduser().resolve())


def load_run(folder: Path, assignments: Sequence[str] = ()) -> RunConfig:
    """The configuration that a run was started with."""
    return RunConfig.load(folder / "config.yaml", *assignments)
