"""One budget of bytes for a whole model becomes one ratio, and that a size for every feature."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

from .base import EmbeddingError, Feature, Method, UnreachableRatio

# Halvings of the interval that the logarithm of the ratio lies in: to about 1e-11.
HALVINGS = 40


def fit_bytes(
    features: Sequence[Feature],
    sized: Sequence[bool],
    budget: int,
    build: Callable[[Feature], Method],
    numbers: Callable[[Sequence[Method]], int],
) -> list[Feature]:
    """Gives the `sized` features the smallest common ratio at which all methods hold at most `budget` float32 bytes.

    A feature that cannot be so many times smaller is as small as its method goes, and one that its method leaves full
    stays full; the others make up for both. build: feature -> method; numbers: trained numbers of all methods together.

    Raises:
        EmbeddingError: nothing can be sized, or the budget cannot be reached; the message names the least bytes.
    """
    if not any(sized):
        raise EmbeddingError(
            "embedding.bytes: no feature is left to be sized: choose a method that takes a ratio, and no other size"
        )

    def at(ratio: float) -> list[Feature]:
        return [_at_most(f, ratio, build) if own else f for f, own in zip(features, sized, strict=True)]

    def bytes_at(ratio: float) -> int:
        return 4 * numbers([build(feature) for feature in at(ratio)])

    low, high = 0.0, math.log(max(feature.full_rows * feature.dim for feature in features))
    if (least := bytes_at(math.exp(high))) > budget:
        raise EmbeddingError(
            f"embedding.bytes: {budget} is less than these methods can do with, {least}: raise it to that, or keep "
            f"fewer features full with a smaller embedding.threshold"
        )
    for _ in range(HALVINGS):
        middle = (low + high) / 2
        low, high = (low, middle) if bytes_at(math.exp(middle)) <= budget else (middle, high)
    return at(math.exp(high))


def _at_most(feature: Feature, ratio: float, build: Callable[[Feature], Method]) -> Feature:
    asked = feature.model_copy(update={"ratio": ratio})
    try:
        build(asked)
    except UnreachableRatio as error:
        return feature.model_copy(update={"ratio": error.reachable})
    return asked
