"""The checker of chaos runs: whatever is wrong at the end is seen, and whatever may be is not held against it."""

from pathlib import Path

import numpy as np
import pytest
from embershard.cluster.chaos_history import VALUES, History, Recorder, TableState, Verdict, Workload, check

WORKLOAD = Workload(seed=3, rows=50, width=3, touched=8)


class Case:
    """A history in the making, and the tables as they would be."""

    def __init__(self, folder: Path) -> None:
        self.path = folder / "history.jsonl"
        self.recorder = Recorder(self.path)
        self.recorder.write("workload", **WORKLOAD.__dict__)
        self.recorder.write("generation", generation=1, step=0, workers=2)
        self.tables = {
            name: TableState(np.zeros((WORKLOAD.rows, WORKLOAD.width), np.float32), np.arange(WORKLOAD.rows) % 5)
            for name in VALUES
        }

    def push(self, step: int, client: int = 0, *, generation: int = 1, acknowledged: bool = True) -> None:
        name = {"generation": generation, "client": client, "step": step}
        self.recorder.write("issued", **name, sync=False)
        if acknowledged:
            self.recorder.write("acknowledged", **name)

    def apply(self, step: int, client: int = 0, times: int = 1, blocks: tuple[int, ...] = (0, 1, 2, 3, 4)) -> None:
        rows, grads = WORKLOAD.gradients(client, step)
        for name, delta in (("items", -grads), ("squares", grads**2)):
            here = np.isin(self.tables[name].block[rows], blocks)
            self.tables[name].values[rows[here]] += times * delta[here]

    def verdict(self) -> Verdict:
        return check(History.read(self.path), self.tables)


@pytest.fixture
def case(tmp_path: Path) -> Case:
    return Case(tmp_path)


def rows_of(*steps: int) -> int:
    return 2 * len(np.unique(np.concatenate([WORKLOAD.gradients(0, step)[0] for step in steps])))


def test_what_was_acknowledged_once_is_right(case: Case) -> None:
    for step in (1, 2, 3):
        case.push(step)
        case.apply(step)
    verdict = case.verdict()
    assert verdict.nothing_lost
    assert (verdict.pushes_acknowledged, verdict.rows_compared) == (3, rows_of(1, 2, 3))


@pytest.mark.parametrize(("times", "lost", "doubled"), [(0, rows_of(2), 0), (2, 0, rows_of(2))])
def test_a_push_lost_or_doubled_is_counted_in_weights_and_in_state(
    case: Case, times: int, lost: int, doubled: int
) -> None:
    for step in (1, 2, 3):
        case.push(step)
        case.apply(step, times=times if step == 2 else 1)
    verdict = case.verdict()
    assert (verdict.rows_lost, verdict.rows_doubled) == (lost, doubled)
    assert not verdict.nothing_lost


def test_one_for_another_is_both(case: Case) -> None:
    """As many pushes as there should be, and not the same ones."""
    case.push(1)
    case.apply(1)
    row = WORKLOAD.gradients(0, 1)[0][0]
    case.tables["squares"].values[row, 0] += 1
    verdict = case.verdict()
    assert (verdict.rows_lost, verdict.rows_doubled) == (1, 1)


def test_a_push_without_answer_may_be_there_or_not_by_block(case: Case) -> None:
    case.push(1)
    case.apply(1)
    case.push(2, acknowledged=False)
    assert case.verdict().nothing_lost
    case.apply(2, blocks=(0, 3))
    verdict = case.verdict()
    assert verdict.nothing_lost
    assert verdict.pushes_unknown == 1
    rows, _ = WORKLOAD.gradients(0, 2)
    block = case.tables["items"].block
    (pair,) = [rows[block[rows] == b] for b in (1, 2, 4) if np.count_nonzero(block[rows] == b) > 1][:1]
    case.tables["items"].values[pair[0], -1] -= 1  # of one block's part, one row alone
    assert not case.verdict().nothing_lost


def test_a_row_that_is_not_there_is_not_compared(case: Case) -> None:
    case.push(1)
    case.apply(1)
    row = WORKLOAD.gradients(0, 1)[0][0]
    case.tables["items"].values[row] = np.nan
    verdict = case.verdict()
    assert verdict.rows_compared == verdict.rows_touched - 1
    assert (verdict.rows_lost, verdict.rows_doubled) == (1, 1)
    assert not verdict.nothing_lost


def test_a_row_that_nobody_touched_is_compared_too(case: Case) -> None:
    case.push(1)
    case.apply(1)
    row = np.setdiff1d(np.arange(WORKLOAD.rows), WORKLOAD.gradients(0, 1)[0])[0]
    case.tables["items"].values[row, -1] = -1
    assert case.verdict().rows_doubled == 1


def test_what_a_later_generation_undid_must_not_be_there(case: Case) -> None:
    for step in (1, 2, 3):
        case.push(step)
    case.recorder.write("generation", generation=2, step=2, workers=2)
    case.push(3, generation=2)
    for step in (1, 2, 3):
        case.apply(step)
    verdict = case.verdict()
    assert verdict.nothing_lost
    assert verdict.pushes_undone == 1
    case.apply(3)
    assert case.verdict().rows_doubled == rows_of(3)


def test_a_step_of_sync_counts_as_the_sum_of_its_workers(case: Case) -> None:
    """Squared after it is added, where two workers touch the same row."""
    total = np.zeros((WORKLOAD.rows, WORKLOAD.width), np.float32)
    for client in (0, 1):
        name = {"generation": 1, "client": client, "step": 1}
        case.recorder.write("issued", **name, sync=True)
        case.recorder.write("acknowledged", **name)
        rows, grads = WORKLOAD.gradients(client, 1)
        total[rows] += grads
    assert total[:, -1].max() == 2
    case.tables["items"].values[:] = -total
    case.tables["squares"].values[:] = total**2
    assert case.verdict().nothing_lost


def test_a_line_cut_short_is_left_out_and_damage_is_named(case: Case) -> None:
    case.push(1)
    case.apply(1)
    whole = case.path.read_text()
    case.path.write_text(whole + '{"what": "acknow')
    assert case.verdict().nothing_lost
    case.path.write_text(whole + '{"what": "acknow\n')
    with pytest.raises(ValueError, match=r"history\.jsonl:5: not a line of a history"):
        case.verdict()


def test_too_many_unknown_pushes_are_refused(case: Case) -> None:
    for step in range(1, 80):
        case.push(step, acknowledged=False)
    with pytest.raises(ValueError, match="pushes were never answered, more than 12"):
        case.verdict()
