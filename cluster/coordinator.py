"""The coordinator of one run: a detached Ray actor that creates shards and ends everything when the driver is gone.

Detached, because an actor dies with the actor or driver that created it; in a namespace of its own per start of a run,
so that two runs on one cluster never meet. The driver's `poll` is its heartbeat.
"""

from __future__ import annotations

import os
import threading
from collections import deque
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import ray
from pydantic import SecretStr
from ray.exceptions import GetTimeoutError, RayActorError
from ray.util.placement_group import PlacementGroup, placement_group, remove_placement_group
from ray.util.scheduling_strategies import PlacementGroupSchedulingStrategy

from ..parameter_server.blocks import BlockMap
from .errors import RunFailed
from .shard_actor import ShardActor
from .watchdog import Watchdog

NAME = "coordinator"
BEAT_SECONDS = 2.0
MAX_RECORDS = 10_000  # reports kept for a driver that does not fetch them


@dataclass(frozen=True)
class ShardPlan:
    """The shards of a run: how many, what each asks of Ray, and how the store is laid out."""

    namespace: str
    shards: int
    cpus: float
    blocks: int
    seed: int
    loopback: bool
    start_timeout: float


@dataclass
class News:
    """What happened since the last poll. problem: why the run cannot go on."""

    records: list[dict[str, Any]] = field(default_factory=list)
    problem: str | None = None


class Coordinator:
    """Calls come on several threads (max_concurrency): every method is short, but `start`.

    token: of the shards' ports. An argument of the actor, so that it reaches shards and workers through Ray's own
    channel and stands in no file.
    """

    def __init__(self, driver_timeout: float, token: SecretStr) -> None:
        self._driver_timeout = driver_timeout
        self._token = token
        self._lock = threading.Lock()
        self._records: deque[dict[str, Any]] = deque(maxlen=MAX_RECORDS)
        self._problem: str | None = None
        self._stop = False
        self._ended = threading.Event()
        self._group: PlacementGroup | None = None
        self._shards: list[Any] = []
        self._watchdog = Watchdog(driver_timeout, self._driver_is_gone, name="driver-watchdog")

    def start(self, plan: ShardPlan) -> tuple[str, ...]:
        """Creates the shards, spread over the nodes, and gives them their blocks; returns their gRPC addresses.

        Raises:
            RunFailed: Ray cannot place or start them within `plan.start_timeout` seconds.
            TableError: more shards than the store's blocks can serve.
        """
        block_map = BlockMap.initial(plan.blocks, ("",) * plan.shards)
        self._group = placement_group(
            [{"CPU": plan.cpus}] * plan.shards, strategy="SPREAD", lifetime="detached", name=plan.namespace
        )
        if not self._group.wait(plan.start_timeout):
            raise RunFailed(
                f"cluster: {plan.shards} shards ask for {plan.cpus:g} CPUs each, and the cluster has "
                f"{_free('CPU')} CPUs free; after {plan.start_timeout:g} s they were still not there: lower "
                f"cluster.shards or cluster.shard_cpus, or raise cluster.start_timeout"
            )
        self._shards = [self._create(plan, number) for number in range(plan.shards)]
        try:
            addresses = tuple(ray.get([shard.address.remote() for shard in self._shards], timeout=plan.start_timeout))
        except GetTimeoutError:
            raise RunFailed(
                f"cluster: not every shard started within {plan.start_timeout:g} s; raise cluster.start_timeout"
            ) from None
        block_map = BlockMap(block_map.epoch, block_map.owners, addresses)
        ray.get([shard.set_block_map.remote(block_map) for shard in self._shards])
        threading.Thread(target=self._watch_shards, name="shard-watch", daemon=True).start()
        return addresses

    def token(self) -> SecretStr:
        """What the shards ask of every call."""
        return self._token

    def poll(self) -> News:
        """The driver's heartbeat; takes what was reported since the last one."""
        self._watchdog.beat()
        with self._lock:
            records = list(self._records)
            self._records.clear()
        return News(records, self._problem)

    def report(self, record: Mapping[str, Any]) -> None:
        """A record of a worker, for the driver."""
        with self._lock:
            self._records.append(dict(record))

    def request_stop(self) -> None:
        """Asks the workers to stop at the next step boundary."""
        self._stop = True

    def stop_requested(self) -> bool:
        return self._stop

    def end(self) -> None:
        """Ends the shards and gives back their place; the caller then ends this actor."""
        self._ended.set()
        self._watchdog.stop()
        for shard in self._shards:
            ray.kill(shard)
        if self._group is not None:
            remove_placement_group(self._group)

    def _create(self, plan: ShardPlan, number: int) -> Any:
        place = PlacementGroupSchedulingStrategy(self._group, placement_group_bundle_index=number)
        actor = ray.remote(ShardActor).options(
            name=shard_name(number), lifetime="detached", num_cpus=plan.cpus, max_restarts=0, scheduling_strategy=place
        )
        # Longer than the coordinator waits for the driver: only a coordinator that died itself is noticed here.
        orphan_timeout = 2 * self._driver_timeout + plan.start_timeout
        return actor.remote(
            number,
            plan.blocks,
            plan.seed,
            loopback=plan.loopback,
            orphan_timeout=orphan_timeout,
            token=self._token,
        )

    def _watch_shards(self) -> None:
        while not self._ended.wait(BEAT_SECONDS):
            calls = [shard.beat.remote() for shard in self._shards]
            for number, call in enumerate(calls):
                try:
                    ray.get(call, timeout=BEAT_SECONDS)
                except GetTimeoutError:
                    continue  # slow is not dead; pulls have their own deadline
                except RayActorError as error:
                    if not self._ended.is_set():
                        self._problem = f"shard {number} died: {' '.join(str(error).split())[:300]}"

    def _driver_is_gone(self) -> None:
        self.end()
        os._exit(0)


def shard_name(number: int) -> str:
    return f"shard-{number}"


def _free(resource: str) -> str:
    free = ray.available_resources().get(resource, 0.0)
    return f"{free:g} of {ray.cluster_resources().get(resource, 0.0):g}"
