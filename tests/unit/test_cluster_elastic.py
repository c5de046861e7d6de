"""How many workers a group has, when that changes, and what a change counts as; without Ray's processes."""

from __future__ import annotations

import pickle
from types import SimpleNamespace
from typing import Any

import pytest
from embershard.cluster import restarts
from embershard.cluster.config import RunConfig
from embershard.cluster.elastic import WorkerCount, room
from embershard.cluster.errors import ConfigError, Resized
from embershard.cluster.generations import Generations
from embershard.cluster.restarts import ElasticWorkers, RestartPolicy
from embershard.cluster.run_state import RunState, ShardPlan
from embershard.parameter_server.blocks import BlockMap
from ray.exceptions import RayActorError
from ray.train import ScalingConfig, WorkerGroupError
from ray.train.v2._internal.exceptions import WorkerGroupStartupTimeoutError
from ray.train.v2._internal.execution.failure_handling import FailureDecision
from ray.train.v2._internal.execution.scaling_policy import NoopDecision
from ray.train.v2.api.exceptions import ControllerError

HALF = {"CPU": 0.5}


def test_room_is_counted_node_by_node() -> None:
    free = {"a": {"CPU": 1.4}, "b": {"CPU": 0.4}, "c": {"GPU": 4.0}}
    assert room(free, {}, HALF, 9) == 2  # 1.8 CPUs are free, but no third worker fits on one node
    assert room(free, {"b": 1, "c": 2}, HALF, 9) == 5
    assert room(free, {"b": 1, "c": 2}, HALF, 3) == 3
    assert room(free, {"gone": 2}, HALF, 9) == 2
    assert room({"a": {"CPU": 3.0, "GPU": 1.0}}, {}, {"CPU": 1.0, "GPU": 1.0}, 9) == 1
    assert room({"a": {"CPU": 0.3 - 0.1 - 0.1}}, {}, {"CPU": 0.1}, 9) == 1  # not 0.999... of one
    assert room({}, {}, {"CPU": 0.0}, 9) == 9


def test_a_group_begins_with_as_many_as_there_is_room_for() -> None:
    for fits, wanted, number in [(3, None, 3), (9, None, 4), (0, None, 2), (9, 3, 3), (2, 3, 2), (9, 99, 4)]:
        assert WorkerCount(2, 4).begin(fits, wanted) == number


def test_a_group_that_could_not_begin_begins_with_the_least() -> None:
    """What the cluster said of its room was old: a node had gone."""
    count = WorkerCount(1, 4)
    assert [count.begin(4, None), count.begin(4, None)] == [4, 1]
    count.runs()
    assert count.begin(4, None) == 4


def test_a_change_takes_two_looks_that_agree() -> None:
    count = WorkerCount(1, 4)
    assert [count.look(2, fits, None) for fits in (2, 3, 4, 4)] == [None, None, None, 4]
    assert [count.look(2, 1, None), count.look(2, 1, None)] == [None, None], "a lost node fails by itself"
    assert [count.look(3, 3, 1), count.look(3, 3, 1)] == [None, 1], "asked for"
    count.look(1, 4, None)
    count.begin(2, None)
    assert [count.look(2, 4, None), count.look(2, 4, None)] == [None, 4], "looks before a new group do not count"


class Cluster:
    """Room on two nodes, and a coordinator that may be away."""

    def __init__(self) -> None:
        self.free = {"a": {"CPU": 0.5}, "b": {"CPU": 0.0}}
        self.asked: list[Any] = []
        self.away = False
        self.wanted: int | None = None

    def ask(self, method: str, *arguments: Any) -> Any:
        if self.away:
            raise RayActorError
        self.asked += [(method, *arguments)] if arguments else []
        return {"workers": 1, "wanted": self.wanted} if method == "workers" else None


@pytest.fixture
def cluster(monkeypatch: pytest.MonkeyPatch) -> Cluster:
    found = Cluster()

    class Coordinator:
        def __getattr__(self, method: str) -> Any:
            return SimpleNamespace(remote=lambda *arguments: (method, *arguments))

    monkeypatch.setattr(restarts.ray, "get_actor", lambda name, namespace: Coordinator())
    monkeypatch.setattr(restarts.ray, "get", lambda call, timeout: found.ask(*call))
    monkeypatch.setattr(restarts.ray._private.state, "available_resources_per_node", lambda: found.free)
    monkeypatch.setattr(restarts, "LOOK_SECONDS", 0.0)
    return found


def running(*nodes: str) -> Any:
    return SimpleNamespace(workers=[SimpleNamespace(metadata=SimpleNamespace(node_id=node)) for node in nodes])


def test_workers_as_ray_train_asks_for_them(cluster: Cluster) -> None:
    scaling = ScalingConfig(num_workers=(1, 3), resources_per_worker=HALF)
    policy = pickle.loads(pickle.dumps(ElasticWorkers(scaling, "space")))  # it goes to Ray Train's controller
    decision = policy.make_decision_for_non_running_worker_group()
    assert (decision.num_workers, decision.resources_per_worker) == (1, HALF)
    cluster.free["a"]["CPU"] = 0.0  # what the group holds
    for _ in range(3):
        assert isinstance(policy.make_decision_for_running_worker_group(running("a"), None), NoopDecision)
    assert cluster.asked == []
    cluster.free["b"]["CPU"] = 1.0  # a node has come
    cluster.away = True
    for _ in range(2):
        policy.make_decision_for_running_worker_group(running("a"), None)
    assert cluster.asked == []
    cluster.away = False
    policy.make_decision_for_running_worker_group(running("a"), None)
    assert cluster.asked == [("rest", 3)]
    # The group that has come to rest still holds its place when the number of the next one is decided.
    assert policy.make_decision_for_non_running_worker_group().num_workers == 3
    policy.before_controller_execute_resize_decision(decision)
    policy.make_decision_for_running_worker_group(running("a", "b", "b"), None)
    del cluster.free["b"]  # and goes again
    assert policy.make_decision_for_non_running_worker_group().num_workers == 1
    policy.make_decision_for_running_worker_group(running("a"), None)
    policy.before_controller_execute_resize_decision(decision)
    cluster.free["b"] = {"CPU": 1.0}  # and comes again; the group has been ended meanwhile, and another has its place
    assert policy.make_decision_for_non_running_worker_group().num_workers == 2
    policy.make_decision_for_running_worker_group(running("a"), None)
    cluster.wanted = 1
    assert policy.make_decision_for_non_running_worker_group().num_workers == 1
    policy.make_decision_for_running_worker_group(running("a"), None)
    cluster.away = True
    assert policy.make_decision_for_non_running_worker_group().num_workers == 1, "as was last heard"


def test_a_planned_change_is_no_failure() -> None:
    policy = RestartPolicy(0, 2, "space")
    resized = WorkerGroupError("failed", {0: ConnectionError("peer closed"), 1: Resized("2 workers")})
    assert policy.make_decision(resized) is FailureDecision.RETRY
    for workers, decision in ((3, FailureDecision.RETRY), (2, FailureDecision.RAISE)):
        assert policy.make_decision(ControllerError(WorkerGroupStartupTimeoutError(workers))) is decision


@pytest.fixture
def generations(monkeypatch: pytest.MonkeyPatch) -> Generations:
    monkeypatch.setattr(RunState, "save", lambda self: None)
    plan = ShardPlan("space", 2, 0.25, 40, 7, True, 1.0, generation=5)
    return Generations(RunState(plan, [], BlockMap.initial(40, ("x:1", "y:2")), plan.generation))


def counts(generations: Generations) -> tuple[int, int, int]:
    state = generations._running()
    return state.generation, state.restarts, state.resizes


def test_a_group_that_came_to_rest_was_resized_and_any_other_restarted(generations: Generations) -> None:
    generations._next_generation(1)
    generations.rest(2)
    generations.rest(2)
    assert generations.stop_requested()
    assert [record["note"] for record in generations._records] == ["from 1 to 2 workers at the next step boundary"]
    assert not generations.at_rest(4), "of an older generation"
    assert generations.at_rest(5) and generations.at_rest(5), "asked again by one that did not hear the answer"
    generations._next_generation(2)
    assert (counts(generations), generations.stop_requested()) == ((6, 0, 1), False)
    assert generations.workers() == {"workers": 2, "wanted": None}
    generations.rest(3)  # and dies before it has come to rest
    generations._next_generation(2)
    assert (counts(generations), generations.stop_requested()) == ((7, 1, 1), False)


def test_a_stop_goes_before_a_change(generations: Generations) -> None:
    generations._next_generation(1)
    generations.rest(2)
    generations.request_stop()
    assert not generations.at_rest(5)
    generations.rest(2)
    assert generations.stop_requested()


def test_the_setting() -> None:
    cluster = RunConfig.load(None, "cluster.workers=[1, 4]").cluster
    assert (cluster.least_workers, cluster.most_workers) == (1, 4)
    cluster = RunConfig.load(None, "cluster.workers=3").cluster
    assert (cluster.workers, cluster.least_workers, cluster.most_workers) == (3, 3, 3)
    for wrong in ("0", "[4, 1]", "[1, 2, 3]", "[0, 2]", "two", "true", "[1.5, 2]", "5000"):
        with pytest.raises(ConfigError, match=r"cluster.workers: expected a number from 1 to 4096, or two, \[least"):
            RunConfig.load(None, f"cluster.workers={wrong}")
    with pytest.raises(ConfigError, match=r"data.batch_size: 8 rows cannot be divided over 9 workers"):
        RunConfig.load(None, "cluster.workers=[1, 9]", "data.batch_size=8")


def test_a_range_survives_the_run_folder(tmp_path: Any, recwarn: pytest.WarningsRecorder) -> None:
    file = tmp_path / "config.yaml"
    file.write_text(RunConfig.load(None, "cluster.workers=[1, 4]").to_yaml())
    assert RunConfig.load(file).cluster.workers == (1, 4)
    assert not recwarn.list
