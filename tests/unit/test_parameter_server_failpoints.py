"""Failpoints: nothing unless armed, and then exactly what was ordered."""

import signal
import subprocess
import sys
from collections.abc import Iterator

import numpy as np
import pytest
from embershard.parameter_server import failpoints
from embershard.parameter_server.administration import Administration
from embershard.parameter_server.blocks import BlockMap
from embershard.parameter_server.requests import Clock, PushRequest, RowSet
from embershard.parameter_server.shard import Shard
from embershard.parameter_server.store import StoreError
from embershard.parameter_server.tables import Layout, Optimizer, TableSpec


@pytest.fixture(autouse=True)
def disarmed() -> Iterator[None]:
    yield
    failpoints.arm("")


def test_nothing_happens_unless_armed() -> None:
    failpoints.hit("push.applied")
    assert not failpoints.active("fence")
    failpoints.arm("ledger=skip")
    failpoints.hit("push.applied")
    assert not failpoints.active("fence")


def test_a_guard_is_off_while_it_is_skipped() -> None:
    failpoints.arm("ledger=skip,fence=skip:2")
    assert [failpoints.active("ledger") for _ in range(3)] == [True, True, True]
    assert [failpoints.active("fence") for _ in range(3)] == [False, True, False]
    failpoints.arm("")
    assert not failpoints.active("ledger")


def test_an_error_comes_at_the_pass_that_was_named() -> None:
    failpoints.arm("journal.write=error:2")
    failpoints.hit("journal.write")
    with pytest.raises(OSError, match=r"failpoint journal\.write"):
        failpoints.hit("journal.write")
    failpoints.hit("journal.write")


def test_kill_ends_the_process() -> None:
    code = "from embershard.parameter_server import failpoints; failpoints.hit('push.applied'); print('alive')"
    environment = {"PYTHONPATH": ":".join(sys.path), failpoints.VARIABLE: "push.applied=kill"}
    done = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, timeout=60)
    assert (done.returncode, done.stdout) == (-signal.SIGKILL, "")


@pytest.mark.parametrize("wrong", ["nowhere=kill", "ledger", "ledger=explode", "ledger=skip:x"])
def test_what_nobody_passes_cannot_be_armed(wrong: str) -> None:
    with pytest.raises(ValueError, match=r"EMBERSHARD_FAILPOINTS: .* is not NAME=ACTION"):
        failpoints.arm(wrong)


def test_a_shard_is_armed_from_outside_only_where_the_environment_allows_it(monkeypatch: pytest.MonkeyPatch) -> None:
    def administration() -> Administration:
        return Administration(Shard(0, Layout(40)), lambda _: None, lambda *_, **__: [])

    monkeypatch.delenv(failpoints.VARIABLE, raising=False)
    with pytest.raises(StoreError, match="a shard has no method 'arm'"):
        administration().call("arm", {"points": "fence=skip"})
    monkeypatch.setenv(failpoints.VARIABLE, "")
    administration().call("arm", {"points": "fence=skip"})
    assert failpoints.active("fence")


def test_without_its_guard_a_shard_doubles_and_lets_the_old_generation_write() -> None:
    shard = Shard(0, Layout(40))
    shard.set_block_map(BlockMap.initial(40, ("",)))
    shard.create_tables([TableSpec(name="t", rows=40, width=1, optimizer=Optimizer(kind="sgd"))])
    shard.begin(2, 1, 0)
    one = RowSet(0, np.zeros(1, np.uint32), np.zeros(1, np.uint16), np.ones(1, np.uint32))

    def weight() -> float:
        return float(shard.export_block(0)["t/weight"][0, 0])

    def push(sequence: int, generation: int, step: int) -> None:
        clock = Clock(generation, step)
        shard.push(PushRequest(1, sequence, [one], [np.ones((1, 1), np.float32)], [1.0], clock), None, 0.0)

    before = weight()
    push(1, 2, 1)
    push(1, 2, 1)
    push(2, 1, 2)
    assert weight() == pytest.approx(before - 1)
    failpoints.arm("ledger=skip")
    push(1, 2, 1)
    assert weight() == pytest.approx(before - 2)
    failpoints.arm("fence=skip")
    push(2, 1, 2)
    assert weight() == pytest.approx(before - 3)


def test_without_its_barrier_a_cut_shows_later_pushes() -> None:
    shard = Shard(0, Layout(40))
    shard.set_block_map(BlockMap.initial(40, ("",)))
    shard.create_tables([TableSpec(name="t", rows=40, width=1, optimizer=Optimizer(kind="sgd"))])
    one = RowSet(0, np.zeros(1, np.uint32), np.zeros(1, np.uint16), np.ones(1, np.uint32))
    for points, torn in (("", False), ("cut=skip", True)):
        failpoints.arm(points)
        before = shard.export_block(0)["t/weight"].tobytes()
        with shard.mark() as cut:
            shard.push(PushRequest(1, 1 + torn, [one], [np.ones((1, 1), np.float32)], [1.0]), None, 0.0)
            assert (cut.take(0)["t/weight"].tobytes() != before) == torn
