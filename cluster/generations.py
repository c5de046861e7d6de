"""What the coordinator knows of the worker groups of a run, one after another, and what is asked of the present one."""

from __future__ import annotations

import threading
from collections import deque
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from .errors import RunFailed
from .run_state import RunState

MAX_RECORDS = 10_000  # reports kept for a driver that does not fetch them


@dataclass(frozen=True)
class Assignment:
    """What a worker group needs to begin. reached: see `workers.trainer.train`."""

    generation: int
    addresses: tuple[str, ...]
    reached: int | None


class Generations:
    """state: None until the run has begun. What is decided is written down before it is told."""

    def __init__(self, state: RunState | None) -> None:
        self._state = state
        self._lock = threading.Lock()  # of the records and the counts of the state
        self._records: deque[dict[str, Any]] = deque(maxlen=MAX_RECORDS)

    def _next_generation(self, workers: int) -> Assignment:
        """A group of `workers` begins. `_saw` must have been told how far the last one came."""
        with self._lock:
            state = self._running()
            again = state.joined
            planned = again and state.rested == state.generation
            state.generation += again
            state.restarts += again and not planned
            state.resizes += planned
            state.joined, state.workers, state.resting = True, workers, False
            state.save()
            return Assignment(state.generation, state.block_map.addresses, state.reached if again else None)

    def report(self, record: Mapping[str, Any]) -> None:
        """A record of a worker, for the driver; one of an older generation is dropped."""
        with self._lock:
            state = self._state
            if state is not None and record.get("generation", state.generation) == state.generation:
                self._records.append(dict(record))
                if "steps_redone" in record:
                    state.steps_redone += record["steps_redone"]
                    state.reached = 0
                    state.save()
                state.reached = max(state.reached, record.get("step", 0))

    def request_stop(self) -> None:
        """Asks the workers to stop at the next step boundary."""
        with self._lock:
            state = self._running()
            state.stop = True
            state.save()

    def want_workers(self, workers: int) -> dict[str, int | None]:
        """So many from now on, if there is room and the configuration allows it; returns `workers()`."""
        with self._lock:
            state = self._running()
            state.wanted = workers
            state.save()
        return self.workers()

    def workers(self) -> dict[str, int | None]:
        """workers: of the present group; wanted."""
        state = self._running()
        return {"workers": state.workers, "wanted": state.wanted}

    def rest(self, workers: int) -> None:
        """Asks the workers to make place for a group of `workers`, at the next step boundary and with a checkpoint."""
        with self._lock:
            state = self._running()
            if state.resting or state.stop:
                return
            state.resting = True
            state.save()
            self._records.append({"note": f"from {state.workers} to {workers} workers at the next step boundary"})

    def stop_requested(self) -> bool:
        """Whether the workers are to come to rest."""
        return self._state is not None and (self._state.stop or self._state.resting)

    def at_rest(self, generation: int) -> bool:
        """A group has come to rest, everything of it in a checkpoint; True: another one takes its place."""
        with self._lock:
            state = self._running()
            if state.stop or not state.resting or generation != state.generation:
                return False
            state.rested = generation
            state.save()
            return True

    def _running(self) -> RunState:
        if self._state is None:
            raise RunFailed("the run has not begun, or has ended")
        return self._state

    def _note(self, text: str) -> None:
        with self._lock:
            self._records.append({"note": text})

    def _saw(self, pulses: list[Any]) -> None:
        """Keeps how far the present generation has come."""
        with self._lock:
            state = self._running()
            steps = [pulse.step for pulse in pulses if pulse.generation == state.generation]
            state.reached = max([state.reached, *steps])
