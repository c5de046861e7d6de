"""What every ranking model is made of, and what the trainer asks of one."""

from __future__ import annotations

import itertools
import math
from abc import ABC, abstractmethod
from collections.abc import Sequence
from typing import ClassVar, Literal

import torch
from torch import Tensor, nn


class Model(nn.Module, ABC):
    """A dense network over dense columns and feature vectors. `accepts`: which outputs of a method it can take."""

    accepts: ClassVar[frozenset[Literal["feature", "sample"]]] = frozenset({"feature"})

    @abstractmethod
    def forward(self, dense: Tensor, vectors: Tensor) -> Tensor:
        """dense float32 [B, D], vectors float32 [B, F, d], or [B, m] per sample -> logits [B]. B may be 0.

        A ranker gives scores of all items, [B, items].
        """


def mlp(widths: Sequence[int], generator: torch.Generator, *, linear_last: bool) -> nn.Sequential:
    """Linear layers with ReLU after each (but not after the last with `linear_last`), drawn as DLRM draws them.

    Weights N(0, 2 / (m + n)), biases N(0, 1 / m) for a layer of n inputs and m outputs (facebookresearch/dlrm,
    dlrm_s_pytorch.py, create_mlp). The global random state is left alone.
    """
    layers: list[nn.Module] = []
    for i, (n, m) in enumerate(itertools.pairwise(widths)):
        linear = torch.nn.utils.skip_init(nn.Linear, n, m)  # type: ignore[no-untyped-call]
        with torch.no_grad():
            linear.weight.normal_(0.0, math.sqrt(2 / (m + n)), generator=generator)
            linear.bias.normal_(0.0, math.sqrt(1 / m), generator=generator)
        layers.append(linear)
        if not linear_last or i < len(widths) - 2:
            layers.append(nn.ReLU())
    return nn.Sequential(*layers)
