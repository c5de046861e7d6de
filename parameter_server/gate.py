"""A moment without calls: what belongs to later steps is kept back while earlier ones are finished. Pure; no I/O."""

from __future__ import annotations

import math

from .requests import Clock

_NO_STEP_IS_BEYOND = 2**63


class Gate:
    """Open, or closed after a step.

    Closed after step s it keeps back pulls for later steps. A worker that pulls `lag` steps ahead pushes step s - lag
    only when its pull for s is answered: so pushes up to s - lag are let through, and none beyond.

    pulled: the last step that a pull was answered for. ends: when it opens by itself.
    """

    def __init__(self, pulled: int = 0) -> None:
        self.pulled = pulled
        self.lag = 0
        self.step = _NO_STEP_IS_BEYOND
        self.ends = math.inf

    @property
    def closed(self) -> bool:
        return self.step != _NO_STEP_IS_BEYOND

    def saw(self, clock: Clock) -> None:
        """A pull with this clock is being answered."""
        if clock.step >= self.pulled:
            self.pulled, self.lag = clock.step, clock.staleness

    def close(self, after: int, lag: int, until: float) -> None:
        """Closes after step `after`, or after the last one pulled if that is later."""
        self.step, self.ends = max(after, self.pulled), until
        self.lag = max(self.lag, lag)  # shards without a pull of late know less

    def open(self) -> None:
        self.step, self.ends = _NO_STEP_IS_BEYOND, math.inf

    def lets_pull(self, step: int) -> bool:
        return step <= self.step

    def lets_push(self, step: int) -> bool:
        return not self.closed or step <= self.step - self.lag
