"""The `optimizer` section: what the shards apply to rows, what workers apply to the dense part, and the schedule."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Literal

import torch
from pydantic import BaseModel, ConfigDict, Field
from torch import nn

from ..parameter_server.tables import Optimizer
from .schedule import ScheduleConfig


class SparseConfig(Optimizer):
    """`optimizer.sparse`: the shards' update of a row, and its learning rate before the schedule."""

    learning_rate: float = Field(
        default=0.03, gt=0, allow_inf_nan=False, description="before the schedule; travels in every push"
    )

    @property
    def update(self) -> Optimizer:
        """What the shards need to know; the learning rate travels in every push."""
        return Optimizer(**self.model_dump(exclude={"learning_rate"}))


class DenseConfig(BaseModel):
    """`optimizer.dense`: the workers' update of the dense part (torch.optim), and its learning rate."""

    model_config = ConfigDict(extra="forbid", frozen=True)
    kind: Literal["sgd", "adagrad", "adam"] = "adagrad"
    learning_rate: float = Field(default=0.005, gt=0, allow_inf_nan=False, description="before the schedule")
    eps: float = Field(default=1e-8, gt=0)


class OptimizerConfig(BaseModel):
    """The `optimizer` section of a run."""

    model_config = ConfigDict(extra="forbid")
    sparse: SparseConfig = Field(default=SparseConfig())
    dense: DenseConfig = Field(default=DenseConfig())
    schedule: ScheduleConfig = Field(default_factory=ScheduleConfig)


def dense_optimizer(config: DenseConfig, parameters: Iterable[nn.Parameter]) -> torch.optim.Optimizer:
    """The torch optimizer of the dense part; its learning rate is set anew in every step."""
    if config.kind == "sgd":
        return torch.optim.SGD(parameters, lr=config.learning_rate)
    kind = torch.optim.Adagrad if config.kind == "adagrad" else torch.optim.Adam
    return kind(parameters, lr=config.learning_rate, eps=config.eps)
