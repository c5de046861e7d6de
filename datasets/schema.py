"""What a dataset holds, kept in the metadata of every Parquet file that this room writes."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

from pydantic import BaseModel, ConfigDict, Field

from .batch import MISSING_ID, Batch, Ids

__all__ = ["MISSING_ID", "Batch", "CategoricalColumn", "DataConfig", "DataError", "DenseColumn", "Ids", "Schema"]

METADATA_KEY = b"embershard"
SKETCH_KEY = b"embershard.distinct"
FREQUENT_IDS = 10  # of a column that its description lists
DenseTransform = Literal["log1p", "standardise", "none"]


class DataError(ValueError):
    """Data that cannot be used: one line that names the file and column, what was found and what to do."""


class DenseColumn(BaseModel):
    """A numeric column. missing: share of nulls; mean, deviation (of the population): of what is not null. None where
    nobody counted.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")
    name: str
    missing: float | None = None
    mean: float | None = None
    deviation: float | None = Field(default=None, ge=0)


class CategoricalColumn(BaseModel):
    """A column of one id per row, or with `bag` of a list of ids, each with a weight from the list column `weights`.

    Integers are ids as they are, strings by `kernels.hash_strings`. distinct: estimated number of different ids
    (standard error about 1 %), None where nobody counted. frequent: (id, at least how often it comes) of the most
    frequent ids, in this order. cardinality: ids are known to lie in [0, cardinality).
    """

    model_config = ConfigDict(frozen=True, extra="forbid")
    name: str
    distinct: int | None = None
    frequent: Sequence[tuple[int, int]] | None = None
    cardinality: int | None = Field(default=None, gt=0)
    missing: float | None = None
    bag: bool = False
    weights: str | None = None


class Schema(BaseModel):
    """Columns and their roles.

    dense_transform: `log1p` is ln(max(x, 0) + 1) with nulls as 0; `standardise` is (x - mean) / deviation with nulls as
    0, which is the mean (and 0 throughout where the deviation is 0); `none` leaves values as they are, nulls as 0.
    positives: rows with label 1. best_auc: the best AUC that any model can reach, known for generated data only.
    """

    model_config = ConfigDict(extra="forbid")
    format: Literal[1] = 1
    source: str
    label: str
    dense: list[DenseColumn]
    categorical: list[CategoricalColumn]
    dense_transform: DenseTransform = "log1p"
    rows: int = Field(ge=0)
    positives: int | None = None
    best_auc: float | None = None

    @property
    def dense_names(self) -> list[str]:
        return [column.name for column in self.dense]

    @property
    def categorical_names(self) -> list[str]:
        return [column.name for column in self.categorical]

    @property
    def weight_names(self) -> list[str]:
        """The columns that hold weights of bags, each once."""
        return list(dict.fromkeys(column.weights for column in self.categorical if column.weights is not None))

    @property
    def has_bags(self) -> bool:
        return any(column.bag for column in self.categorical)

    @property
    def columns(self) -> list[str]:
        """Label, dense, categorical and weight columns, in this order."""
        return [self.label, *self.dense_names, *self.categorical_names, *self.weight_names]


class DataConfig(BaseModel):
    """The `data` section of a run."""

    model_config = ConfigDict(extra="forbid")
    path: str | None = Field(default=None, description="Parquet file, folder, pattern or fsspec URL to train on")
    eval_path: str | None = Field(default=None, description="the same, to evaluate on")
    batch_size: int = Field(default=512, gt=0, description="rows per step, over all workers together")
    eval_batch_size: int = Field(default=4096, gt=0, description="rows per evaluation step, over all workers together")
    label: str | None = Field(default=None, description="label column; None: as the files' metadata says")
    dense: Sequence[str] | None = Field(
        default=None,
        description="numeric columns, patterns such as i* allowed; None: as the files' metadata says, else none",
    )
    categorical: Sequence[str] | None = Field(
        default=None, description="id columns, integers or strings, patterns allowed; None: as the files' metadata says"
    )
    bags: Sequence[str] | None = Field(
        default=None, description="columns of lists of ids, patterns allowed; None: as the files' metadata says"
    )
    bag_weights: dict[str, str] = Field(
        default_factory=dict, description="column of lists of weights, by bag; a bag without one weighs its ids equally"
    )
    dense_transform: DenseTransform | None = Field(
        default=None,
        description="log1p: ln(max(x, 0) + 1); standardise: zero mean, unit variance; none; None: as the files' "
        "metadata says, else log1p where all are integers",
    )
    shuffle: bool = Field(default=True, description="permute row groups, and rows within a window")
    window_bytes: int = Field(
        default=32 << 20, gt=0, description="decoded bytes that are shuffled together, at most (one row group at least)"
    )
    read_ahead_bytes: int = Field(
        default=128 << 20,
        gt=0,
        description="decoded bytes held in memory, at most (one window at least, and so one row group, however large)",
    )
    missing_id: int = Field(default=MISSING_ID, description="the id that stands for a missing categorical value")
