"""Calls are lost on their way there or back, and repeated where the first was applied, or waits: each counts once."""

from __future__ import annotations

import threading

import pytest

pytestmark = [pytest.mark.chaos, pytest.mark.timeout(300)]

LOST = {"requests": "network.cut=skip", "answers": "network.answer=skip"}


def duplicates(group) -> list[int]:
    """Parts of pushes that each shard's process recognised as repeated."""
    return [statistics["duplicates"] for statistics in group.store.statistics()]


@pytest.mark.parametrize("lost", LOST)
def test_some_are_lost(shards, lost: str) -> None:
    group = shards(2)
    with group.pushing():
        for number in range(20):
            group.arm(number % 2, f"{LOST[lost]}:{10 + number // 2 % 2}")  # pulls and pushes take turns
            group.more_steps()
    if lost == "answers":
        assert sum(duplicates(group)) > 0
    assert_each_counts_once(group)


def test_repeated_after_a_move(shards) -> None:
    """Applied by the shard that had the block; repeated until the answer comes from the one that has it now."""
    group = shards(2, spare=1)
    with group.connect() as store:
        pusher = group.pusher(store)
        pusher.run(1, 5, sync=False)
        for number in range(2):
            group.arm(number, LOST["answers"])
        push = pusher.push(6)
        group.wait_until(lambda: all(s["step"] == 6 for s in group.store.statistics()), "the push to be applied")
        group.rescale(3)
        assert not push.done()
        for number in range(2):
            group.arm(number, "")
        push.result()
        assert duplicates(group)[2] > 0  # it has never seen the first
        pusher.run(7, 5, sync=False)
    group.step = 11
    assert_each_counts_once(group)


@pytest.mark.parametrize("elsewhere", [False, True], ids=["same-address", "elsewhere"])
def test_repeated_after_a_restart(shards, elsewhere: bool) -> None:
    group = shards(2)
    with group.connect() as store:
        pusher = group.pusher(store)
        pusher.run(1, 5, sync=False)
        group.arm(0, LOST["answers"])
        push = pusher.push(6)
        group.wait_until(lambda: group.store.statistics()[0]["step"] == 6, "the push to be applied")
        group.kill(0)
        assert not push.done()
        group.restart(0, elsewhere=elsewhere)
        push.result()
        assert duplicates(group)[0] > 0  # its process has never seen the first
        pusher.run(7, 5, sync=False)
    group.step = 11
    assert_each_counts_once(group)


def test_repeated_while_the_first_is_in_progress(shards) -> None:
    """In `sync` a push waits for the other worker's; the connection breaks under it, again and again."""
    group = shards(2)
    group.begin(generation=2, workers=2)
    with group.connect() as one, group.connect() as other:
        first, second = group.pusher(one, 0), group.pusher(other, 1)
        group.arm(0, LOST["answers"])
        pushes = [first.push(1, sync=True)]
        group.wait_until(lambda: group.store.statistics()[0]["waiting"] > 3, "repetitions")
        assert group.store.statistics()[0]["step"] == 0
        group.arm(0, "")
        pushes.append(second.push(1, sync=True))
        for push in pushes:
            push.result()
        assert duplicates(group)[0] > 0
        both = [threading.Thread(target=p.run, args=(2, 5), kwargs={"sync": True}) for p in (first, second)]
        for worker in both:
            worker.start()
        for worker in both:
            worker.join()
    verdict = group.verdict()
    assert verdict.nothing_lost, verdict
    assert (verdict.pushes_acknowledged, verdict.pushes_unknown) == (12, 0)


def assert_each_counts_once(group) -> None:
    verdict = group.verdict()
    assert verdict.nothing_lost, verdict
    assert (verdict.pushes_acknowledged, verdict.pushes_unknown) == (group.step, 0)
