"""`full`: one row per id. Without a known cardinality, ids are hashed, into twice as many rows as there are ids."""

from __future__ import annotations

from ...parameter_server.tables import Optimizer
from .base import Feature, RowMap, RowMethod


class Full(RowMethod):
    """`full_rows` x d: row = id where the cardinality is known (beyond it an error, or id mod n), otherwise a hash."""

    def __init__(self, feature: Feature, optimizer: Optimizer) -> None:
        rows = feature.full_rows
        if feature.cardinality is None:
            row_map = RowMap("hash", rows, seed=feature.key("full"))
        else:
            row_map = RowMap("index", rows, limit=None if feature.out_of_range == "modulo" else rows)
        super().__init__(feature, optimizer, "full", rows, row_map)
