"""What a worker is asked to train."""

from __future__ import annotations

from typing import Literal

from pydantic import BaseModel, ConfigDict, Field

from ..datasets.schema import DataConfig
from .embeddings.planning import EmbeddingConfig
from .models.build import ModelConfig
from .optimizers import OptimizerConfig


class TrainConfig(BaseModel):
    """The `train` section of a run."""

    model_config = ConfigDict(extra="forbid")
    epochs: int = Field(default=1, ge=1, description="passes over the data")
    max_steps: int | None = Field(default=None, ge=1, description="steps after which to end, from the run's beginning")
    consistency: Literal["bounded", "sync"] = Field(
        default="bounded", description="what a pull sees: all but the last `staleness` steps, or every step"
    )
    staleness: int = Field(default=1, ge=0, le=16, description="steps by which `bounded` pulls ahead; `sync` is 0")
    eval_every: int = Field(default=0, ge=0, description="steps between evaluations; 0: only at the end")
    log_every: int = Field(default=50, ge=1, description="steps between records of progress")
    init_from: str | None = Field(default=None, description="checkpoint whose tables, by name, a new run begins with")
    threads: int | None = Field(
        default=None, ge=1, description="torch threads of a worker; None: the machine's cores divided by its workers"
    )

    @property
    def lag(self) -> int:
        """Steps that a pull may miss."""
        return self.staleness if self.consistency == "bounded" else 0


class CheckpointConfig(BaseModel):
    """The `checkpoint` section of a run."""

    model_config = ConfigDict(extra="forbid")
    every: int = Field(default=0, ge=0, description="steps between checkpoints; 0: only at the end")
    keep: int = Field(
        default=3, ge=1, description="newest checkpoints that stay; the one that was evaluated best stays, too"
    )


class TrainingJob(BaseModel):
    """The sections of a run that its workers need."""

    model_config = ConfigDict(extra="forbid")
    data: DataConfig
    model: ModelConfig = Field(default_factory=ModelConfig)
    embedding: EmbeddingConfig = Field(default_factory=EmbeddingConfig)
    optimizer: OptimizerConfig = Field(default_factory=OptimizerConfig)
    train: TrainConfig = Field(default_factory=TrainConfig)
    checkpoint: CheckpointConfig = Field(default_factory=CheckpointConfig)
    seed: int = Field(default=0, ge=0, lt=2**63)
