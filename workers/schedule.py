"""The learning rate as a pure function of the step."""

from __future__ import annotations

import math
from typing import Literal

from pydantic import BaseModel, ConfigDict, Field


class ScheduleConfig(BaseModel):
    """`optimizer.schedule`: a factor on every learning rate. Linear warm-up, a plateau, then a decay."""

    model_config = ConfigDict(extra="forbid")
    kind: Literal["constant", "linear", "polynomial", "cosine"] = Field(
        default="constant", description="how the factor falls after the plateau"
    )
    warmup_steps: int = Field(default=0, ge=0, description="steps in which the factor rises from 0 to 1")
    decay_start: int | None = Field(
        default=None, ge=0, description="last step of the plateau; None: end of the warm-up"
    )
    decay_steps: int | None = Field(default=None, gt=0, description="steps of the decay; None: the rest of the run")
    final_factor: float = Field(default=0.0, ge=0, le=1, description="the factor when the decay has ended")
    power: float = Field(default=2.0, gt=0, description="exponent of `polynomial`")


def factor(config: ScheduleConfig, step: int, total_steps: int) -> float:
    """What the learning rates are multiplied by in `step`, counted from 1, of a run of `total_steps`."""
    if step < config.warmup_steps:
        return step / config.warmup_steps
    if config.kind == "constant":
        return 1.0
    start = config.warmup_steps if config.decay_start is None else max(config.decay_start, config.warmup_steps)
    length = config.decay_steps if config.decay_steps is not None else total_steps - start
    if step <= start or length <= 0:
        return 1.0
    left = max(0.0, 1.0 - (step - start) / length)
    if config.kind == "cosine":
        shape = 0.5 * (1.0 - math.cos(math.pi * left))
    else:
        shape = left if config.kind == "linear" else left**config.power
    return config.final_factor + (1.0 - config.final_factor) * shape
