"""A layer whose tables live on a store: bags as torch gives them, to a collection of one feature."""

from __future__ import annotations

import numpy as np
from torch import Tensor, nn

from ...datasets.schema import Ids
from ...parameter_server.store import Store
from ...parameter_server.tables import Optimizer
from .base import EmbeddingError, Feature
from .collection import EmbeddingBagCollection
from .planning import METHODS


class StoredTables(nn.Module):
    """Takes what a layer's `forward` takes. No table is too small for its method, as in a layer alone.

    Raises:
        EmbeddingError: what a store cannot do.
    """

    def __init__(self, feature: Feature, mode: str, store: Store, optimizer: Optimizer | None) -> None:
        super().__init__()
        if mode == "max":
            raise EmbeddingError("mode: a store pools by sum or mean, not by max; leave store out for that")
        options = {"pooling": mode}
        if "threshold" in METHODS[feature.method].options:
            options["threshold"] = 0  # type: ignore[assignment]
        self.collection = EmbeddingBagCollection([feature.model_copy(update=options)], store=store, optimizer=optimizer)

    def forward(
        self, input: Tensor, offsets: Tensor | None, weights: Tensor | None, *, last: bool, padding: int | None
    ) -> Tensor:
        """Vectors [B, d]. last: `offsets` hold the end of the last bag; padding: the id that bags leave out."""
        if weights is not None and weights.requires_grad:
            raise EmbeddingError("per_sample_weights: have no gradient where the tables live on a store; detach them")
        values = input.reshape(-1).long().numpy()
        ends = _ends(input, offsets, last)
        kept = values != padding if padding is not None else np.ones(len(values), np.bool_)
        ends = np.concatenate([[0], np.cumsum(kept)])[ends]
        own = None if weights is None else np.ascontiguousarray(weights.reshape(-1).float().numpy()[kept])
        ids = Ids(self.collection.names, np.ascontiguousarray(values[kept]), ends, own)
        vectors = self.collection(ids)
        assert isinstance(vectors, Tensor)
        return vectors[:, 0]


def _ends(input: Tensor, offsets: Tensor | None, last: bool) -> np.ndarray:
    """int64 [B + 1] from 0: where bags begin and the last one ends."""
    if (offsets is None) != (input.dim() == 2):
        raise ValueError(f"input of {input.dim()} dimensions {'with' if offsets is not None else 'without'} offsets")
    if offsets is None:
        return np.arange(len(input) + 1) * input.shape[1]
    begins = offsets.long().numpy()
    ends = begins if last else np.append(begins, input.numel())
    if not len(ends) or ends[0] != 0 or ends[-1] != input.numel() or np.any(np.diff(ends) < 0):
        raise ValueError(f"offsets: must rise from 0 to {input.numel()}, the number of ids")
    return ends
