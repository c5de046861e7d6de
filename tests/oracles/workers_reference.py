"""The readable twin of training over a store: DLRM with torch.nn.EmbeddingBag in one process, and plain updates."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from itertools import pairwise

import numpy as np
import torch
from torch import Tensor, nn


class ReferenceDLRM(nn.Module):
    """DLRM with one EmbeddingBag per feature. `tables`: float32 [n, d] each; `state`: the dense part's own tensors."""

    def __init__(
        self, tables: Sequence[np.ndarray], bottom: Sequence[int], top: Sequence[int], state: Mapping[str, Tensor]
    ) -> None:
        super().__init__()
        self.tables = nn.ModuleList(
            nn.EmbeddingBag.from_pretrained(torch.tensor(table), freeze=False, mode="sum") for table in tables
        )
        self.bottom = nn.Sequential()
        for n, m in pairwise(bottom):
            self.bottom.extend([nn.Linear(n, m), nn.ReLU()])
        self.top = nn.Sequential()
        for n, m in pairwise(top):
            self.top.extend([nn.Linear(n, m), nn.ReLU()])
        self.top = self.top[:-1]
        self.load_state_dict(dict(state), strict=False)

    def forward(self, dense: Tensor, ids: Tensor) -> Tensor:
        """dense [B, D], ids [B, F], one per feature -> logits [B]."""
        below = self.bottom(dense)
        vectors = [below] + [table(ids[:, f : f + 1]) for f, table in enumerate(self.tables)]
        pairs = [(vectors[i] * vectors[j]).sum(1, keepdim=True) for i in range(len(vectors)) for j in range(i)]
        return self.top(torch.cat([below, *pairs], 1)).squeeze(1)


def rowwise_adagrad(table: Tensor, state: Tensor, grad: Tensor, rate: float, eps: float = 1e-8) -> None:
    """DLRM's update (optim/rwsadagrad.py): state [n] += mean of g^2; row -= rate * g / (sqrt(state) + eps)."""
    state += grad.pow(2).mean(1)
    table -= rate * grad / (state.sqrt() + eps).unsqueeze(1)


class ReferenceTrainer:
    """Dense SGD; SGD or row-wise Adagrad on the tables; forward passes may see tables `staleness` steps old."""

    def __init__(self, model: ReferenceDLRM, kind: str, dense_rate: float, sparse_rate: float, staleness: int) -> None:
        self.model = model
        self.kind, self.dense_rate, self.sparse_rate, self.staleness = kind, dense_rate, sparse_rate, staleness
        self.current = [table.weight.detach().clone() for table in model.tables]
        self.state = [torch.zeros(len(table)) for table in self.current]
        self.history: list[list[Tensor]] = []

    def step(self, dense: Tensor, ids: Tensor, labels: Tensor) -> float:
        """Returns the mean loss."""
        self.history.append([table.clone() for table in self.current])
        seen = self.history[max(0, len(self.history) - 1 - self.staleness)]
        with torch.no_grad():
            for table, values in zip(self.model.tables, seen, strict=True):
                table.weight.copy_(values)
        self.model.zero_grad()
        loss = nn.functional.binary_cross_entropy_with_logits(self.model(dense, ids), labels)
        loss.backward()
        with torch.no_grad():
            for module in (self.model.bottom, self.model.top):
                for parameter in module.parameters():
                    parameter -= self.dense_rate * parameter.grad
            for table, state, module in zip(self.current, self.state, self.model.tables, strict=True):
                if self.kind == "sgd":
                    table -= self.sparse_rate * module.weight.grad
                else:
                    rowwise_adagrad(table, state, module.weight.grad, self.sparse_rate)
        return loss.item()
