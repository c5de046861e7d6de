"""How many workers a group begins with, and when another number is worth a change. Pure; no I/O."""

from __future__ import annotations

from collections.abc import Mapping

ROUNDING = 1e-6  # of resources that Ray counts in ten-thousandths


def room(
    free: Mapping[str, Mapping[str, float]], held: Mapping[str, int], per_worker: Mapping[str, float], most: int
) -> int:
    """Workers that can be placed, `most` at most: in what is free on each node, and where our own are now.

    free: resources by node, of the nodes that are there. held: workers of the present group, by node.
    """
    asked = {name: amount for name, amount in per_worker.items() if amount > 0}
    if not asked:
        return most
    fits = 0
    for node, resources in free.items():
        fits += held.get(node, 0)
        fits += int(min(resources.get(name, 0.0) / amount for name, amount in asked.items()) + ROUNDING)
    return min(fits, most)


class WorkerCount:
    """The number of workers of a group that may have from `least` to `most`.

    wanted: what the user asked for last, if anything; an upper limit, as `most` is.
    """

    def __init__(self, least: int, most: int) -> None:
        self.least, self.most = least, most
        self._beginning = False
        self._seen: int | None = None

    def begin(self, room: int, wanted: int | None) -> int:
        """For a new group: as many as there is room for, and as few as possible if the last one could not begin."""
        number = self.least if self._beginning else self._within(room, wanted)
        self._beginning, self._seen = True, None
        return number

    def runs(self) -> None:
        """The group has begun."""
        self._beginning = False

    def look(self, workers: int, room: int, wanted: int | None) -> int | None:
        """Another number for a group of `workers` that runs, once two looks in a row agree on it; otherwise None.

        Never fewer for want of room: whose room is gone fails by itself.
        """
        number = self._within(max(room, workers), wanted)
        agreed = number == self._seen
        self._seen = number
        return number if agreed and number != workers else None

    def _within(self, room: int, wanted: int | None) -> int:
        return max(self.least, min(room, self.most, wanted or self.most))
