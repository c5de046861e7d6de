"""What the coordinator keeps and counts, and which failures are worth another try; without Ray's processes."""

from __future__ import annotations

import json
import pickle
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from embershard.cluster import restarts, run_state, shard_group
from embershard.cluster.coordinator import Coordinator
from embershard.cluster.errors import RunFailed, is_final
from embershard.cluster.rescale import RescaleError
from embershard.cluster.restarts import RestartPolicy
from embershard.cluster.run_folder import RunFolder, read_metrics, read_run
from embershard.cluster.run_state import Member, RunState, ShardPlan
from embershard.cluster.shard_actor import Pulse, Whereabouts
from embershard.cluster.shard_group import ShardGroup, _ending
from embershard.datasets.schema import DataError
from embershard.parameter_server.blocks import BlockMap
from embershard.parameter_server.local import LocalStore
from embershard.parameter_server.store import FencedError
from embershard.workers.embeddings.gradients import GradientError
from pydantic import SecretStr
from ray.exceptions import GetTimeoutError, RayActorError
from ray.train import WorkerGroupError
from ray.train.v2._internal.exceptions import WorkerGroupStartupFailedError, WorkerGroupStartupTimeoutError
from ray.train.v2._internal.execution.failure_handling import FailureDecision
from ray.train.v2.api.exceptions import ControllerError

PLAN = ShardPlan("space", 2, 0.25, 40, 7, True, 1.0, generation=5, max_restarts=3, journal="/j")


def make_state() -> RunState:
    members = [Member("aa", 0, "node-1"), Member("aa", 1, "node-2")]
    return RunState(PLAN, members, BlockMap.initial(40, ("x:1", "y:2")), PLAN.generation)


@pytest.fixture
def store(monkeypatch: pytest.MonkeyPatch) -> dict[bytes, bytes]:
    """Stands for Ray's key-value store."""
    kept: dict[bytes, bytes] = {}
    monkeypatch.setattr(run_state, "_internal_kv_put", lambda key, value, _, namespace: kept.update({key: value}))
    monkeypatch.setattr(run_state, "_internal_kv_get", lambda key, namespace: kept.get(key))
    monkeypatch.setattr(run_state, "_internal_kv_del", lambda key, namespace: kept.pop(key, None))
    return kept


class Group:
    """Shards that stand at `step` of `generation`."""

    generation, step = 5, 0

    def pulses(self) -> list[Pulse]:
        return [Pulse(0.0, self.generation, self.step, 1, False), Pulse(0.0, self.generation, self.step - 1, 1, False)]

    def addresses(self) -> tuple[str, ...]:
        return ("local:0", "local:1")


@pytest.fixture
def coordinator(store: dict[bytes, bytes]) -> Any:
    coordinator = Coordinator("space", 1e6, SecretStr("t" * 16))
    coordinator._state, coordinator._group = make_state(), Group()
    yield coordinator
    coordinator._watchdog.stop()


def test_state_survives(store: dict[bytes, bytes]) -> None:
    state = make_state()
    state.generation, state.restarts, state.broken, state.joined = 7, 2, "shard 1 died", True
    state.save()
    found = run_state.load("space")
    assert found is not None
    np.testing.assert_array_equal(found.block_map.owners, state.block_map.owners)
    assert found.block_map.owners.dtype == np.uint16
    found.block_map = state.block_map
    assert found == state
    assert run_state.load("another") is None
    run_state.forget("space")
    assert run_state.load("space") is None


def test_every_worker_group_gets_a_generation_of_its_own_and_hears_how_far_the_last_came(coordinator: Any) -> None:
    assert (coordinator.join(1).generation, coordinator.poll().restarts) == (5, 0)
    coordinator.report({"generation": 5, "step": 30})
    coordinator._group.step = 34
    second = coordinator.join(1)
    assert (second.generation, second.reached, second.addresses) == (6, 34, ("x:1", "y:2"))
    # It dies before it has told what it does again: the next one is told the same.
    assert (coordinator.join(1).generation, coordinator.join(1).reached) == (7, 34)
    coordinator.report({"generation": 8, "step": 20, "steps_redone": 14})
    coordinator.report({"generation": 8, "step": 25})
    assert coordinator.join(1).reached == 25
    coordinator.report({"generation": 9, "step": 20, "steps_redone": 5})
    news = coordinator.poll()
    assert (news.generation, news.restarts, news.steps_redone) == (9, 4, 19)


def test_a_record_of_an_older_generation_is_dropped(coordinator: Any) -> None:
    coordinator.join(1)
    coordinator.join(1)
    coordinator.report({"generation": 5, "step": 99})
    coordinator.report({"generation": 6, "step": 1})
    assert [record["step"] for record in coordinator.poll().records] == [1]
    assert coordinator.join(1).reached == 1


def test_what_was_decided_outlives_the_coordinator(coordinator: Any) -> None:
    coordinator.join(1)
    coordinator.request_stop()
    coordinator.join(1)
    found = run_state.load("space")
    assert found is not None and (found.generation, found.restarts, found.stop) == (6, 1, True)


def test_a_block_map_that_could_not_be_written_is_not_in_force(
    coordinator: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A move is cancelled then; announced all the same, its map would drop blocks from where they are."""

    def refuse(*_: object, **__: object) -> None:
        raise RuntimeError("the head does not answer")

    monkeypatch.setattr(run_state, "_internal_kv_put", refuse)
    before = coordinator.block_map()
    with pytest.raises(RuntimeError, match="the head"):
        coordinator._write(BlockMap(9, before.owners, before.addresses))
    assert coordinator.block_map() is before


def test_only_a_scaling_under_way_can_be_given_up(coordinator: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """Also while its shards start."""
    assert not coordinator.give_up_scaling()
    given_up: list[bool] = []
    group = coordinator._group
    monkeypatch.setattr(group, "grow", lambda shards: given_up.append(coordinator.give_up_scaling()), raising=False)
    monkeypatch.setattr(group, "announce", lambda block_map: None, raising=False)
    monkeypatch.setattr(coordinator, "_store", lambda: LocalStore(shards=2))
    with pytest.raises(RescaleError, match="given up"):
        coordinator.scale(1)
    assert given_up == [True] and not coordinator.give_up_scaling()


def test_a_coordinator_that_comes_back_takes_out_shards_that_had_not_joined(
    coordinator: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It died between writing a map with two more shards and telling anybody; the workers have gone on since."""
    state = make_state()
    owners, addresses = state.block_map.owners, state.block_map.addresses
    state.block_map = BlockMap(8, owners, (*addresses, "z:3", "z:4"))
    state.save()
    monkeypatch.setattr(Coordinator, "_repair", lambda self, work: None)
    monkeypatch.setattr(Coordinator, "_watch", lambda self: None)
    back = Coordinator("space", 1e6, SecretStr("t" * 16))
    back._watchdog.stop()
    assert (back.block_map().epoch, back.block_map().addresses) == (9, addresses), "for workers that ask at once"
    written: list[BlockMap] = []

    def announce(block_map: BlockMap) -> None:
        found = run_state.load("space")
        assert found is not None
        written.append(found.block_map)

    back._group = SimpleNamespace(  # type: ignore[assignment]
        take_up=lambda: None,
        addresses=lambda: (*addresses, "z:3", "z:4"),
        announce=announce,
        cancel_moves=lambda epoch: None,
    )
    back._take_up()
    assert [(block_map.epoch, block_map.addresses) for block_map in written] == [(9, addresses)], "written first"
    # Where every shard owns something nothing changes.
    state.block_map = BlockMap(8, owners, addresses)
    state.save()
    again = Coordinator("space", 1e6, SecretStr("t" * 16))
    again._watchdog.stop()
    assert again.block_map().epoch == 8


def test_shards_that_own_blocks_again_are_not_ended(coordinator: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """All shards began afresh after the last block had moved."""
    group = coordinator._group
    for name in ("grow", "announce", "shrink"):
        monkeypatch.setattr(group, name, lambda *_, name=name: done.append(name), raising=False)
    done: list[str] = []
    coordinator._state.save()
    monkeypatch.setattr(coordinator, "_store", lambda: LocalStore(shards=2))
    monkeypatch.setattr(coordinator, "_move_blocks", lambda *_: {"blocks_moved": 0, "seconds": 0.0})
    with pytest.raises(RunFailed, match="scale again"):
        coordinator.scale(1)
    assert done == ["grow", "announce"]


def test_no_restart_is_left_for_a_shard_whose_rows_are_lost(coordinator: Any) -> None:
    coordinator._state.restarts = PLAN.max_restarts
    coordinator._begin_afresh("shard 1 died: killed")
    assert coordinator.poll().problem == "shard 1 died: killed"


def test_which_shards_a_coordinator_takes_up(monkeypatch: pytest.MonkeyPatch) -> None:
    """One at its place, one that came back elsewhere, an empty one in the place of another, none, and one to join."""
    state = make_state()
    state.members = [Member("aa", bundle) for bundle in range(5)]
    state.block_map = BlockMap.initial(40, ("a:1", "b:1", "c:1", "d:1"))
    found = {
        "shard-0": Whereabouts("a:1", "node", 0.0, False),
        "shard-1": Whereabouts("b:2", "node", 0.0, True),
        "shard-2": Whereabouts("c:2", "node", 0.0, False),
        "shard-4": Whereabouts("e:1", "node", 0.0, False),
    }
    ended: list[Any] = []

    def get_actor(name: str, namespace: str) -> Any:
        if name not in found:
            raise ValueError(name)
        return SimpleNamespace(name=name, whereabouts=SimpleNamespace(remote=lambda: found[name]))

    monkeypatch.setattr(shard_group.ray, "get_actor", get_actor)
    monkeypatch.setattr(shard_group.ray, "get", lambda call, timeout: call)
    monkeypatch.setattr(shard_group, "end_actor", ended.append)
    monkeypatch.setattr(shard_group, "end_named", lambda *_, **__: None)
    group = ShardGroup(state, 1.0, SecretStr("t" * 16))
    group.take_up()
    assert group.addresses() == ("a:1", "b:2", "c:1", "d:1", "e:1")
    assert list(group.lost()) == [2, 3]
    assert [actor.name for actor in ended] == ["shard-2"]


@pytest.fixture
def places(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Ids of placement groups that are there: `aa` of the shards, `bb` of nobody, and another run's."""
    there = ["aa", "bb", "cc"]
    names = {"aa": "space-1", "bb": "space-2", "cc": "another-1"}
    named = [("space", "coordinator"), ("space", "shard-1"), ("space", "shard-2"), ("another", "shard-2")]
    listed = [{"namespace": namespace, "name": name} for namespace, name in named]

    def table() -> dict[str, dict[str, str]]:
        states = {number: "CREATED" if number in there else "REMOVED" for number in names}
        return {number: {"name": names[number], "state": states[number]} for number in names}

    monkeypatch.setattr(shard_group.ray.util, "list_named_actors", lambda all_namespaces: listed)
    monkeypatch.setattr(shard_group.ray.util, "placement_group_table", table)
    monkeypatch.setattr(shard_group, "_place", lambda group: group)
    monkeypatch.setattr(shard_group, "remove_placement_group", there.remove)
    return there


def test_what_a_coordinator_had_begun_is_taken_away_by_the_next(
    places: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """It died between making room for a shard that was to join and writing that down."""
    state, ended = make_state(), list[str]()

    def get_actor(name: str, namespace: str) -> Any:
        return SimpleNamespace(name=name, whereabouts=SimpleNamespace(remote=lambda: None))

    monkeypatch.setattr(shard_group.ray, "get_actor", get_actor)
    monkeypatch.setattr(shard_group.ray, "get", lambda call, timeout: Whereabouts("y:2", "node", 0.0, True))
    monkeypatch.setattr(shard_group, "end_actor", lambda actor: ended.append(actor.name))
    ShardGroup(state, 1.0, SecretStr("t" * 16)).take_up()
    assert (ended, places) == (["shard-2"], ["aa", "cc"])


def test_shards_that_leave_are_forgotten_before_they_end(
    places: list[str], store: dict[bytes, bytes], monkeypatch: pytest.MonkeyPatch
) -> None:
    """A coordinator that died in between would start them again, in a place that is gone."""
    state = make_state()
    state.members += [Member("bb", 0)]
    group = ShardGroup(state, 1.0, SecretStr("t" * 16))

    def kept(_: object) -> int:
        found = run_state.load("space")
        assert found is not None
        return len(found.members)

    forget = SimpleNamespace(remote=lambda: None)
    group._shards[2] = SimpleNamespace(actor=SimpleNamespace(forget=forget))  # type: ignore[call-overload]
    at_the_end: list[int] = []
    monkeypatch.setattr(shard_group.ray, "get", lambda call, timeout: None)
    monkeypatch.setattr(shard_group, "end_actor", lambda actor: at_the_end.append(kept(actor)))
    group.shrink(2)
    assert (at_the_end, places, len(group.addresses())) == ([2], ["aa", "cc"], 2)


def test_a_shard_that_nobody_knows_gives_up_its_name(monkeypatch: pytest.MonkeyPatch) -> None:
    """A coordinator began it, to join, and died before it had written that down."""
    state = make_state()
    leftover: list[Any] = [SimpleNamespace(name="shard-1")]
    ended: list[Any] = []

    class Actor:
        def options(self, **_: Any) -> Actor:
            return self

        def remote(self, *_: Any, **__: Any) -> str:
            if leftover:
                raise ValueError("the name is taken")
            return "new"

    def end(actor: Any) -> None:
        leftover.remove(actor)
        ended.append(actor.name)

    monkeypatch.setattr(shard_group.ray, "remote", lambda _: Actor())
    monkeypatch.setattr(shard_group.ray, "get_actor", lambda name, namespace: leftover[0])
    monkeypatch.setattr(shard_group, "_place", lambda _: None)
    monkeypatch.setattr(shard_group, "PlacementGroupSchedulingStrategy", lambda *_, **__: None)
    monkeypatch.setattr(shard_group, "end_actor", end)
    group = ShardGroup(state, 1.0, SecretStr("t" * 16))
    assert group._create(1, fresh=True) == "new"
    assert ended == ["shard-1"]


def test_a_shard_whose_machine_is_gone_waits_for_room_once_and_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    """Others wait meanwhile; the second wait is for all shards, which begin afresh."""
    waits: list[float] = []

    def get(call: object, timeout: float) -> None:
        waits.append(timeout)
        raise GetTimeoutError("not yet")

    monkeypatch.setattr(shard_group.ray, "get", get)
    monkeypatch.setattr(shard_group.ray, "wait", lambda calls, timeout: (calls if calls == ["0"] else [], []))
    monkeypatch.setattr(shard_group, "_free", lambda resource: "0.5 of 2")
    monkeypatch.setattr(shard_group, "end_actor", lambda actor: None)
    group = ShardGroup(make_state(), 1.0, SecretStr("t" * 16))
    actors = [SimpleNamespace(whereabouts=SimpleNamespace(remote=lambda number=n: str(number))) for n in range(2)]
    monkeypatch.setattr(group, "_create", lambda number, fresh: actors[number])
    assert "not yet" in str(group.replace(1))
    assert waits == [PLAN.start_timeout]
    with pytest.raises(RunFailed, match=r"shard 1 did not start within 1 s; .* has 0.5 of 2 CPUs free: make room"):
        group.replace_all()


def test_how_a_shard_ended_in_few_words() -> None:
    """As Ray 2.60 words it."""
    told = "pid: 7\nThe actor is dead because its worker process has died. Worker exit type: SYSTEM_ERROR detail: ..."
    assert _ending(RayActorError(None, told)) == "its worker process has died"
    assert _ending(RayActorError(None, "gone.")) == "RayActorError: gone"


def failed(*causes: Exception) -> WorkerGroupError:
    return WorkerGroupError("failed", dict(enumerate(causes)))


def test_failures_that_would_come_again_end_the_run() -> None:
    policy = RestartPolicy(2, 2, "space")
    for cause in (DataError("column c1 is missing"), GradientError("step 3: NaN")):
        assert is_final(cause)
        assert policy.make_decision(failed(ConnectionError("peer closed"), cause)) is FailureDecision.RAISE
    no_room = ControllerError(WorkerGroupStartupTimeoutError(2))
    assert policy.make_decision(no_room) is FailureDecision.RAISE


def test_others_are_tried_again_as_often_as_asked_for(monkeypatch: pytest.MonkeyPatch) -> None:
    told: list[Any] = []
    monkeypatch.setattr(restarts, "_ask_once", lambda *asked: told.append(asked))
    policy = pickle.loads(pickle.dumps(RestartPolicy(2, 2, "space")))  # it goes to Ray Train's controller
    assert policy.make_decision(failed(FencedError("generation 1 is over"))) is FailureDecision.RETRY
    died = ControllerError(WorkerGroupStartupFailedError("a worker died"))
    assert policy.make_decision(died) is FailureDecision.RETRY
    assert policy.make_decision(failed(RuntimeError("killed"))) is FailureDecision.RAISE
    first = "the workers stopped: generation 1 is over; they begin again, 1 more times at most"
    assert told[0] == ("space", "report", {"note": first})
    assert len(told) == 2 and "a worker died" in told[1][2]["note"]


def test_the_folder_of_a_run_that_goes_back(tmp_path: Path) -> None:
    """metrics.jsonl keeps everything; TensorBoard forgets the steps that are done again."""
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    folder = RunFolder.open(tmp_path / "run", resume=False)
    for step in (10, 20, 30):
        folder.record({"generation": 1, "step": step, "loss": 1.0})
    folder.begin_generation(2)
    folder.record({"generation": 2, "step": 10, "steps_redone": 23})
    folder.record({"generation": 2, "step": 20, "loss": 0.5})
    folder.close("finished")
    assert read_run(tmp_path / "run")["generation"] == 2
    records = [(m["generation"], m["step"]) for m in read_metrics(tmp_path / "run")]
    assert records == [(1, 10), (1, 20), (1, 30), (2, 10), (2, 20)]
    events = EventAccumulator(str(tmp_path / "run" / "tb")).Reload()
    assert [(e.step, e.value) for e in events.Scalars("loss")] == [(10, 1.0), (20, 0.5)]
    assert "generation" not in events.Tags()["scalars"]
    assert json.loads((tmp_path / "run" / "run.json").read_text())["generation"] == 2
