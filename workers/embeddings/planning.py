"""From settings and a dataset's columns to features and their methods, and the table that shows what came out."""

from __future__ import annotations

import difflib
from collections.abc import Iterable, Sequence
from typing import Any, Literal, Protocol

from pydantic import BaseModel, Field

from ...datasets.schema import Schema
from ...parameter_server.tables import Optimizer
from .base import SIZE_OPTIONS, EmbeddingError, Feature, FeatureOptions, Method, PartialOptions
from .double_hash import DoubleHash
from .full import Full
from .hash import Hash
from .mem_rec import MemRec, size_shared_tables
from .memcom import MEmCom
from .mlet import MLET
from .narrow import Narrow
from .qr import QR
from .qr_path import QRPath
from .sizing import fit_bytes


class MethodType(Protocol):
    """The class of a method, as the table below holds it."""

    options: frozenset[str]
    threshold: int

    def __call__(self, feature: Feature, optimizer: Optimizer) -> Method: ...


METHODS: dict[str, MethodType] = {
    "full": Full,
    "hash": Hash,
    "qr": QR,
    "qr_path": QRPath,
    "memcom": MEmCom,
    "double_hash": DoubleHash,
    "mlet": MLET,
    "narrow": Narrow,
    "mem_rec": MemRec,
}


class FeatureOverride(PartialOptions):
    """`embedding.features.NAME`: what differs for one feature. cardinality: ids lie in [0, cardinality)."""

    cardinality: int | None = Field(default=None, gt=0)


class EmbeddingConfig(FeatureOptions):
    """The `embedding` section of a run."""

    placement: Literal["sharded", "replicated", "auto"] = Field(
        default="sharded", description="where the tables live: on the shards, in every worker, or as their bytes say"
    )
    bytes: int | None = Field(
        default=None, gt=0, description="float32 bytes of all embeddings together, instead of a ratio"
    )
    features: dict[str, FeatureOverride] = Field(default_factory=dict, description="what differs, by feature")


def plan_features(schema: Schema, config: EmbeddingConfig, seed: int = 0) -> list[Feature]:
    """One Feature per categorical column, in the columns' order; several where `generated` makes them.

    With `bytes`, every feature gets the ratio that `fit_bytes` finds, but for those with sizes of their own.

    Raises:
        EmbeddingError: `embedding.features` names a column that does not exist, a method does not take its options, or
            the bytes cannot be reached.
    """
    names = schema.categorical_names
    for name in config.features:
        if name not in names:
            near = difflib.get_close_matches(name, names, 1)
            hint = f"did you mean {near[0]!r}?" if near else f"the columns are {', '.join(names)}"
            raise EmbeddingError(f"embedding.features.{name}: the dataset has no such categorical column; {hint}")
    general = {option: getattr(config, option) for option in FeatureOptions.model_fields}
    features = []
    for column in schema.categorical:
        override = config.features.get(column.name, FeatureOverride())
        own = override.model_dump(exclude_none=True)
        # Sizes belong to a method: one that is overridden does not inherit those of another.
        kept = general if "method" not in own else {k: v for k, v in general.items() if k not in SIZE_OPTIONS}
        stated: dict[str, Any] = {"cardinality": column.cardinality, "distinct": column.distinct, **kept, **own}
        feature = Feature(name=column.name, seed=seed, **stated)
        check_options(feature)
        features.append(feature)
    return generated(_sized(features, config.bytes))


def _sized(features: list[Feature], budget: int | None) -> list[Feature]:
    if budget is None:
        return size_shared_tables(features)
    if all(feature.method == "mem_rec" for feature in features):
        return size_shared_tables(features, budget // 4)
    if shared := next((f for f in features if f.method == "mem_rec" and f.token_rows is None), None):
        raise EmbeddingError(
            f"embedding.bytes: feature {shared.name!r} shares mem_rec's table with others, and beside other methods "
            f"nothing says how large that is to be: give its token_rows, or choose mem_rec for every feature"
        )
    sized = ["ratio" in METHODS[f.method].options and not _has_size(f) for f in features]
    return fit_bytes(
        features, sized, budget, lambda f: build_method(f, Optimizer()), lambda m: EmbeddingSize.of(m).parameters
    )


def generated(features: Sequence[Feature]) -> list[Feature]:
    """Each feature of method qr with operation generate as one feature NAME.J per partition J; the others as they are.

    A feature that stays full stays one.
    """
    found = []
    for feature in features:
        parts = [] if feature.operation != "generate" else build_method(feature, Optimizer()).tables
        if len(parts) < 2:
            found.append(feature)
            continue
        for part in range(len(parts)):
            own = {"name": f"{feature.name}.{part}", "column": feature.name, "part": part}
            found.append(feature.model_copy(update=own))
    return found


def build_method(feature: Feature, optimizer: Optimizer) -> Method:
    """The feature's method, or `full` for a table at or below the threshold, or that its method would not make smaller.

    Raises:
        EmbeddingError: an unknown method, or options that it cannot work with.
    """
    check_options(feature)
    chosen = METHODS[feature.method]
    threshold = chosen.threshold if feature.threshold is None else feature.threshold
    if feature.full_rows <= threshold:
        return Full(feature, optimizer)
    method = chosen(feature, optimizer)
    useless = "threshold" in chosen.options and method.parameter_count >= feature.full_rows * feature.dim
    return Full(feature, optimizer) if useless else method


def check_options(feature: Feature) -> None:
    """Raises EmbeddingError: an unknown method, or an option that it does not take."""
    if feature.method not in METHODS:
        raise EmbeddingError(f"embedding.method: unknown method {feature.method!r}; one of {', '.join(METHODS)}")
    taken = METHODS[feature.method].options
    for option in SIZE_OPTIONS:
        if getattr(feature, option) is not None and option not in taken:
            others = [name for name, method in METHODS.items() if option in method.options]
            raise EmbeddingError(
                f"feature {feature.name!r}: method {feature.method} takes no {option}; "
                f"leave embedding.{option} out, or choose embedding.method={' or '.join(others)}"
            )


def _has_size(feature: Feature) -> bool:
    return any(
        getattr(feature, option) is not None for option in ("ratio", "rows", "moduli", "inner_dim", "token_rows")
    )


class EmbeddingSize(BaseModel):
    """What the tables amount to. `full_parameters`: the same features with method `full`; bytes are float32."""

    parameters: int
    full_parameters: int

    @property
    def bytes(self) -> int:
        return 4 * self.parameters

    @property
    def full_bytes(self) -> int:
        return 4 * self.full_parameters

    @property
    def ratio(self) -> float:
        return self.full_parameters / self.parameters

    @classmethod
    def of(cls, methods: Iterable[Method]) -> EmbeddingSize:
        methods = list(methods)
        full = sum(m.feature.full_rows * m.feature.dim for m in methods if not m.feature.part)
        # A table that several features read counts once.
        tables = {table.name: table.rows * table.width for m in methods for table in m.tables}
        dense = sum(p.numel() for m in methods for p in m.parameters())
        return cls(parameters=sum(tables.values()) + dense, full_parameters=full)


def feature_table(methods: Sequence[Method]) -> list[dict[str, Any]]:
    """One record per feature and one for all, to print: what the ratio is taken against stands beside it.

    ids: the declared cardinality, or "~" and the estimated number of distinct ids, or "?".
    """
    records = []
    for method in methods:
        feature, size = method.feature, EmbeddingSize.of([method])
        estimate = "?" if feature.distinct is None else f"~{feature.distinct}"
        records.append(
            {
                "feature": feature.name,
                "ids": estimate if feature.cardinality is None else str(feature.cardinality),
                "method": "full" if isinstance(method, Full) else feature.method,
                "rows": sum(table.rows for table in method.tables),
                "width": feature.dim,
                "parameters": size.parameters,
                "full_rows": 0 if feature.part else feature.full_rows,
                # What `full` would be stands beside the first of a column's partitions only.
                "ratio": round(size.ratio, 3) if feature.part is None else None,
            }
        )
    total = EmbeddingSize.of(methods)
    tables = {table.name: table.rows for method in methods for table in method.tables}
    records.append(
        {
            "feature": "all",
            "ids": "",
            "method": "",
            "rows": sum(tables.values()),
            "width": "",
            "parameters": total.parameters,
            "full_rows": sum(method.feature.full_rows for method in methods if not method.feature.part),
            "ratio": round(total.ratio, 3),
        }
    )
    return records
