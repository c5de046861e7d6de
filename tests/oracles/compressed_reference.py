"""QR, MEmCom and double hashing by the book: one id at a time, vectors and the gradients of every table, in float64."""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

Tables = dict[str, np.ndarray]


def mix(word: int) -> int:
    word = (word ^ word >> 30) * 0xBF58476D1CE4E5B9 % 2**64
    word = (word ^ word >> 27) * 0x94D049BB133111EB % 2**64
    return word ^ word >> 31


def seeded_row(value: int, seed: int, rows: int) -> int:
    return mix(mix(value % 2**64) ^ seed) * rows >> 64


def digits(value: int, moduli: Sequence[int], coprime: bool) -> list[int]:
    """The row of `value` in each table of a complementary family."""
    if coprime:
        return [value % m for m in moduli]
    return [value // math.prod(moduli[:j]) % m for j, m in enumerate(moduli)]


def combined(operation: str, parts: Sequence[np.ndarray]) -> np.ndarray:
    if operation == "concat":
        return np.concatenate(parts)
    return np.prod(parts, axis=0) if operation == "mult" else np.sum(parts, axis=0)


def combined_gradients(operation: str, parts: Sequence[np.ndarray], grad: np.ndarray) -> list[np.ndarray]:
    """Of each part, for the gradient of what they compose."""
    if operation == "concat":
        return np.split(grad, len(parts))
    if operation == "add":
        return [grad for _ in parts]
    others = [[p for k, p in enumerate(parts) if k != j] for j in range(len(parts))]
    return [grad * np.prod(own, axis=0) for own in others]


def composed(
    tables: Tables, reads: Sequence[tuple[str, Sequence[int]]], operation: str, grads: np.ndarray
) -> tuple[np.ndarray, Tables]:
    """(vectors [N, d], gradients) of N ids; id i reads row rows[i] of `table`, for (table, rows) in reads."""
    out, back = [], {name: np.zeros_like(table) for name, table in tables.items()}
    for i, grad in enumerate(grads):
        parts = [tables[name][rows[i]] for name, rows in reads]
        out.append(combined(operation, parts))
        for (name, rows), own in zip(reads, combined_gradients(operation, parts, grad), strict=True):
            back[name][rows[i]] += own
    return np.array(out), back


def memcom(tables: Tables, ids: Sequence[int], shared: Sequence[int], grads: np.ndarray) -> tuple[np.ndarray, Tables]:
    """e(i) = V[i] U[h(i)] + B[i]; dU[r] = sum V[i] g, dV[i] = sum <g, U[h(i)]>, dB[i] = sum of g's coordinates."""
    u, v, b = tables["hashed"], tables["weight"], tables.get("bias")
    out, back = [], {name: np.zeros_like(table) for name, table in tables.items()}
    for i, row, grad in zip(ids, shared, grads, strict=True):
        out.append(v[i] * u[row] + (0 if b is None else b[i]))
        back["hashed"][row] += v[i] * grad
        back["weight"][i] += grad @ u[row]
        if b is not None:
            back["bias"][i] += grad.sum()
    return np.array(out), back


def pooled_then_combined(tables: Sequence[np.ndarray], rows: Sequence[Sequence[int]], operation: str) -> np.ndarray:
    """One bag as facebookresearch/dlrm's QREmbeddingBag makes it: each table is pooled, then the sums are combined."""
    return combined(operation, [table[list(own)].sum(0) for table, own in zip(tables, rows, strict=True)])


def path(tables: dict[str, Tensor], value: int, moduli: Sequence[int]) -> Tensor:
    """One id's vector: the row that the quotient reads, through the function that each remainder chooses in turn."""
    *remainders, quotient = digits(value, moduli, False)
    vector = tables["base"][quotient]
    d = len(vector)
    for j, row in enumerate(remainders):
        if f"matrix{j}" in tables:
            vector = tables[f"matrix{j}"][row].view(d, d) @ vector
            continue
        hidden = torch.relu(tables[f"first{j}"][row].view(-1, d) @ vector + tables[f"shift{j}"][row])
        vector = tables[f"second{j}"][row].view(d, -1) @ hidden + tables[f"offset{j}"][row]
    return vector
