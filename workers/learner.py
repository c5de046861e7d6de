"""One step: forward, backward, push, dense update."""

from __future__ import annotations

from collections.abc import Callable

from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from ..datasets.schema import Batch
from ..parameter_server.requests import Clock
from .embeddings.gradients import GradientError, first_not_finite, gradient_error
from .embeddings.ticket import Ticket
from .group import Group, sum_gradients
from .network import Network, dense_inputs
from .optimizers import OptimizerConfig, dense_optimizer
from .schedule import factor


class Learner:
    """Trains a network on the batches it is given.

    wrap: turns the network into its data-parallel form; group: the workers of that form. Gradients are summed over the
    workers, never averaged: each one's loss is the sum over its rows divided by the rows of the whole step.
    """

    def __init__(
        self,
        network: Network,
        config: OptimizerConfig,
        *,
        total_steps: int,
        wrap: Callable[[nn.Module], nn.Module] = lambda module: module,
        group: Group | None = None,
    ) -> None:
        self.network = network
        self.optimizer = dense_optimizer(config.dense, network.parameters())
        self._config = config
        self._total_steps = total_steps
        self._module = wrap(network)
        self._group = group or Group(0, 1, network.embeddings.device)
        if isinstance(self._module, DistributedDataParallel):
            self._module.register_comm_hook(None, sum_gradients)

    def factor(self, step: int) -> float:
        """What the schedule multiplies learning rates by."""
        return factor(self._config.schedule, step, self._total_steps)

    def step(self, batch: Batch, ticket: Ticket, clock: Clock, settle: Callable[[], None] = lambda: None) -> Tensor:
        """Trains on one batch; returns this worker's share of the mean loss, a scalar on the device.

        settle: called after the backward pass, before the gradients are sent.

        Raises:
            GradientError: a gradient of any worker is NaN or infinite; no worker has sent anything of this step.
            StoreError: this push, or an earlier one, failed.
        """
        embeddings = self.network.embeddings
        dense, labels = dense_inputs(batch, embeddings.device)
        self.optimizer.zero_grad(set_to_none=True)
        outputs = self._module(dense, ticket)
        loss = self.network.objective.loss(outputs, labels, batch) / batch.global_rows
        loss.backward()  # type: ignore[no-untyped-call]
        settle()
        rate = self.factor(clock.step)
        embeddings.step(
            rate * self._config.sparse.learning_rate, clock, verdict=lambda error: self._agreed(error, clock.step)
        )
        for group in self.optimizer.param_groups:
            group["lr"] = rate * self._config.dense.learning_rate
        self.optimizer.step()
        return loss.detach()

    def _agreed(self, error: GradientError | None, step: int) -> GradientError | None:
        """One error on every rank, that of a table before that of the dense part, where every rank has the same sum."""
        errors = (error, self._dense_error(step))
        if not self._group.any(any(error is not None for error in errors)):
            return None
        messages = self._group.gather([error and str(error) for error in errors])
        return GradientError(next(message for kind in zip(*messages, strict=True) for message in kind if message))

    def _dense_error(self, step: int) -> GradientError | None:
        grads = {name: p.grad for name, p in self.network.named_parameters() if p.grad is not None}
        name = first_not_finite(grads)
        return None if name is None else gradient_error(f"parameter {name!r}", step)
