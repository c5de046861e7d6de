"""The checker of chaos runs: whatever is wrong at the end is seen, and whatever may be is not held against it."""

import json
import random
import sys
from pathlib import Path

import numpy as np
import pytest
from embershard.cluster.chaos_faults import Faults, others_first
from embershard.cluster.chaos_history import (
    FINAL,
    HISTORY_FILE,
    KINDS,
    VALUES,
    History,
    Recorder,
    TableState,
    Verdict,
    Workload,
    check,
    problems_of,
)
from embershard.cluster.chaos_pusher import Pusher
from embershard.cluster.cli import main
from embershard.parameter_server.local import LocalStore

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


def verdict_of(**changes: object) -> Verdict:
    right = {"rows_touched": 4, "rows_compared": 4, "faults_injected": dict.fromkeys(KINDS, 3)}
    return Verdict(**right | changes)


@pytest.mark.parametrize(
    ("changes", "why"),
    [
        ({"rows_lost": 1}, "1 rows lost and 0 doubled"),
        ({"rows_doubled": 2}, "0 rows lost and 2 doubled"),
        ({"rows_compared": 3}, "3 of 4 rows touched were compared"),
        ({"rows_compared": 0, "rows_touched": 0}, "0 of 0 rows touched were compared"),
        ({"faults_injected": {"kill": 9, "stop": 9, "rescale": 9}}, "no partition was injected"),
        ({"faults_injected": dict.fromkeys(KINDS, 2)}, "8 faults in 2 minutes are fewer than 6 a minute"),
    ],
)
def test_when_a_run_does_not_count(changes: dict[str, object], why: str) -> None:
    assert problems_of(verdict_of(), 2) == []
    assert problems_of(verdict_of(**changes), 2) == [why]


def test_a_run_that_was_left_is_judged_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """What the pushes wrote down and what the store saved, by the command."""
    recorder = Recorder(tmp_path / HISTORY_FILE)
    recorder.write("workload", **WORKLOAD.__dict__)
    recorder.write("generation", generation=1, step=0, workers=1)
    with LocalStore(shards=2, blocks=40) as store:
        store.create_tables(WORKLOAD.tables())
        store.begin(1, 1, 0)
        pusher = Pusher(store, WORKLOAD, recorder, client=0, workers=1, generation=1)
        pusher.run(1, 4, sync=False)
        pusher.run(5, 4, sync=True)
        store.save(str(tmp_path / FINAL)).result()
        for kind in KINDS:
            recorder.write("fault", kind=kind, target="", seconds=0)
        found = judged(tmp_path, monkeypatch, capsys)
        assert (found["pushes_acknowledged"], found["rows_lost"], found["rows_doubled"], found["code"]) == (8, 0, 0, 0)
        recorder.write("issued", generation=1, client=0, step=9, sync=False)
        recorder.write("acknowledged", generation=1, client=0, step=9)
        found = judged(tmp_path, monkeypatch, capsys)
        assert (found["rows_lost"], found["rows_doubled"], found["code"]) == (2 * WORKLOAD.touched, 0, 1)


def judged(folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> dict[str, object]:
    arguments = ["chaos", "--check", str(folder), "--minutes", "0.5", "--json"]
    monkeypatch.setattr(sys, "argv", ["embershard", *arguments])
    code = 0
    try:
        main()
    except SystemExit as end:
        code = int(end.code or 0)
    return {"code": code, **json.loads(capsys.readouterr().out.splitlines()[-1])}


@pytest.mark.parametrize(
    ("arguments", "error"),
    [
        (["--mutant", "hope"], "--mutant: 'hope' is no guard; there are cut, fence, "),
        (["--check", "."], "not the folder of a chaos run"),
    ],
)
def test_what_the_command_does_not_take(
    arguments: list[str],
    error: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "argv", ["embershard", "chaos", *arguments])
    with pytest.raises(SystemExit) as end:
        main()
    assert (end.value.code, error in capsys.readouterr().err) == (2, True)


def test_a_kind_that_comes_to_nothing_again_and_again_does_not_keep_the_others_away():
    rng, bag, done = random.Random(1), [], []
    for _ in range(20):
        bag = bag or rng.sample(KINDS, len(KINDS))
        kind = bag.pop()
        if kind == "rescale":
            bag = others_first(kind, bag, rng)
        else:
            done.append(kind)
    assert {kind: done.count(kind) for kind in KINDS if kind != "rescale"} == {"kill": 5, "stop": 5, "partition": 5}


def test_a_short_run_has_one_fault_of_each_kind(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Also where the first ones come to nothing; then no more come, though nobody has ended it."""
    tried: list[str] = []

    def fault(kind: str) -> tuple[str, float]:
        tried.append(kind)
        if len(tried) <= 2:
            raise RuntimeError("it is down already")
        return "shard-0", 0.0

    for name in ("SHORT_INTERVAL_SECONDS", "INTERVAL_SECONDS"):
        monkeypatch.setattr(f"embershard.cluster.chaos_faults.{name}", (0.001, 0.002))
    monkeypatch.setattr("embershard.cluster.chaos_faults.AGAIN_SECONDS", 0.001)
    for kind in KINDS:
        monkeypatch.setattr(Faults, f"_{kind}", lambda _, kind=kind: fault(kind))
    recorder = Recorder(tmp_path / HISTORY_FILE)
    faults = Faults("none", recorder, seed=0, lease=8.0, armed="", shards=lambda: 2, note=lambda text: None)
    faults.start(0.0)
    faults._thread.join(10)
    recorder.close()
    assert not faults.missing and sorted(tried[2:]) == sorted(KINDS)
