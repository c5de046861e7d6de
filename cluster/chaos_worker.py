"""A `Pusher` of a chaos run, in a process of its own, which imports little, so that it is soon there."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import ray
from pydantic import SecretStr
from ray.exceptions import RayError

from ..parameter_server.blocks import BlockMap
from ..parameter_server.client import StoreClient
from .calls import ask
from .chaos_history import Recorder, Workload
from .chaos_pusher import Pusher
from .shard_group import NAME

CALL_SECONDS = 180.0  # for one pull or push, whatever happens to its shard meanwhile


class ChaosWorker:
    """In generation 1; see `Pusher`."""

    def __init__(
        self, namespace: str, token: SecretStr, workload: Workload, history: str, *, client: int, workers: int
    ) -> None:
        store = connect(ray.get_actor(NAME, namespace=namespace), token)
        self._pusher = Pusher(store, workload, Recorder(Path(history)), client=client, workers=workers, generation=1)

    def run(self, first: int, steps: int, sync: bool) -> None:
        self._pusher.run(first, steps, sync=sync)


def connect(coordinator: Any, token: SecretStr) -> StoreClient:
    """The store of a run, which asks the coordinator for the block map while a shard is away."""

    def find_map() -> BlockMap | None:
        if not ray.is_initialized():  # the run has ended; asking would start another Ray
            return None
        try:
            block_map: BlockMap = ray.get(coordinator.block_map.remote(), timeout=5.0)
        except RayError:
            return None
        return block_map

    addresses = ask(coordinator, "block_map").addresses
    return StoreClient.connect(addresses, timeout=CALL_SECONDS, token=token, find_map=find_map)
