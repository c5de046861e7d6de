"""When a shard may be replaced: never while it could still serve. Pure; no I/O."""

from __future__ import annotations

MARGIN_SECONDS = 1.0  # for clocks that do not run at quite the same rate


class Liveness:
    """What the coordinator knows of one shard's lease.

    A lease is granted up to a moment of the shard's own clock: what that clock showed in its last answer, plus the
    lease. So a grant that is late on its way (the process was stopped, the network was gone) grants nothing any more,
    and the lease ends at the latest `lease` seconds after that answer came. Seconds of two clocks that never go back.
    """

    def __init__(self, lease: float, now: float, shard_now: float) -> None:
        self.lease = lease
        self.answered(now, shard_now)

    def answered(self, now: float, shard_now: float) -> None:
        """now: when the answer came; shard_now: the shard's clock in it."""
        self.heard = now
        self._shard_now = shard_now

    def grant(self) -> float:
        """Up to when the shard may serve, by its own clock."""
        return self._shard_now + self.lease

    def may_be_replaced(self, now: float, *, ended: bool) -> bool:
        """ended: its process is known to have ended."""
        return ended or now >= self.heard + self.lease + MARGIN_SECONDS
