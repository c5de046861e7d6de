"""What a method is: tables, ids to rows, rows to vectors. A new method is one file beside this one."""

from __future__ import annotations

import hashlib
import math
from abc import ABC, abstractmethod
from collections.abc import Hashable, Sequence
from dataclasses import dataclass
from typing import ClassVar, Literal

from pydantic import BaseModel, ConfigDict, Field
from torch import Tensor, nn

from ...parameter_server.tables import Initializer, Optimizer, TableSpec
from . import kernels

DEFAULT_MAX_ROWS = 1_000_000


class EmbeddingError(ValueError):
    """Embeddings that cannot be as asked: the message names the feature, what was found and what would work."""


class PartialOptions(BaseModel):
    """All that can be said of one feature's embedding. None: not said here."""

    model_config = ConfigDict(extra="forbid")
    method: str | None = Field(default=None, description="how vectors are composed")
    dim: int | None = Field(default=None, gt=0, le=4096)
    ratio: float | None = Field(default=None, ge=1, description="times smaller than `full` would be here")
    rows: int | None = Field(default=None, gt=0, description="rows of the hashed or remainder table, not a ratio")
    moduli: tuple[int, ...] | None = Field(
        default=None, description="qr, qr_path: rows of every sub-table, not a ratio"
    )
    operation: Literal["mult", "add", "concat", "generate"] | None = Field(
        default=None,
        description="qr, double_hash: how the vectors of an id become one; None: mult, add; generate (qr): the model "
        "takes each as a feature",
    )
    partitions: int | None = Field(
        default=None, ge=1, le=16, description="qr, qr_path, double_hash: sub-tables; None: 2, 2, 1"
    )
    scheme: Literal["quotient_remainder", "chinese_remainder"] | None = Field(
        default=None, description="qr: which rows belong to an id; None: quotient_remainder"
    )
    threshold: int | None = Field(default=None, ge=0, description="a table of at most so many rows stays full")
    bias: bool | None = Field(default=None, description="memcom: one added number per id beside its weight")
    hashing: Literal["modulo", "seeded"] | None = Field(
        default=None, description="memcom: how ids share rows; None: modulo, or seeded without a cardinality"
    )
    inner_dim: int | None = Field(
        default=None, gt=0, le=4096, description="mlet, narrow: width of the table; qr_path: hidden units"
    )
    token_rows: int | None = Field(default=None, gt=0, description="mem_rec: rows of the token table")
    weight_rows: int | None = Field(
        default=None, gt=0, description="mem_rec: rows of the weight table; None: as the token table"
    )
    hashes: int | None = Field(default=None, gt=0, le=16, description="mem_rec: token rows per id; None: 1")
    weight_hashes: int | None = Field(
        default=None, ge=0, le=16, description="mem_rec: weight rows per id; 0: no weights; None: 1"
    )
    scope: Literal["sample", "field"] | None = Field(
        default=None, description="mem_rec: one vector per sample or one per feature; None: field"
    )
    max_rows: int | None = Field(default=None, gt=0)
    out_of_range: Literal["error", "modulo"] | None = None
    pooling: Literal["sum", "mean"] | None = None


class UnreachableRatio(EmbeddingError):
    """A ratio that a method cannot reach for a feature. reachable: the largest one that it can."""

    def __init__(self, message: str, reachable: float) -> None:
        super().__init__(message)
        self.reachable = reachable

    def __reduce__(self) -> tuple[type[UnreachableRatio], tuple[str, float]]:
        # Errors travel between processes; by default only the message would.
        return type(self), (str(self), self.reachable)


class FeatureOptions(PartialOptions):
    """How a feature's vectors are composed. What is None here is left to the method."""

    method: str = Field(
        default="full", description="full | hash | qr | qr_path | memcom | double_hash | mlet | narrow | mem_rec"
    )
    dim: int = Field(default=16, gt=0, le=4096, description="floats per vector")
    max_rows: int = Field(default=DEFAULT_MAX_ROWS, gt=0, description="most rows of `full` without a cardinality")
    out_of_range: Literal["error", "modulo"] = Field(default="error", description="ids beyond the declared cardinality")
    pooling: Literal["sum", "mean"] = Field(default="sum", description="how a bag's vectors become one")


# Sizes and shapes belong to a method; each method declares which it takes.
SIZE_OPTIONS = tuple(name for name, field in FeatureOptions.model_fields.items() if field.default is None)


@dataclass(frozen=True)
class RowMap:
    """ids to rows, declared rather than coded, so that one kernel maps all features of a batch at once.

    index: (id div divisor) mod modulus, with floor division.
    hash: a 64-bit mix of (id, seed), scaled to [0, modulus) by the upper half of the product (bias below 2^-23 for any
    modulus up to 2^41; Lemire 2019).
    With a `limit`, an id outside [0, limit) is an error, or with `wrap` taken modulo the limit first. Identity is index
    with modulus = limit = cardinality.
    """

    kind: Literal["index", "hash"]
    modulus: int
    divisor: int = 1
    limit: int | None = None
    seed: int = 0
    wrap: bool = False

    @property
    def bound(self) -> int:
        """The limit as the kernel takes it: 0 none, below 0 to wrap at."""
        return (-1 if self.wrap else 1) * (self.limit or 0)

    @property
    def code(self) -> int:
        return kernels.HASH if self.kind == "hash" else kernels.INDEX


class Feature(FeatureOptions):
    """One categorical input. cardinality: ids lie in [0, cardinality); distinct: an estimate of how many occur.

    column: where its ids stand, if not under its name. part: of method qr with operation generate, the partition whose
    rows are its vectors (`planning.generated` makes such features).
    """

    model_config = ConfigDict(extra="forbid", frozen=True)
    name: str = Field(min_length=1)
    cardinality: int | None = Field(default=None, gt=0)
    distinct: int | None = Field(default=None, ge=0)
    seed: int = 0
    column: str | None = None
    part: int | None = None

    @property
    def full_rows(self) -> int:
        """Rows that `full` uses: the cardinality, or min(2 x distinct, max_rows) hashed ones."""
        if self.cardinality is not None:
            return self.cardinality
        return self.max_rows if self.distinct is None else max(1, min(2 * self.distinct, self.max_rows))

    def key(self, purpose: str = "") -> int:
        """64 bits that depend on (seed, name, purpose) alone: what seeds this feature's hash functions."""
        text = f"{self.seed}/{self.name}/{purpose}".encode()
        return int.from_bytes(hashlib.blake2b(text, digest_size=8).digest(), "little")

    @property
    def budget(self) -> int:
        """The most numbers that `ratio` leaves for this feature."""
        # A ratio that was itself divided out of a count must give that count again.
        return math.floor(self.full_rows * self.dim / (self.ratio or 1.0) * (1 + 1e-12))

    def unreachable(self, smallest: int) -> UnreachableRatio:
        """The error where `ratio` asks for fewer numbers than the smallest with which the method works."""
        reachable = self.full_rows * self.dim / smallest
        return UnreachableRatio(
            f"feature {self.name!r}: method {self.method} cannot be {self.ratio:g} times smaller than {self.full_rows} "
            f"rows of dim {self.dim}: set embedding.ratio to {math.floor(reachable * 1000) / 1000:g} or less, raise "
            f"embedding.dim, or keep it full with embedding.threshold={self.full_rows}",
            reachable,
        )

    def indexed(self, modulus: int, divisor: int = 1) -> RowMap:
        """(id div divisor) mod modulus; ids beyond the cardinality as `out_of_range` says."""
        return RowMap("index", modulus, divisor, self.cardinality, wrap=self.out_of_range == "modulo")

    def hashed(self, modulus: int, purpose: str) -> RowMap:
        """A hash of its own for each purpose; ids beyond a known cardinality as `out_of_range` says."""
        wrap = self.cardinality is not None and self.out_of_range == "modulo"
        return RowMap("hash", modulus, limit=self.cardinality, seed=self.key(purpose), wrap=wrap)


@dataclass(frozen=True)
class Lookup:
    """One read per id: `table` is an index into the method's tables."""

    table: int
    map: RowMap


class Method(nn.Module, ABC):
    """How one feature's ids become vectors. Dense parameters are ordinary nn.Parameters of the subclass.

    A subclass hands its tables and lookups to `__init__` and composes. `options` are the size options it takes;
    `threshold`: features of at most so many rows stay full unless told otherwise; `output`: one vector per feature
    [B, F, d], or one per sample [B, m].
    """

    options: ClassVar[frozenset[str]] = frozenset()
    threshold: ClassVar[int] = 0
    output: Literal["feature", "sample"] = "feature"
    # True where the vector *is* the row of the only lookup: such features share one gather.
    is_row: ClassVar[bool] = False

    def __init__(self, feature: Feature, tables: Sequence[TableSpec], lookups: Sequence[Lookup]) -> None:
        super().__init__()
        self.feature = feature
        self.tables = tuple(tables)
        self.lookups = tuple(lookups)

    @abstractmethod
    def compose(self, rows: Sequence[Tensor]) -> Tensor:
        """Vectors [N, d] of N ids from what each lookup read, [N, width of its table] each; before any pooling."""

    def compose_sample(self, sums: Sequence[Tensor]) -> Tensor:
        """Where `output` is "sample": vectors [B, m] from each table's rows, added over all lookups of a sample."""
        raise NotImplementedError(f"method {self.feature.method} has one vector per feature")

    def together(self) -> Hashable:
        """Methods of one class and equal values (not None) compose in one call of `compose_all`, for many features."""
        return None

    @classmethod
    def compose_all(cls, methods: Sequence[Method], rows: Sequence[Tensor], segments: Sequence[int]) -> Tensor:
        """`compose` for several features at once: the ids of methods[f] are segments[f] to segments[f + 1].

        As it stands, for methods whose `compose` depends on nothing but their `together`.
        """
        return methods[0].compose(rows)

    @property
    def parameter_count(self) -> int:
        """Trained numbers: all rows of the tables, and the dense parameters."""
        return sum(t.rows * t.width for t in self.tables) + sum(p.numel() for p in self.parameters())


class RowMethod(Method):
    """A method whose vector is a row of its only table, `rows` x d."""

    is_row = True

    def __init__(self, feature: Feature, optimizer: Optimizer, role: str, rows: int, row_map: RowMap) -> None:
        # DLRM's initial values: U(+-sqrt(1/n)) for a table of n rows.
        initial = Initializer(kind="uniform", scale=math.sqrt(1 / rows))
        name = f"{feature.name}.{role}"
        table = TableSpec(name=name, rows=rows, width=feature.dim, initializer=initial, optimizer=optimizer)
        super().__init__(feature, [table], [Lookup(0, row_map)])

    def compose(self, rows: Sequence[Tensor]) -> Tensor:
        return rows[0]
