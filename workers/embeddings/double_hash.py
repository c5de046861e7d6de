"""`double_hash`: two rows per id, each by a hash of its own, so that few ids share both (Zhang et al. 2020).

arXiv 2007.14523, without its rows for frequent ids, which need counts of a first pass over the data.
"""

from __future__ import annotations

from collections.abc import Hashable, Sequence

from torch import Tensor

from ...parameter_server.tables import Optimizer, TableSpec
from .base import EmbeddingError, Feature, Lookup, Method
from .composition import combine, part_initializer, part_width


class DoubleHash(Method):
    """e(i) = T[h1(i)] + T[h2(i)], or with `partitions` 2 rows of two tables; `operation` mult or concat instead of add.

    Tables `hashed0` (and `hashed1`) of `rows` rows each, or as many as `ratio` leaves; of width d / 2 with concat. A
    feature with at most `threshold` (200) rows, or with no more numbers than double_hash would need, stays full.
    """

    options = frozenset({"ratio", "rows", "operation", "partitions", "threshold"})
    threshold = 200

    def __init__(self, feature: Feature, optimizer: Optimizer) -> None:
        operation, count = feature.operation or "add", feature.partitions or 1
        if count > 2:
            raise EmbeddingError(
                f"feature {feature.name!r}: method double_hash has one or two tables, not embedding.partitions={count}"
            )
        if operation == "generate":
            raise EmbeddingError(f"feature {feature.name!r}: embedding.operation=generate is for method qr")
        width = part_width(feature, operation, 2)
        rows = _rows(feature, width * count)
        tables = [
            TableSpec(
                name=f"{feature.name}.hashed{j}",
                rows=rows,
                width=width,
                initializer=part_initializer(operation, 2, rows),
                optimizer=optimizer,
            )
            for j in range(count)
        ]
        lookups = [Lookup(j % count, feature.hashed(rows, f"double_hash/{j}")) for j in range(2)]
        super().__init__(feature, tables, lookups)
        self.operation = operation

    def compose(self, rows: Sequence[Tensor]) -> Tensor:
        return combine(self.operation, rows)

    def together(self) -> Hashable:
        return "double_hash", self.operation


def _rows(feature: Feature, per_row: int) -> int:
    if (feature.rows is None) == (feature.ratio is None):
        raise EmbeddingError(
            f"feature {feature.name!r}: method double_hash needs either embedding.rows or embedding.ratio"
        )
    if feature.rows is None and feature.budget < per_row:
        raise feature.unreachable(per_row)
    return min(feature.rows or feature.budget // per_row, feature.full_rows)
