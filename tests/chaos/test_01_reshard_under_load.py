"""Blocks move to and fro while a worker pushes, then every shard dies: rows and state are those of the model.

No checkpoint is written before, so that they come back with what stands in their journals alone.
"""

import pytest
from embershard.cluster.chaos_history import read_tables

pytestmark = [pytest.mark.chaos, pytest.mark.timeout(300)]


def test_from_two_to_five_and_back_then_kill_all(shards) -> None:
    group = shards(2)
    with group.pushing():
        for count in (5, 2, 4, 2):
            group.rescale(count)
            assert len(group.block_map().addresses) == count
            group.more_steps()
    for number in range(len(group.block_map().addresses)):
        group.kill(number)
    for number in range(len(group.block_map().addresses)):
        group.restart(number)
    verdict = group.verdict()
    assert verdict.nothing_lost, verdict
    with group.pushing():
        group.more_steps()
    verdict = group.verdict("later")
    assert verdict.nothing_lost, verdict
    before, after = read_tables(str(group.folder / "final")), read_tables(str(group.folder / "later"))
    assert (before["items"].values != after["items"].values).any()
