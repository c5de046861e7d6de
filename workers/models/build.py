"""The `model` section of a run, and the model that it describes."""

from __future__ import annotations

from typing import Literal

from pydantic import BaseModel, ConfigDict, Field

from .base import Model
from .dcn_v2 import DCNv2
from .dlrm import DLRM


class ModelConfig(BaseModel):
    """The `model` section of a run. Widths are those of the layers; what depends on the data is added by the model."""

    model_config = ConfigDict(extra="forbid")
    name: Literal["dlrm", "dcn_v2"] = Field(default="dlrm", description="dlrm or dcn_v2")
    bottom: list[int] = Field(
        default=[512, 256, 64], description="hidden layers for the dense columns; one of width embedding.dim follows"
    )
    top: list[int] = Field(
        default=[512, 256], description="hidden layers above the interaction; one of width 1 follows"
    )
    cross_layers: int = Field(default=3, ge=1, description="dcn_v2: layers that cross the features")
    cross_rank: int | None = Field(default=None, ge=1, description="dcn_v2: rank of their matrices; None: full")


def build_model(
    config: ModelConfig, *, dense: int, features: int, dim: int, seed: int, per_sample: bool = False
) -> Model:
    """The model for `dense` numeric columns and `features` vectors of width `dim`; its weights depend on the seed.

    per_sample: it is given one vector per sample instead, which it must accept.
    """
    if config.name == "dlrm":
        return DLRM(dense, features, dim, bottom=config.bottom, top=config.top, seed=seed, per_sample=per_sample)
    return DCNv2(
        dense,
        dim if per_sample else features * dim,
        dim,
        bottom=config.bottom,
        top=config.top,
        layers=config.cross_layers,
        rank=config.cross_rank,
        seed=seed,
    )
