"""Joining a Ray cluster, or starting a local one, without Ray's chatter over the progress line."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import ray

from .errors import RunFailed

# The object store carries control messages only; Ray's default is 30 % of the machine's memory.
LOCAL_OBJECT_STORE_BYTES = 128 << 20

_QUIET = {
    "RAY_TRAIN_ENABLE_PRINT_PATCH": "0",
    "RAY_TRAIN_ENABLE_PREEMPTION_WATCHER": "0",  # an actor of its own that we have no use for
    "RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO": "0",  # silences a warning about processes without GPUs
    "RAY_USAGE_STATS_ENABLED": "0",
    "RAY_DEDUP_LOGS": "0",
}


@contextmanager
def ray_session(address: str | None, namespace: str, start_timeout: float) -> Iterator[str]:
    """Joins the cluster at `address` (auto or host:port), or starts a local one for None.

    Yields the cluster's address. What was started here ends here; a session that the caller began before is used as it
    is and stays.

    Raises:
        RunFailed: no cluster answers at `address`.
    """
    for name, value in _QUIET.items():
        os.environ.setdefault(name, value)
    os.environ["RAY_TRAIN_WORKER_GROUP_START_TIMEOUT_S"] = str(start_timeout)
    if ray.is_initialized():
        yield ray.get_runtime_context().gcs_address
        return
    options: dict[str, Any] = {"namespace": namespace, "log_to_driver": False, "logging_level": "ERROR"}
    if address is None:
        # Explicitly local: RAY_ADDRESS may point elsewhere.
        options |= {"address": "local", "include_dashboard": False, "object_store_memory": LOCAL_OBJECT_STORE_BYTES}
    else:
        options |= {"address": address}
    try:
        ray.init(**options)
    except (ConnectionError, ValueError, RuntimeError) as error:
        if address is None:
            raise RunFailed(f"Ray did not start on this machine: {error}") from error
        raise RunFailed(
            f"cluster.address: no Ray cluster answers at {address!r}; start one with `ray start --head`, "
            f"set RAY_AUTH_MODE=token if it asks for a token, or leave cluster.address out to use this machine"
        ) from error
    try:
        yield ray.get_runtime_context().gcs_address
    finally:
        ray.shutdown()
