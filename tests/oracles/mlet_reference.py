"""MLET by the book: the dense product, its gradients and one step of plain SGD, in float64."""

from __future__ import annotations

import numpy as np


def gradients(w1: np.ndarray, w2: np.ndarray, grad: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """grad = dL/dE [n, d] -> (dL/dW1 = G W2^T, dL/dW2 = W1^T G)."""
    return grad @ w2.T, w1.T @ grad


def sgd_change(w1: np.ndarray, w2: np.ndarray, grad: np.ndarray, rate: float) -> np.ndarray:
    """How E = W1 W2 changes in one step: -eta (G W2^T W2 + W1 W1^T G) + eta^2 G W2^T W1^T G."""
    return -rate * (grad @ w2.T @ w2 + w1 @ w1.T @ grad) + rate**2 * (grad @ w2.T @ w1.T @ grad)
