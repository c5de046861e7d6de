"""One shard as every run has it: a Ray actor with a journal, on one node of the tests' cluster."""

from __future__ import annotations

import math
import os
from contextlib import suppress
from functools import cached_property
from pathlib import Path

import psutil
import ray
from embershard.cluster.shard_actor import ShardActor, Whereabouts
from pydantic import SecretStr
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

BLOCKS = 70
TOKEN = SecretStr("of-the-shards-of-the-scenarios")
START_SECONDS = 120.0
ORPHAN_SECONDS = 3600.0  # no coordinator beats here


class RayShard:
    """folder: of the journal; what is in it comes back. node: Ray's id of the node. memory_bytes: see `StoreConfig`.

    It starts while the caller goes on: who asks for its address or its process waits for it.
    """

    def __init__(self, number: int, folder: Path, node: str, memory_bytes: int | None = None) -> None:
        actor = ray.remote(ShardActor).options(
            num_cpus=0,
            max_restarts=0,
            max_concurrency=4,
            scheduling_strategy=NodeAffinitySchedulingStrategy(node, soft=False),
        )
        self._actor = actor.remote(
            number,
            BLOCKS,
            0,
            loopback=True,
            lease=math.inf,  # until the first grant
            orphan_timeout=ORPHAN_SECONDS,
            token=TOKEN,
            journal=str(folder),
            journal_bytes=1 << 30,
            memory_bytes=memory_bytes,
            fresh=False,
        )
        self._about = self._actor.whereabouts.remote(), self._actor.__ray_call__.remote(lambda _: os.getpid())

    @cached_property
    def _known(self) -> tuple[Whereabouts, int]:
        where, pid = ray.get(list(self._about), timeout=START_SECONDS)
        return where, pid

    @property
    def address(self) -> str:
        return self._known[0].address

    @property
    def recovered(self) -> bool:
        """Whether it had a journal."""
        return self._known[0].recovered

    @property
    def pid(self) -> int:
        return self._known[1]

    def alive(self) -> bool:
        return psutil.pid_exists(self.pid)

    def grant_lease(self, until: float) -> None:
        """The shard serves up to `until`, seconds of the clock that all processes of a machine share."""
        ray.get(self._actor.beat.remote(until), timeout=START_SECONDS)

    def wait(self, timeout: float = 30.0) -> None:
        """Until the process has ended."""
        with suppress(psutil.NoSuchProcess):
            psutil.Process(self.pid).wait(timeout)

    def kill(self) -> None:
        """As `kill -9`."""
        with suppress(psutil.NoSuchProcess):
            psutil.Process(self.pid).kill()
        self.wait()
