"""The order of an epoch: every row exactly once, whatever the ranks, the interruptions and the row groups."""

import json

import numpy as np
import pytest
from embershard.datasets.order import Cursor, CursorError, EpochPlan, RowGroup, row_order, windows
from hypothesis import given, settings
from hypothesis import strategies as st

GROUPS = st.lists(st.integers(0, 40), min_size=1, max_size=40).filter(any)
WORKERS = st.sampled_from([1, 2, 3, 5])


def row_groups(sizes: list[int]) -> list[RowGroup]:
    return [RowGroup(number // 3, number % 3, rows, rows * 10) for number, rows in enumerate(sizes)]


def read(plan: EpochPlan, rank: int, steps: int) -> tuple[list[tuple[int, int]], Cursor]:
    """The (window, place) that a rank reads in `steps` steps, and its cursor."""
    queue = [(w, place) for w, taken in plan.queue(rank) for place in range(taken, plan.rows[w])]
    count = sum(plan.step_rows(rank, step) for step in range(steps))
    return queue[:count], plan.after(rank, count)


@settings(max_examples=50, deadline=None)
@given(GROUPS, st.integers(0, 3), st.integers(0, 3), st.integers(50, 2000), st.booleans())
def test_windows_hold_every_row_group_once_within_their_bound(sizes, seed, epoch, window_bytes, shuffled):
    groups = row_groups(sizes)
    cut = windows(seed, epoch, groups, window_bytes=window_bytes, shuffled=shuffled)
    members = [group for window in cut for group in window.groups]
    assert sorted(members, key=lambda g: (g.file, g.group)) == [g for g in groups if g.rows]
    assert [window.index for window in cut] == list(range(len(cut)))
    limit = min(window_bytes, sum(sizes) * 10 // 64)
    assert all(window.bytes <= limit or len(window.groups) == 1 for window in cut)
    if not shuffled:
        assert members == [g for g in groups if g.rows]


@settings(max_examples=25, deadline=None)
@given(GROUPS, st.integers(0, 3), st.integers(0, 3), st.booleans())
def test_row_order_is_a_permutation_that_seed_and_epoch_alone_decide(sizes, seed, epoch, shuffled):
    cut = windows(seed, epoch, row_groups(sizes), window_bytes=500, shuffled=shuffled)
    for window in cut:
        order = row_order(seed, epoch, window, shuffled=shuffled)
        expected = list(range(window.rows))
        assert sorted(order.tolist()) == expected
        assert np.array_equal(order, row_order(seed, epoch, window, shuffled=shuffled))
        assert shuffled or order.tolist() == expected


def test_epochs_and_seeds_differ():
    groups = row_groups([5] * 60)
    orders = [
        [g for window in windows(seed, epoch, groups, window_bytes=10**6) for g in window.groups]
        for seed, epoch in [(0, 0), (0, 1), (1, 0)]
    ]
    assert orders[0] != orders[1] != orders[2] != orders[0]


@settings(max_examples=60, deadline=None)
@given(
    GROUPS,
    st.lists(st.tuples(WORKERS, st.integers(1, 12), st.integers(0, 9)), min_size=1, max_size=5),
    st.integers(5, 30),
)
def test_every_row_once_over_any_interruptions_and_ranks(sizes, legs, last_batch):
    """Each leg reads some steps with its own number of ranks and batch size; the last one reads to the end."""
    rows = [w.rows for w in windows(1, 0, row_groups(sizes), window_bytes=300)]
    cursor = Cursor("plan", 0, legs[0][0])
    seen: list[tuple[int, int]] = []
    for number, (workers, batch, steps) in enumerate([*legs, (legs[-1][0], last_batch, None)]):
        plan = EpochPlan.resume(rows, cursor, workers, max(batch, workers))
        steps = plan.steps if steps is None else min(steps, plan.steps)
        for step in range(steps):
            taken = [plan.step_rows(rank, step) for rank in range(workers)]
            assert 0 < sum(taken) == plan.global_rows(step) <= plan.batch_size
        parts = [read(plan, rank, steps) for rank in range(workers)]
        seen += [place for part, _ in parts for place in part]
        cursor = Cursor.from_dict(json.loads(json.dumps(Cursor.merge([c for _, c in parts]).to_dict())))
        assert cursor.workers == workers, number
    assert sorted(seen) == [(w, place) for w in range(len(rows)) for place in range(rows[w])]
    assert cursor.finished == frozenset(range(len(rows)))
    assert not cursor.begun


@settings(max_examples=50, deadline=None)
@given(GROUPS, WORKERS, WORKERS, st.integers(5, 20), st.lists(st.integers(0, 4), max_size=4))
def test_the_same_ranks_go_on_exactly_even_after_an_earlier_change_of_ranks(sizes, before, workers, batch, stops):
    rows = [w.rows for w in windows(1, 0, row_groups(sizes), window_bytes=300)]
    plan = EpochPlan.resume(rows, Cursor("plan", 0, before), before, batch)
    start = Cursor.merge([read(plan, rank, 2)[1] for rank in range(before)])
    whole = EpochPlan.resume(rows, start, workers, batch)
    uninterrupted = [read(whole, rank, whole.steps)[0] for rank in range(workers)]
    resumed: list[list[tuple[int, int]]] = [[] for _ in range(workers)]
    cursor, done = start, 0
    for steps in [*stops, whole.steps]:
        plan = EpochPlan.resume(rows, cursor, workers, batch)
        assert plan.steps == whole.steps - done
        steps = min(steps, plan.steps)
        parts = [read(plan, rank, steps) for rank in range(workers)]
        for rank, (part, _) in enumerate(parts):
            resumed[rank] += part
        cursor, done = Cursor.merge([c for _, c in parts]), done + steps
    assert resumed == uninterrupted


def test_window_i_goes_to_rank_i_mod_w():
    plan = EpochPlan.resume([4] * 10, Cursor("plan", 0, 3), 3, 6)
    assert [w for w, _ in plan.queue(1)] == [1, 4, 7]


def test_shares_differ_by_one_row_at_most():
    plan = EpochPlan.resume([100] * 9, Cursor("plan", 0, 3), 3, 8)
    assert [plan.share(rank) for rank in range(3)] == [3, 3, 2]


def test_cursors_of_different_runs_do_not_merge_and_odd_ones_are_refused():
    with pytest.raises(CursorError, match="these differ"):
        Cursor.merge([Cursor("a", 0, 2), Cursor("b", 0, 2)])
    with pytest.raises(CursorError, match="beyond the 2 windows"):
        EpochPlan.resume([3, 3], Cursor("a", 0, 1, frozenset({5})), 1, 4)
    with pytest.raises(CursorError, match="beyond the 2 windows"):
        EpochPlan.resume([3, 3], Cursor("a", 0, 1, begun={0: 4}), 1, 4)
    with pytest.raises(CursorError, match="not in the form"):
        Cursor.from_dict({"plan": "a"})
