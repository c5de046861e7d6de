"""One step: forward, backward, push, dense update."""

from __future__ import annotations

from collections.abc import Callable

from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.parallel import DistributedDataParallel

from ..datasets.schema import Batch
from ..parameter_server.requests import Clock
from .embeddings.ticket import Ticket
from .group import sum_gradients
from .network import Network, dense_inputs
from .optimizers import OptimizerConfig, dense_optimizer
from .schedule import factor


class Learner:
    """Trains a network on the batches it is given.

    wrap: turns the network into its data-parallel form. Gradients are summed over the workers, never averaged: each
    one's loss is the sum over its rows divided by the rows of the whole step.
    """

    def __init__(
        self,
        network: Network,
        config: OptimizerConfig,
        *,
        total_steps: int,
        wrap: Callable[[nn.Module], nn.Module] = lambda module: module,
    ) -> None:
        self.network = network
        self.optimizer = dense_optimizer(config.dense, network.parameters())
        self._config = config
        self._total_steps = total_steps
        self._module = wrap(network)
        if isinstance(self._module, DistributedDataParallel):
            self._module.register_comm_hook(None, sum_gradients)

    def factor(self, step: int) -> float:
        """What the schedule multiplies learning rates by."""
        return factor(self._config.schedule, step, self._total_steps)

    def step(self, batch: Batch, ticket: Ticket, clock: Clock, settle: Callable[[], None] = lambda: None) -> Tensor:
        """Trains on one batch; returns this worker's share of the mean loss, a scalar on the device.

        settle: called after the backward pass, before the gradients are sent.

        Raises:
            GradientError: a gradient of a table is NaN or infinite; nothing was sent.
            StoreError: this push, or an earlier one, failed.
        """
        embeddings = self.network.embeddings
        dense, labels = dense_inputs(batch, embeddings.device)
        self.optimizer.zero_grad(set_to_none=True)
        logits = self._module(dense, ticket)
        loss = F.binary_cross_entropy_with_logits(logits, labels, reduction="sum") / batch.global_rows
        loss.backward()  # type: ignore[no-untyped-call]
        settle()
        rate = self.factor(clock.step)
        embeddings.step(rate * self._config.sparse.learning_rate, clock)
        for group in self.optimizer.param_groups:
            group["lr"] = rate * self._config.dense.learning_rate
        self.optimizer.step()
        return loss.detach()
