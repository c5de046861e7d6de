"""What we decide instead of Ray Train: how many workers there are, and which failures end a run."""

from __future__ import annotations

import time
from collections import Counter
from contextlib import suppress
from typing import Any

import ray
from ray.exceptions import RayError
from ray.train import FailureConfig, ScalingConfig
from ray.train.v2._internal.execution.failure_handling import FailureDecision, FailurePolicy
from ray.train.v2._internal.execution.scaling_policy import NoopDecision, ResizeDecision
from ray.train.v2._internal.execution.scaling_policy.fixed import FixedScalingPolicy

from .elastic import WorkerCount, room
from .errors import Resized, is_final, one_line, root_cause
from .shard_group import NAME

LOOK_SECONDS = 10.0  # between two looks at what the cluster has room for
ANSWER_SECONDS = 5.0  # for the coordinator, which may be restarting: it is asked again at the next look


class FixedWorkers(FixedScalingPolicy):  # type: ignore[misc]  # Ray has no types
    """As many workers as configured. Their placement group is the only request for room.

    Ray's own policy also registers with an actor that divides a cluster between Ray Train and Ray Data: one more
    process in every start.
    """

    def after_controller_start(self, train_run_context: object) -> None: ...

    def _maybe_send_resource_request(self) -> None: ...


class ElasticWorkers(FixedWorkers):
    """As many workers as there is room for, in the range of `scaling`.

    A change is a request to the coordinator: the group comes to rest at a step boundary, writes a checkpoint and raises
    Resized; the number is decided when the next one begins. Ray's own policy would end the group where it stands, and
    counts room that its other actor has promised it. Runs in Ray Train's controller.
    """

    def __init__(self, scaling: ScalingConfig, namespace: str) -> None:
        super().__init__(scaling)
        self._namespace = namespace
        self._count = WorkerCount(scaling.min_workers, scaling.max_workers)
        self._held: Counter[str] = Counter()
        self._looked = float("-inf")
        self._wished: int | None = None

    def make_decision_for_non_running_worker_group(self) -> ResizeDecision:
        number = self._count.begin(self._room(), self._wanted())
        return ResizeDecision(num_workers=number, resources_per_worker=self._per_worker)

    def before_controller_execute_resize_decision(self, decision: ResizeDecision) -> None:
        self._held.clear()  # what the last group held is free from here on

    def make_decision_for_running_worker_group(
        self, worker_group_state: Any, worker_group_status: object
    ) -> NoopDecision:
        self._count.runs()
        self._held = Counter(worker.metadata.node_id for worker in worker_group_state.workers)
        if time.monotonic() >= self._looked + LOOK_SECONDS:
            self._looked = time.monotonic()
            number = self._count.look(self._held.total(), self._room(), self._wanted())
            if number is not None:
                _ask_once(self._namespace, "rest", number)
        return NoopDecision()

    @property
    def _per_worker(self) -> dict[str, float]:
        asked: dict[str, float] = self.scaling_config._resources_per_worker_not_none
        return asked

    def _room(self) -> int:
        free = ray._private.state.available_resources_per_node()
        return room(free, self._held, self._per_worker, self._count.most)

    def _wanted(self) -> int | None:
        if (workers := _ask_once(self._namespace, "workers")) is not None:
            self._wished = workers["wanted"]
        return self._wished


class RestartPolicy(FailurePolicy):  # type: ignore[misc]  # Ray has no types
    """Starts the group again up to `limit` times, unless the cause would be the same the next time.

    A group that came to rest for another number of workers has not failed; neither has one of more than `least` for
    which there was no room after all. Ray's own policy would train a file with a broken row over and over. Runs in Ray
    Train's controller. namespace: of the coordinator, through which the user learns why.
    """

    def __init__(self, limit: int, least: int, namespace: str) -> None:
        super().__init__(FailureConfig(max_failures=limit))
        self._namespace = namespace
        self._left = limit
        self._least = least

    def make_decision(self, training_failed_error: BaseException) -> FailureDecision:
        cause = root_cause(training_failed_error)
        if isinstance(cause, Resized) or lacks_room(training_failed_error, beyond=self._least):
            return FailureDecision.RETRY
        if self._left == 0 or lacks_room(training_failed_error) or is_final(cause):
            return FailureDecision.RAISE
        self._left -= 1
        again = f"they begin again, {self._left} more times at most"
        _ask_once(self._namespace, "report", {"note": f"the workers stopped: {one_line(cause)}; {again}"})
        return FailureDecision.RETRY


def _ask_once(namespace: str, method: str, *arguments: Any) -> Any:
    """What the coordinator answers; None when it does not."""
    with suppress(RayError, ValueError):  # ValueError: its name is not there while Ray starts it again
        call = getattr(ray.get_actor(NAME, namespace=namespace), method).remote(*arguments)
        return ray.get(call, timeout=ANSWER_SECONDS)
    return None


def lacks_room(error: BaseException, *, beyond: int = 0) -> bool:
    """Whether a group of more than `beyond` workers could not be placed."""
    failure = getattr(error, "controller_failure", error)
    timed_out = type(failure).__name__ in {"WorkerGroupStartupTimeoutError", "InsufficientClusterResourcesError"}
    return timed_out and getattr(failure, "num_workers", 1) > beyond
