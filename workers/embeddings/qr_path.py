"""`qr_path`: a row of one table, passed through functions that the other partitions choose.

Path-based compositional embeddings: Shi et al. 2020, arXiv 1909.02107.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from ...parameter_server.tables import Initializer, Optimizer, TableSpec
from .base import EmbeddingError, Feature, Lookup, Method
from .qr import moduli_of, row_maps

MAX_WIDTH = 4096


class QRPath(Method):
    """e(i) = f_(k-1)( ... f_1(W[q])): the quotient q reads `base`, each remainder r_j chooses its own function f_j.

    A function is a d x d matrix (`matrix0`, ...), or with `inner_dim` h a layer of h rectified units: v becomes
    W2 relu(W1 v + b1) + b2, in `first0`, `shift0`, `second0` and `offset0`. Sizes: `rows`, the functions of each
    remainder, or `moduli`; they mean what they do for `qr`. `base` begins as the full table would, matrices so that
    they keep the variance, shifts at 0 (ours). A feature with at most `threshold` (200) rows, or with no more numbers
    than qr_path would need, stays full.
    """

    options = frozenset({"rows", "moduli", "partitions", "inner_dim", "threshold"})
    threshold = 200

    def __init__(self, feature: Feature, optimizer: Optimizer) -> None:
        moduli = moduli_of(feature, "mult", ("rows", "moduli"))
        function = _function(feature)
        base = Initializer(kind="uniform", scale=math.sqrt(1 / feature.full_rows))
        shapes = [("base", moduli[-1], feature.dim, base)]
        maps = row_maps(feature, moduli)
        lookups = [Lookup(0, maps[-1])]
        for j, modulus in enumerate(moduli[:-1]):
            for role, width, initializer in function:
                lookups.append(Lookup(len(shapes), maps[j]))
                shapes.append((f"{role}{j}", modulus, width, initializer))
        tables = [
            TableSpec(name=f"{feature.name}.{role}", rows=rows, width=width, initializer=initial, optimizer=optimizer)
            for role, rows, width, initial in shapes
        ]
        super().__init__(feature, tables, lookups)
        self.pieces = len(function)

    def compose(self, rows: Sequence[Tensor]) -> Tensor:
        vectors = rows[0]
        for begin in range(1, len(rows), self.pieces):
            vectors = _apply(rows[begin : begin + self.pieces], vectors)
        return vectors


def _function(feature: Feature) -> list[tuple[str, int, Initializer]]:
    """(role, width, initial values) of what one function consists of."""
    d, h = feature.dim, feature.inner_dim
    if d * (h or d) > MAX_WIDTH:
        raise EmbeddingError(
            f"feature {feature.name!r}: method qr_path keeps a matrix of dim x {'embedding.inner_dim' if h else 'dim'} "
            f"in one row of at most {MAX_WIDTH} floats: set embedding.inner_dim to {MAX_WIDTH // d} or less"
        )
    if h is None:
        return [("matrix", d * d, Initializer(kind="uniform", scale=math.sqrt(3 / d)))]
    zero = Initializer(kind="constant", scale=0.0)
    # Rectifying halves the second moment, so the first matrix doubles it.
    first = Initializer(kind="uniform", scale=math.sqrt(6 / d))
    second = Initializer(kind="uniform", scale=math.sqrt(3 / h))
    return [("first", h * d, first), ("shift", h, zero), ("second", d * h, second), ("offset", d, zero)]


def _apply(pieces: Sequence[Tensor], vectors: Tensor) -> Tensor:
    """The function of each id on its vector: [N, d] -> [N, d]."""
    if len(pieces) == 1:
        return _times(pieces[0], vectors)
    first, shift, second, offset = pieces
    return _times(second, torch.relu(_times(first, vectors) + shift)) + offset


def _times(matrices: Tensor, vectors: Tensor) -> Tensor:
    """[N, m * n], rows of the matrices one after another, and [N, n] -> [N, m]."""
    n = vectors.shape[1]
    return torch.bmm(matrices.view(-1, matrices.shape[1] // n, n), vectors.unsqueeze(2)).squeeze(2)
