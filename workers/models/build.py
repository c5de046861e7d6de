"""The `model` section of a run, and the model that it describes."""

from __future__ import annotations

from typing import Literal

from pydantic import BaseModel, ConfigDict, Field

from .base import Model
from .dcn_v2 import DCNv2
from .dlrm import DLRM
from .ranking import Ranker


class ModelConfig(BaseModel):
    """The `model` section of a run. Widths are those of the layers; what depends on the data is added by the model."""

    model_config = ConfigDict(extra="forbid")
    name: Literal["dlrm", "dcn_v2", "pointwise", "ranknet"] = Field(
        default="dlrm", description="dlrm, dcn_v2: will it be clicked; pointwise, ranknet: which items will be liked"
    )
    bottom: list[int] = Field(
        default=[512, 256, 64],
        description="dlrm, dcn_v2: hidden layers for the dense columns; one of width embedding.dim follows",
    )
    top: list[int] = Field(
        default=[512, 256], description="hidden layers above the vectors; one of width 1, or of all items, follows"
    )
    cross_layers: int = Field(default=3, ge=1, description="dcn_v2: layers that cross the features")
    cross_rank: int | None = Field(default=None, ge=1, description="dcn_v2: rank of their matrices; None: full")
    history: str = Field(
        default="history", description="pointwise, ranknet: the bag of items already known, which are not ranked"
    )
    target: str = Field(
        default="liked", description="pointwise, ranknet: the bag of items to be found; it is not embedded"
    )
    items: int | None = Field(
        default=None, gt=0, description="pointwise, ranknet: items to rank, from 0; None: the target's cardinality"
    )

    @property
    def ranks(self) -> bool:
        """Whether it scores all items for a person, rather than one row."""
        return self.name in ("pointwise", "ranknet")


def build_model(
    config: ModelConfig, *, dense: int, features: int, dim: int, seed: int, per_sample: bool = False
) -> Model:
    """The model for `dense` numeric columns and `features` vectors of width `dim`; its weights depend on the seed.

    per_sample: it is given one vector per sample instead, which it must accept. A ranker needs `config.items`.
    """
    if config.name == "dlrm":
        return DLRM(dense, features, dim, bottom=config.bottom, top=config.top, seed=seed, per_sample=per_sample)
    vectors = dim if per_sample else features * dim
    if config.ranks:
        assert config.items is not None
        return Ranker(dense, vectors, config.items, hidden=config.top, seed=seed)
    return DCNv2(
        dense,
        vectors,
        dim,
        bottom=config.bottom,
        top=config.top,
        layers=config.cross_layers,
        rank=config.cross_rank,
        seed=seed,
    )
