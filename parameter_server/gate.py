"""A moment without calls: pulls beyond a step are kept back while the steps before it are finished. Pure; no I/O."""

from __future__ import annotations

import math

_NO_STEP_IS_BEYOND = 2**63


class Gate:
    """Open, or closed after a step. pulled: the last step answered; ends: when it opens by itself."""

    def __init__(self) -> None:
        self.step = _NO_STEP_IS_BEYOND
        self.ends = math.inf
        self.pulled = 0

    @property
    def closed(self) -> bool:
        return self.step != _NO_STEP_IS_BEYOND

    def close(self, after: int, until: float) -> int:
        """Closes after step `after`, or after the last one pulled if that is later; returns which it is."""
        self.step, self.ends = max(after, self.pulled), until
        return self.step

    def open(self) -> None:
        self.step, self.ends = _NO_STEP_IS_BEYOND, math.inf
