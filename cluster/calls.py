"""Calls to the coordinator, which may die and come back between two of them."""

from __future__ import annotations

import time
from typing import Any

import ray
from ray.exceptions import GetTimeoutError, RayActorError

from .errors import RunFailed, one_line

CONTROL_SECONDS = 60.0  # longer than a coordinator needs to come back
RETRY_SECONDS = 0.2


def ask(coordinator: Any, method: str, *arguments: Any, within: float = CONTROL_SECONDS) -> Any:
    """What the coordinator's method returns; asked again while the coordinator is restarting.

    Raises:
        RunFailed: no answer within `within` seconds. And whatever the method raises.
    """
    deadline = time.monotonic() + within
    while True:
        try:
            call = getattr(coordinator, method).remote(*arguments)
            return ray.get(call, timeout=max(0.1, deadline - time.monotonic()))
        except (RayActorError, GetTimeoutError) as error:
            if time.monotonic() + RETRY_SECONDS > deadline:
                raise RunFailed(
                    f"the coordinator did not answer {method!r} within {within:g} s: {one_line(error)}"
                ) from error
        time.sleep(RETRY_SECONDS)
