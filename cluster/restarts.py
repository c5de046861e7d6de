"""What we decide instead of Ray Train: how many workers there are, and which failures end a run."""

from __future__ import annotations

from ray.train import FailureConfig
from ray.train.v2._internal.execution.failure_handling import FailureDecision, FailurePolicy
from ray.train.v2._internal.execution.scaling_policy.fixed import FixedScalingPolicy

from .errors import is_final, root_cause


class FixedWorkers(FixedScalingPolicy):  # type: ignore[misc]  # Ray has no types
    """As many workers as configured. Their placement group is the only request for room.

    Ray's own policy also registers with an actor that divides a cluster between Ray Train and Ray Data: one more
    process in every start.
    """

    def after_controller_start(self, train_run_context: object) -> None: ...

    def _maybe_send_resource_request(self) -> None: ...


class RestartPolicy(FailurePolicy):  # type: ignore[misc]  # Ray has no types
    """Starts the group again up to `limit` times, unless the cause would be the same the next time.

    Ray's own policy would train a file with a broken row over and over. Runs in Ray Train's controller.
    """

    def __init__(self, limit: int) -> None:
        super().__init__(FailureConfig(max_failures=limit))
        self._left = limit

    def make_decision(self, training_failed_error: BaseException) -> FailureDecision:
        if self._left == 0 or lacks_room(training_failed_error) or is_final(root_cause(training_failed_error)):
            return FailureDecision.RAISE
        self._left -= 1
        return FailureDecision.RETRY


def lacks_room(error: BaseException) -> bool:
    """Whether the group could not be placed."""
    failure = getattr(error, "controller_failure", error)
    return type(failure).__name__ in {"WorkerGroupStartupTimeoutError", "InsufficientClusterResourcesError"}
