"""`full`: one row per id. Without a known cardinality, ids are hashed, into twice as many rows as there are ids."""

from __future__ import annotations

from ...parameter_server.tables import Optimizer
from .base import Feature, RowMap, RowMethod


def full_row_map(feature: Feature) -> RowMap:
    """One of `full_rows` per id: the id where the cardinality is known (beyond it as `out_of_range` says), or a hash."""
    rows = feature.full_rows
    if feature.cardinality is None:
        return RowMap("hash", rows, seed=feature.key("full"))
    return RowMap("index", rows, limit=rows, wrap=feature.out_of_range == "modulo")


class Full(RowMethod):
    """`full_rows` x d: see `full_row_map`."""

    def __init__(self, feature: Feature, optimizer: Optimizer) -> None:
        super().__init__(feature, optimizer, "full", feature.full_rows, full_row_map(feature))
