"""What the layers are made with: torch.nn.EmbeddingBag's arguments and their own."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any, Literal, TypedDict

import torch
from pydantic import ValidationError
from torch import Tensor

from ...parameter_server.store import Store
from ...parameter_server.tables import Optimizer
from .base import EmbeddingError, Feature

Mode = Literal["sum", "mean", "max"]


class Common(TypedDict, total=False):
    """What every layer takes besides its sizes; see `Layer`."""

    max_norm: float | None
    norm_type: float
    scale_grad_by_freq: bool
    mode: Mode
    sparse: bool
    _weight: Tensor | None
    include_last_offset: bool
    padding_idx: int | None
    device: torch.device | str | None
    dtype: torch.dtype | None
    out_of_range: Literal["error", "modulo"]
    seed: int
    name: str
    store: Store | None
    optimizer: Optimizer | None


def refuse(max_norm: float | None, scale_grad_by_freq: bool, sparse: bool) -> None:
    """Raises EmbeddingError: what torch.nn.EmbeddingBag does, and no layer here."""
    if max_norm is not None:
        raise EmbeddingError("max_norm: no row is rescaled as it is read; leave it out, or rescale the vectors")
    if scale_grad_by_freq:
        raise EmbeddingError("scale_grad_by_freq: gradients of an id are added, whatever its frequency; leave it out")
    if sparse:
        raise EmbeddingError(
            "sparse: torch's optimizers get dense gradients here; leave it out, or give a store: it is sent the rows "
            "that were read, and no others"
        )


def check_ids(*given: Tensor | None) -> None:
    """Raises EmbeddingError: ids or offsets that are no whole numbers, or of fewer bits than torch's module takes."""
    for one in given:
        if one is not None and one.dtype not in (torch.int64, torch.int32):
            raise EmbeddingError(f"input and offsets: int64 or int32, not {one.dtype}")


def feature_of(words: Mapping[str, str], **options: Any) -> Feature:
    """Raises EmbeddingError: a value that no option can have, in one line and by the layer's own names."""
    try:
        return Feature(**options)
    except ValidationError as error:
        first = error.errors()[0]
        name = in_own_words(f"embedding.{first['loc'][0]}", "", words)
        raise EmbeddingError(f"{name}: {first['msg']}, found {first['input']!r}") from None


def in_own_words(message: str, name: str, words: Mapping[str, str]) -> str:
    """What is said of a run's `embedding` section and feature `name`, said of a layer's arguments."""
    words = {"cardinality": "num_embeddings", "dim": "embedding_dim", **words}
    message = message.removeprefix(f"feature {name!r}: ")
    message = re.sub(r"keep it full with embedding\.threshold=\d+", "take Full", message)
    return re.sub(r"embedding\.(\w+)", lambda found: words.get(found[1], found[1]), message)
