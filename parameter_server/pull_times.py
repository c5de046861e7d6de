"""How long callers waited for their rows. Counted where answers leave, so what a shard keeps back is in it."""

from __future__ import annotations

import threading

import numpy as np

KEPT = 1 << 16


class PullTimes:
    """The last 65,536 pulls: milliseconds from a call's arrival to its answer."""

    def __init__(self) -> None:
        self._seconds = np.zeros(KEPT)
        self._count = 0
        self._lock = threading.Lock()

    def add(self, seconds: float) -> None:
        with self._lock:
            self._seconds[self._count % KEPT] = seconds
            self._count += 1

    def take(self) -> dict[str, float]:
        """pulls, p50, p99, longest (milliseconds; 0 without pulls) since the last time; begins anew."""
        with self._lock:
            kept = 1e3 * self._seconds[: min(self._count, KEPT)]
            count, self._count = self._count, 0
            p50, p99, longest = np.percentile(kept, [50, 99, 100]) if count else (0.0, 0.0, 0.0)
        return {"pulls": count, "p50": float(p50), "p99": float(p99), "longest": float(longest)}
