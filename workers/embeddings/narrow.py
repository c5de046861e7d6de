"""`narrow`: a table of fewer columns and one projection back to `dim`; the control that MLET is compared with.

The projection is that of mixed-dimension embeddings (Ginart et al. 2019, arXiv 1909.11810), with one width for all ids.
"""

from __future__ import annotations

import math

from ...parameter_server.tables import Optimizer
from .base import EmbeddingError, Feature, UnreachableRatio
from .projected import Projected


class Narrow(Projected):
    """e(i) = T[i] P: `narrow` T, n x w, on the store; `projection` P, w x d, with the dense part; w < d.

    w is `inner_dim`, or d / ratio rounded down; w d more numbers than that are those of the projection.
    """

    options = frozenset({"inner_dim", "ratio"})

    def __init__(self, feature: Feature, optimizer: Optimizer) -> None:
        if (feature.inner_dim is None) == (feature.ratio is None):
            raise EmbeddingError(
                f"feature {feature.name!r}: method narrow needs either embedding.inner_dim or embedding.ratio"
            )
        width = feature.inner_dim if feature.ratio is None else math.floor(feature.dim / feature.ratio)
        if not width:
            raise UnreachableRatio(
                f"feature {feature.name!r}: method narrow keeps one float per id at least, so at dim {feature.dim} "
                f"embedding.ratio is at most {feature.dim}, not {feature.ratio:g}",
                reachable=feature.dim,
            )
        if width >= feature.dim:
            raise EmbeddingError(
                f"feature {feature.name!r}: method narrow has rows of fewer floats than dim ({feature.dim}), not "
                f"{width}: set embedding.inner_dim below it or embedding.ratio above 1; method mlet takes wider rows"
            )
        super().__init__(feature, optimizer, "narrow", width)
