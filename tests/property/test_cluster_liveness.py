"""A shard is never replaced while it may still serve, whatever the network does to beats and answers."""

from __future__ import annotations

from embershard.cluster.liveness import Liveness
from embershard.parameter_server.lease import Lease
from hypothesis import event, given, settings
from hypothesis import strategies as st

LEASE = 10.0
EVENTS = st.tuples(st.sampled_from(["send", "take", "hear"]), st.floats(0, 8), st.integers(0, 5))


@settings(max_examples=100, deadline=None)
@given(st.lists(EVENTS, max_size=40), st.floats(-1e6, 1e6))
def test_two_processes_never_serve_the_same_blocks(events: list[tuple[str, float, int]], offset: float) -> None:
    """Beats and answers arrive late, in any order, or never; `offset` lies between the two clocks."""
    now = 100.0
    lease = Lease(lambda: now + offset)
    lease.grant(now + offset + LEASE)  # the process begins with one
    shard = Liveness(LEASE, now, now + offset)
    beats: list[float] = []
    answers: list[float] = []
    replaced = False
    for kind, gap, which in [*events, ("wait", LEASE + 2, 0)]:
        now += gap
        replaced = replaced or shard.may_be_replaced(now, ended=False)
        if kind == "send" and not replaced:
            beats.append(shard.grant())
        elif kind == "take" and beats:  # perhaps long after the shard was replaced
            lease.grant(beats.pop(which % len(beats)))
            answers.append(now + offset)
        elif kind == "hear" and answers and not replaced:
            shard.answered(now, answers.pop(which % len(answers)))
        assert not replaced or lease.ended
    event("replaced" if replaced else "not replaced")
    assert replaced or now - shard.heard <= LEASE + 1.0


def test_a_shard_that_answers_is_kept_and_one_that_has_ended_is_not_waited_for() -> None:
    shard = Liveness(LEASE, 0.0, 500.0)
    for second in range(1, 60, 3):
        assert not shard.may_be_replaced(second, ended=False)
        assert shard.grant() == 500.0 + max(0, second - 3) + LEASE
        shard.answered(second, 500.0 + second)
    assert shard.may_be_replaced(second, ended=True)
