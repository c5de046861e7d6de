"""`memcom`: shared rows, told apart by one trained number per id (Pansare et al. 2022, MEmCom, arXiv 2203.10135)."""

from __future__ import annotations

from collections.abc import Hashable, Sequence

from torch import Tensor

from ...parameter_server.tables import Initializer, Optimizer, TableSpec
from .base import EmbeddingError, Feature, Lookup, Method, RowMap
from .full import full_row_map


class MEmCom(Method):
    """e(i) = V[i] U[h(i)] (+ B[i]): `hashed` U, m x d; `weight` V and with `bias` B, n x 1 each, added everywhere.

    h is id mod m or a seeded hash. U begins as U(+-n^-1/4), V as n^-1/4 and B as 0: vectors as the full table has them,
    but equal for ids that share a row, the hashing trick, from which training departs. Both factors begin at one scale,
    so that one learning rate suits both: with V = 1 beside a U of the full table's scale, V hardly moves. (Ours; the
    abstract names no initial values.) Ids that share a row differ by a factor, and by a shift with a bias, so V costs
    what it does whatever m is: the ratio stays below d, or d / 2 with a bias.
    Sizes: `rows` m, or `ratio`. A feature with at most `threshold` (200) rows, or with no more numbers than memcom
    would need, stays full.
    """

    options = frozenset({"ratio", "rows", "bias", "hashing", "threshold"})
    threshold = 200

    def __init__(self, feature: Feature, optimizer: Optimizer) -> None:
        n, rows = feature.full_rows, _rows(feature)
        # Vectors begin as those of the full table of n rows, U(+-n^-1/2), and both factors at one scale.
        scale = n**-0.25
        uniform, same = Initializer(kind="uniform", scale=scale), Initializer(kind="constant", scale=scale)
        shapes = [("hashed", rows, feature.dim, uniform), ("weight", n, 1, same)]
        if feature.bias:
            shapes.append(("bias", n, 1, Initializer(kind="constant", scale=0.0)))
        tables = [
            TableSpec(name=f"{feature.name}.{role}", rows=rows, width=width, initializer=initial, optimizer=optimizer)
            for role, rows, width, initial in shapes
        ]
        own = [Lookup(table, full_row_map(feature)) for table in range(1, len(tables))]
        super().__init__(feature, tables, [Lookup(0, _shared_row(feature, rows)), *own])

    def compose(self, rows: Sequence[Tensor]) -> Tensor:
        scaled = rows[1] * rows[0]
        return scaled + rows[2] if len(rows) == 3 else scaled

    def together(self) -> Hashable:
        return "memcom", len(self.lookups)


def _shared_row(feature: Feature, rows: int) -> RowMap:
    hashing = feature.hashing or ("seeded" if feature.cardinality is None else "modulo")
    if hashing == "seeded":
        return feature.hashed(rows, "memcom")
    if feature.cardinality is None:
        raise EmbeddingError(
            f"feature {feature.name!r}: embedding.hashing=modulo needs a cardinality: declare one, or set it to seeded"
        )
    return feature.indexed(rows)


def _rows(feature: Feature) -> int:
    if (feature.rows is None) == (feature.ratio is None):
        raise EmbeddingError(f"feature {feature.name!r}: method memcom needs either embedding.rows or embedding.ratio")
    n = feature.full_rows
    if feature.rows is not None:
        return min(feature.rows, n)
    per_id = n * (2 if feature.bias else 1)
    rows = (feature.budget - per_id) // feature.dim
    if rows < 1:
        raise feature.unreachable(feature.dim + per_id)
    return min(rows, n)
