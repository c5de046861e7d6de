"""`mem_rec`: vectors of hashed tokens, scaled by hashed weights (Jha et al. 2023, MEM-REC, arXiv 2305.07205)."""

from __future__ import annotations

import math
from collections.abc import Hashable, Sequence

from torch import Tensor

from ...parameter_server.tables import Initializer, Optimizer, TableSpec
from .base import EmbeddingError, Feature, Lookup, Method

TOKEN, WEIGHT = "mem_rec.token", "mem_rec.weight"


class MemRec(Method):
    """Tables `mem_rec.token` M, D x d, and `mem_rec.weight` w, D_w x 1, which all features share.

    Every (feature, id), 64 bits each, reads `hashes` rows of M and `weight_hashes` of w (none: alpha is 1), through a
    seeded hash per feature, table and repetition; duplicates count as often as they occur.

    scope sample, the authors' form: z = alpha S with S the sum of M's rows and alpha that of w's, both over all ids of
    the sample; one vector per sample. Initial values as they released them: U(+-sqrt(1/D)) for both tables.

    scope field: the same over the rows of one id, pooled afterwards like any other vectors. The weights begin as
    1 / weight_hashes, so that alpha is 1: the product of two sums of few small numbers would hardly learn. (Ours.)

    Sizes, given as such, depend on neither cardinalities nor the number of features. The released encoder keeps 16 bits
    of each id and reads memory beside it; none of that is repeated here.
    """

    options = frozenset({"ratio", "token_rows", "weight_rows", "hashes", "weight_hashes", "scope"})

    def __init__(self, feature: Feature, optimizer: Optimizer) -> None:
        rows = feature.token_rows
        if rows is None or feature.ratio is not None:
            raise EmbeddingError(
                f"feature {feature.name!r}: method mem_rec needs embedding.token_rows, the rows of the table that all "
                f"features share, and no ratio beside it (`plan_features` turns a ratio into rows)"
            )
        per_sample = feature.scope == "sample"
        if per_sample and feature.pooling != "sum":
            raise EmbeddingError(
                f"feature {feature.name!r}: method mem_rec with scope=sample adds over all ids of a sample: "
                f"set embedding.pooling=sum"
            )
        repeats = (feature.hashes or 1, _weight_hashes(feature))
        drawn = Initializer(kind="uniform", scale=math.sqrt(1 / rows))
        tables = [TableSpec(name=TOKEN, rows=rows, width=feature.dim, initializer=drawn, optimizer=optimizer)]
        if repeats[1]:
            weight = drawn if per_sample else Initializer(kind="constant", scale=1 / repeats[1])
            size = feature.weight_rows or rows
            tables.append(TableSpec(name=WEIGHT, rows=size, width=1, initializer=weight, optimizer=optimizer))
        lookups = [
            Lookup(number, feature.hashed(table.rows, f"{table.name}/{repeat}"))
            for number, table in enumerate(tables)
            for repeat in range(repeats[number])
        ]
        super().__init__(feature, tables, lookups)
        self.output = "sample" if per_sample else "feature"
        self._repeats = repeats

    def compose(self, rows: Sequence[Tensor]) -> Tensor:
        """`hashes` lookups [N, d], then `weight_hashes` [N, 1]."""
        token, weight = rows[: self._repeats[0]], rows[self._repeats[0] :]
        return _total(token) * _total(weight) if weight else _total(token)

    def compose_sample(self, sums: Sequence[Tensor]) -> Tensor:
        return sums[0] * sums[1] if len(sums) > 1 else sums[0]

    def together(self) -> Hashable:
        return "mem_rec", self._repeats


def size_shared_tables(features: Sequence[Feature], budget: int | None = None) -> list[Feature]:
    """Gives every feature of method mem_rec without token_rows the most rows that fit.

    budget: numbers of both tables together; None: those of the same features with method `full`, divided by `ratio`.

    Raises:
        EmbeddingError: neither rows nor a ratio, two ratios, or fewer numbers than one row of each table needs.
    """
    unsized = [f for f in features if f.method == "mem_rec" and f.token_rows is None]
    if not unsized:
        return list(features)
    first = unsized[0]
    if budget is None:
        other = next((f for f in unsized if f.ratio != first.ratio), None)
        if other is not None or first.ratio is None:
            raise EmbeddingError(
                f"feature {(other or first).name!r}: method mem_rec shares its tables among all features, so they need "
                f"one embedding.token_rows or one embedding.ratio"
            )
        budget = int(sum(f.full_rows * f.dim for f in unsized) / first.ratio * (1 + 1e-12))
    per_row, fixed = first.dim, 0
    if _weight_hashes(first):
        per_row, fixed = (first.dim + 1, 0) if first.weight_rows is None else (first.dim, first.weight_rows)
    rows = (budget - fixed) // per_row
    if rows < 1:
        raise EmbeddingError(
            f"feature {first.name!r}: method mem_rec cannot do with {budget} numbers: at dim {first.dim} and "
            f"these options it needs {per_row + fixed} or more; lower embedding.ratio or embedding.weight_rows"
        )
    sized = {"token_rows": rows, "ratio": None}
    return [f.model_copy(update=sized) if f in unsized else f for f in features]


def _weight_hashes(feature: Feature) -> int:
    return 1 if feature.weight_hashes is None else feature.weight_hashes


def _total(rows: Sequence[Tensor]) -> Tensor:
    total = rows[0]
    for more in rows[1:]:
        total = total + more
    return total
