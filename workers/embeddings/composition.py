"""Several vectors of an id become one: by product, by sum, or one after another (Shi et al. 2020, arXiv 1909.02107)."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from ...parameter_server.tables import Initializer
from .base import EmbeddingError, Feature


def combine(operation: str, parts: Sequence[Tensor]) -> Tensor:
    """[N, width] each -> [N, d]; from left to right, so that the rounding is fixed."""
    if operation == "concat":
        return torch.cat(list(parts), 1)
    whole = parts[0]
    for part in parts[1:]:
        whole = whole * part if operation == "mult" else whole + part
    return whole


def part_width(feature: Feature, operation: str, parts: int) -> int:
    """Floats per vector of each part. Raises EmbeddingError: dim cannot be divided by the parts of a concatenation."""
    if operation != "concat":
        return feature.dim
    if feature.dim % parts:
        near = feature.dim + parts - feature.dim % parts
        raise EmbeddingError(
            f"feature {feature.name!r}: operation concat divides dim {feature.dim} into {parts} parts, which does "
            f"not come out even: set embedding.dim to a multiple such as {near}, or another embedding.operation"
        )
    return feature.dim // parts


def part_initializer(operation: str, parts: int, rows: int) -> Initializer:
    """U(+-a) such that what is composed has the variance 1 / (3 rows) of DLRM's full table of as many rows.

    facebookresearch/dlrm draws the parts of a product from U(sqrt(1/n), 1) instead: it sets the lower bound alone.
    Vectors then begin with a mean of 1/4 in every coordinate, which nothing in the paper asks for.
    """
    if operation == "mult":
        scale = math.sqrt(3) * (3 * rows) ** (-1 / (2 * parts))
    elif operation == "add":
        scale = math.sqrt(1 / (parts * rows))
    else:
        scale = math.sqrt(1 / rows)
    return Initializer(kind="uniform", scale=scale)
