"""Notices silence: who is not heard from for too long is taken for dead."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable


class Watchdog:
    """Calls `on_silence` once, on a thread of its own, when `beat` was not called for `timeout` seconds."""

    def __init__(self, timeout: float, on_silence: Callable[[], None], name: str = "watchdog") -> None:
        self._timeout = timeout
        self._on_silence = on_silence
        self._last = time.monotonic()
        self._stopped = threading.Event()
        threading.Thread(target=self._watch, name=name, daemon=True).start()

    def beat(self) -> None:
        self._last = time.monotonic()

    def stop(self) -> None:
        """No call of `on_silence` begins after this returned, unless it had begun before."""
        self._stopped.set()

    def _watch(self) -> None:
        while (left := self._last + self._timeout - time.monotonic()) > 0:
            if self._stopped.wait(left):
                return
        if not self._stopped.is_set():
            self._on_silence()
