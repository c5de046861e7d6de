"""MEM-REC alone: one feature in place of torch.nn.EmbeddingBag, or one vector for all features of a sample."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Unpack

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ...parameter_server.tables import Optimizer
from . import kernels
from .base import EmbeddingError
from .gather import sample_sums
from .layers import Layer, initial_rows
from .layers_arguments import Common, check_ids, feature_of
from .mem_rec import MemRec as Method
from .torch_rows import map_rows


class MemRec(Layer):
    """One vector per feature (scope field): parameters `token` and, unless weight_hashes is 0, `weight`.

    See `workers.embeddings.mem_rec.MemRec`. The tables of a layer are its own, not shared with other layers.
    """

    def __init__(
        self,
        num_embeddings: int,
        embedding_dim: int,
        *bag: Any,
        token_rows: int,
        weight_rows: int | None = None,
        hashes: int = 1,
        weight_hashes: int = 1,
        **common: Unpack[Common],
    ) -> None:
        rows = {"token_rows": token_rows, "weight_rows": weight_rows}
        repeats = {"hashes": hashes, "weight_hashes": weight_hashes}
        super().__init__(
            "mem_rec", num_embeddings, embedding_dim, {**rows, **repeats, "scope": "field"}, *bag, **common
        )


class MemRecSample(nn.Module):
    """One vector per sample (scope sample, the authors' form): parameters `token`, D x d, and `weight`, D_w x 1.

    features: names in the order of the ids; a name and an id say which rows are read. Without gradients a lookup on
    the CPU is one pass over the ids, in one thread.

    Raises:
        EmbeddingError: no features, one that stands twice, or sizes that cannot be.
    """

    def __init__(
        self,
        features: Sequence[str],
        embedding_dim: int,
        *,
        token_rows: int,
        weight_rows: int | None = None,
        hashes: int = 1,
        weight_hashes: int = 1,
        seed: int = 0,
        device: torch.device | str | None = None,
    ) -> None:
        super().__init__()
        if not features or len(set(features)) < len(features):
            raise EmbeddingError(f"features: at least one, each name once; found {', '.join(features) or 'none'}")
        rows = {"token_rows": token_rows, "weight_rows": weight_rows}
        repeats = {"hashes": hashes, "weight_hashes": weight_hashes}
        shape = {"method": "mem_rec", "dim": embedding_dim, "scope": "sample", "seed": seed}
        self.methods = [Method(feature_of({}, name=name, **shape, **rows, **repeats), Optimizer()) for name in features]
        for table in self.methods[0].tables:
            values = torch.from_numpy(initial_rows(table, seed)).to(device)
            self.register_parameter(table.name.rpartition(".")[2], nn.Parameter(values))
        self._maps = [
            [own.map for method in self.methods for own in method.lookups if own.table == number]
            for number in range(len(self.methods[0].tables))
        ]
        self._seeds = [np.array([own.seed for own in maps], np.uint64) for maps in self._maps]

    def forward(self, input: Tensor) -> Tensor:
        """ids int64 or int32 [B, F] -> vectors [B, d].

        Raises:
            EmbeddingError: ids of another shape or dtype.
        """
        check_ids(input)
        if input.dim() != 2 or input.shape[1] != len(self.methods):
            raise EmbeddingError(f"input: one id per feature, [B, {len(self.methods)}], not {list(input.shape)}")
        input = input.long()
        tables = list(self.parameters())
        table = tables[0]
        if table.device.type != "cpu" or table.dtype != torch.float32 or torch.compiler.is_compiling():
            return self.methods[0].compose_sample(
                [F.embedding_bag(self._rows(number, input), table, mode="sum") for number, table in enumerate(tables)]
            )
        if torch.is_grad_enabled():
            batch = len(input)
            sums = []
            for number, table in enumerate(tables):
                read = self._rows(number, input).t().reshape(-1).int().numpy()
                sums.append(sample_sums(table, read, np.arange(len(read) + 1), len(read) // max(1, batch) or 1))
            return self.methods[0].compose_sample(sums)
        out = tables[0].new_empty(len(input), tables[0].shape[1])
        weight, seeds = (tables[1], self._seeds[1]) if len(tables) > 1 else (tables[0][:0, :1], self._seeds[0][:0])
        kernels.look_up_samples(
            input.contiguous().numpy(), self._seeds[0], seeds, tables[0].numpy(), weight.numpy(), out.numpy()
        )
        return out

    def _rows(self, number: int, ids: Tensor) -> Tensor:
        """int64 [B, lookups] of one table, features in order, repetitions within them."""
        repeats = len(self._maps[number]) // len(self.methods)
        return torch.stack([map_rows(own, ids[:, i // repeats]) for i, own in enumerate(self._maps[number])], 1)
