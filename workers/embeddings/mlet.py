"""`mlet`: trained as a product of two layers, served as one table (Ghaemmaghami et al. 2020, arXiv 2006.05623)."""

from __future__ import annotations

from ...parameter_server.tables import Optimizer
from .base import EmbeddingError, Feature
from .projected import Projected


class MLET(Projected):
    """e(i) = W1[i] W2: `factor` W1, n x k, on the store; `projection` W2, k x d, with the dense part; k >= d.

    Trains n k + k d numbers and exports n d: see `collapse`. A step moves only the batch's rows of W1, but through W2
    the vectors of every id.
    """

    options = frozenset({"inner_dim"})

    def __init__(self, feature: Feature, optimizer: Optimizer) -> None:
        inner = feature.inner_dim
        if inner is None or inner < feature.dim:
            found = "is missing" if inner is None else f"is {inner}"
            raise EmbeddingError(
                f"feature {feature.name!r}: method mlet trains rows of embedding.inner_dim floats, dim "
                f"({feature.dim}) or more, but it {found}: set embedding.inner_dim={4 * feature.dim}, or choose "
                f"embedding.method=narrow for rows of fewer floats"
            )
        super().__init__(feature, optimizer, "factor", inner)
