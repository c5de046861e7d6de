"""Shards die at random while a worker pushes: all that was acknowledged is read, and only moves raise the epoch."""

from __future__ import annotations

import random

import pytest

pytestmark = [pytest.mark.chaos, pytest.mark.timeout(300)]

KILLS = 20
POINTS = ("push.checked", "push.journalled", "push.applied")


def test_many_kills(shards) -> None:
    """Half of them between two stages of a push; one in four comes back at another address, which is a new map."""
    dice = random.Random(3)
    group = shards(3)
    addresses, moves = set(group.addresses()), 0
    with group.pushing():
        for number in range(KILLS):
            victim, elsewhere = dice.randrange(3), number % 4 == 3
            epoch, step = group.block_map().epoch, group.step
            if number % 2:
                group.arm(victim, f"{dice.choice(POINTS)}=kill:{dice.randint(1, 15)}")
            else:
                group.more_steps()
                group.kill(victim)
            group.restart(victim, elsewhere=elsewhere)
            assert group.processes[victim].recovered
            moves += elsewhere
            assert group.block_map().epoch == epoch + elsewhere
            addresses.add(group.processes[victim].address)
            group.more_steps()
            assert group.step > step
    assert len(addresses) == 3 + moves
    for statistics in group.store.statistics():
        # Nobody but shards died: the generation that began is the one that runs, on every shard up to the last step.
        assert (statistics["generation"], statistics["step"]) == (1, group.step)
        assert statistics["epoch"] == 1 + moves
    verdict = group.verdict()
    assert verdict.nothing_lost, verdict
    assert (verdict.pushes_acknowledged, verdict.pushes_unknown) == (group.step, 0)
