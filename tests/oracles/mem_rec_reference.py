"""MEM-REC by the book: counts of bins, two products with the tables, and the gradients, in numpy."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from embershard.workers.embeddings.base import Method


def mix(word: int) -> int:
    word = (word ^ word >> 30) * 0xBF58476D1CE4E5B9 % 2**64
    word = (word ^ word >> 27) * 0x94D049BB133111EB % 2**64
    return word ^ word >> 31


def bins(method: Method, table: int, ids: Sequence[int]) -> list[int]:
    """The rows of one table that a feature's ids read, one per id and hash, in Python's integers."""
    maps = [lookup.map for lookup in method.lookups if lookup.table == table]
    return [mix(mix(value % 2**64) ^ m.seed) * m.modulus >> 64 for value in ids for m in maps]


def counts(rows: int, read: Sequence[int]) -> np.ndarray:
    """phi: how often each bin is read, float64 [rows]; duplicates count."""
    return np.bincount(np.array(read, np.int64), minlength=rows).astype(np.float64)


def vector(token: np.ndarray, weight: np.ndarray | None, phi: np.ndarray, psi: np.ndarray | None) -> np.ndarray:
    """z = (w^T psi) (M^T phi), or M^T phi without weights."""
    total = token.T @ phi
    return total if weight is None or psi is None else (weight @ psi) * total


def gradients(
    token: np.ndarray, weight: np.ndarray, phi: np.ndarray, psi: np.ndarray, grad: np.ndarray
) -> tuple[np.ndarray, np.ndarray]:
    """For one sample with g = dL/dz: dM = alpha phi g^T, dw = <g, S> psi."""
    return (weight @ psi) * np.outer(phi, grad), float(grad @ (token.T @ phi)) * psi
