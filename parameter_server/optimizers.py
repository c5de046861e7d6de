"""From an optimizer's settings to the kernel that applies it, and what its state per row is called."""

from __future__ import annotations

import numpy as np

from . import row_kernels as kernels
from .tables import Optimizer


def apply(
    optimizer: Optimizer,
    weights: np.ndarray,
    state: np.ndarray,
    index: np.ndarray,
    grads: np.ndarray,
    learning_rate: float,
) -> None:
    """Updates the rows `index` (distinct) of `weights` [R, width] and `state` [R, state width] in place."""
    rate = np.float32(learning_rate)
    eps = np.float32(optimizer.eps)
    if optimizer.kind == "sgd":
        kernels.update_sgd(weights, index, grads, rate)
    elif optimizer.kind == "adagrad":
        kernels.update_adagrad(weights, state, index, grads, rate, eps)
    elif optimizer.kind == "rowwise_adagrad":
        kernels.update_rowwise_adagrad(weights, state, index, grads, rate, eps)
    else:
        kernels.update_adam(
            weights, state, index, grads, rate, eps, np.float32(optimizer.beta1), np.float32(optimizer.beta2)
        )


def initial_state(optimizer: Optimizer) -> float:
    """What every float of state is before a row's first update."""
    return optimizer.initial_accumulator if optimizer.kind in ("adagrad", "rowwise_adagrad") else 0.0


def state_columns(optimizer: Optimizer, width: int) -> dict[str, slice]:
    """Name in a checkpoint -> columns of the state. The names differ wherever the meaning does."""
    if optimizer.kind == "adagrad":
        return {"sum": slice(0, width)}
    if optimizer.kind == "rowwise_adagrad":
        return {"row_sum": slice(0, 1)}
    if optimizer.kind == "adam":
        return {
            "exp_avg": slice(0, width),
            "exp_avg_sq": slice(width, 2 * width),
            "step": slice(2 * width, 2 * width + 1),
        }
    return {}
