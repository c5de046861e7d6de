"""How long a shard may serve without hearing from whoever could give its blocks to another. Pure; no I/O."""

from __future__ import annotations

import math
import time
from collections.abc import Callable

from . import failpoints


class Lease:
    """The right to serve, up to a moment of this process's own clock; without end as long as nobody grants one.

    now: seconds that never go back.
    """

    def __init__(self, now: Callable[[], float] = time.monotonic) -> None:
        self.until = math.inf
        self._now = now

    def grant(self, until: float) -> None:
        """Extends the lease; a grant that others have overtaken on the way does not shorten it."""
        self.until = until if math.isinf(self.until) else max(self.until, until)

    @property
    def ended(self) -> bool:
        return self._now() >= self.until and not failpoints.active("lease")
