"""`hash`: the hashing trick (Weinberger et al. 2009): ids share the rows of a smaller table."""

from __future__ import annotations

import math

from ...parameter_server.tables import Optimizer
from .base import EmbeddingError, Feature, RowMethod


class Hash(RowMethod):
    """`rows` x d, or ceil(rows of `full` / ratio) x d; row = seeded 64-bit hash. Never more rows than `full`.

    A feature with at most `threshold` (0) rows stays full.
    """

    options = frozenset({"ratio", "rows", "threshold"})

    def __init__(self, feature: Feature, optimizer: Optimizer) -> None:
        if (feature.rows is None) == (feature.ratio is None):
            raise EmbeddingError(
                f"feature {feature.name!r}: method hash needs either embedding.rows or embedding.ratio"
            )
        rows = feature.rows if feature.rows is not None else math.ceil(feature.full_rows / (feature.ratio or 1.0))
        rows = min(rows, feature.full_rows)
        super().__init__(feature, optimizer, "hashed", rows, feature.hashed(rows, "hash"))
