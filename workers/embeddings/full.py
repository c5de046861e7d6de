"""`full`: one row per id. Without a known cardinality, ids are hashed, into twice as many rows as there are ids."""

from __future__ import annotations

from ...parameter_server.tables import Optimizer
from .base import Feature, RowMap, RowMethod


def full_row_map(feature: Feature) -> RowMap:
    """One of `full_rows` rows per id: the id itself where the cardinality is known, otherwise a hash of it."""
    if feature.cardinality is None:
        return feature.hashed(feature.full_rows, "full")
    return feature.indexed(feature.full_rows)


class Full(RowMethod):
    """`full_rows` x d; ids to rows as `full_row_map` has them."""

    def __init__(self, feature: Feature, optimizer: Optimizer) -> None:
        super().__init__(feature, optimizer, "full", feature.full_rows, full_row_map(feature))
