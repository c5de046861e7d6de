"""How far each worker of the current generation has come. Pure; no I/O."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from . import failpoints
from .requests import FENCED, INVALID, Clock, Refusal

MAX_AHEAD = 64  # steps a push may be ahead of the first one still missing from its rank: the ledger's window


class Clocks:
    """Per rank, the last step up to which every push has arrived.

    Pushes of one rank may overtake each other on the way, so a later one does not vouch for an earlier one.
    """

    def __init__(self) -> None:
        self.generation: int | None = None
        self.workers = 0
        self._done: list[int] = []
        self._early: list[set[int]] = []

    def begin(self, generation: int, workers: int, step: int) -> None:
        """Every rank stands at `step`."""
        self.generation = generation
        self.workers = workers
        self._done = [step] * workers
        self._early = [set() for _ in range(workers)]

    def describe(self) -> dict[str, Any]:
        """All of it as JSON, for `restore`."""
        early = [sorted(steps) for steps in self._early]
        return {"generation": self.generation, "workers": self.workers, "done": list(self._done), "early": early}

    def restore(
        self, generation: int | None, workers: int, done: Sequence[int], early: Sequence[Sequence[int]]
    ) -> None:
        """As it was when `describe` was asked."""
        self.generation, self.workers = generation, workers
        self._done, self._early = list(done), [set(steps) for steps in early]

    def advance(self, step: int) -> None:
        """Every rank stands at `step` at least."""
        for rank in range(self.workers):
            self._done[rank] = max(self._done[rank], step)
            self._early[rank] = {early for early in self._early[rank] if early > self._done[rank]}
            self.record(rank, self._done[rank])

    @property
    def step(self) -> int:
        """The last step that is complete for every rank."""
        return min(self._done, default=0)

    def behind(self, step: int) -> list[int]:
        """The ranks whose pushes have not all arrived up to `step`."""
        return [rank for rank, done in enumerate(self._done) if done < step]

    def record(self, rank: int, step: int) -> None:
        """A rank's push of `step` has been applied."""
        early = self._early[rank]
        if step > self._done[rank]:
            early.add(step)
        while self._done[rank] + 1 in early:
            self._done[rank] += 1
            early.remove(self._done[rank])

    def refuse(self, clock: Clock) -> Refusal | None:
        """Why a call with this clock cannot be taken; None if it can."""
        if clock.generation != self.generation and not failpoints.active("fence"):
            known = (
                "no generation has begun here"
                if self.generation is None
                else f"generation {self.generation} is running"
            )
            return Refusal(FENCED, f"step {clock.step} of generation {clock.generation} is refused: {known}")
        if clock.workers != self.workers or not 0 <= clock.rank < self.workers:
            return Refusal(
                INVALID,
                f"step {clock.step}: rank {clock.rank} of {clock.workers} workers does not fit generation "
                f"{clock.generation}, which began with {self.workers}",
            )
        if clock.step > self._done[clock.rank] + MAX_AHEAD:
            return Refusal(
                INVALID,
                f"rank {clock.rank} is at step {clock.step}, but its push for step {self._done[clock.rank] + 1} has "
                f"not arrived: every rank sends each step's push to every shard, even without rows for it",
            )
        return None
