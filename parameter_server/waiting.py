"""Calls that a shard cannot answer yet. Pure; no I/O."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from .requests import Clock, PullRequest, PushRequest


@dataclass(slots=True)
class WaitingCall:
    """It has a clock, or it would not wait."""

    request: PullRequest | PushRequest
    clock: Clock
    token: object
    deadline: float


class WaitingCalls:
    """pulls: for pushes that they must see, or for a gate; pushes: for a gate; steps: of `sync`, step -> rank -> pushes
    of a step that is not complete.
    """

    def __init__(self) -> None:
        self.pulls: list[WaitingCall] = []
        self.pushes: list[WaitingCall] = []
        self.steps: dict[int, dict[int, list[WaitingCall]]] = {}

    def __iter__(self) -> Iterator[WaitingCall]:
        yield from self.pulls
        yield from self.pushes
        for ranks in self.steps.values():
            for calls in ranks.values():
                yield from calls

    def take_all(self) -> list[WaitingCall]:
        """Every call; none is left."""
        calls = list(self)
        self.pulls, self.pushes, self.steps = [], [], {}
        return calls

    def drop_late(self, now: float) -> None:
        """Forgets the calls whose deadline has come."""
        self.pulls = [call for call in self.pulls if call.deadline > now]
        self.pushes = [call for call in self.pushes if call.deadline > now]
        for ranks in self.steps.values():
            for rank in list(ranks):
                ranks[rank] = [call for call in ranks[rank] if call.deadline > now]
                if not ranks[rank]:
                    del ranks[rank]
