"""A shard as a Ray actor: Ray's calls carry control, gRPC carries rows."""

from __future__ import annotations

import os
import shutil
import time
from typing import NamedTuple

import ray
from pydantic import SecretStr

from ..parameter_server import kernels
from ..parameter_server.allocator import keep_freed_memory
from ..parameter_server.blocks import BlockMap
from ..parameter_server.recovery import open_shard
from ..parameter_server.server import ShardServer
from .migration import described
from .watchdog import Watchdog


class Whereabouts(NamedTuple):
    """host:port of the gRPC server, Ray's id of the node, the process's monotonic clock; whether it had a journal."""

    address: str
    node: str
    now: float
    recovered: bool


class Pulse(NamedTuple):
    """The process's monotonic clock; generation that runs, if any, and last complete step; epoch of the block map.

    moving: blocks are on their way to or from the shard, as far as it knows.
    """

    now: float
    generation: int | None
    step: int
    epoch: int
    moving: bool


class ShardActor:
    """Serves one shard from the moment it is created.

    loopback: listen on 127.0.0.1 alone, where every worker is on this machine. lease: seconds that it serves before
    the first `beat`. orphan_timeout: seconds without a `beat` of the coordinator after which the process ends itself,
    so that nothing stays behind whoever died. token: what every call must show. journal: the shard's own folder on
    this machine; with `fresh` what is in it is thrown away, otherwise the shard begins as the journal left it.

    Raises:
        JournalError: another process has the journal, or it is damaged.
    """

    def __init__(
        self,
        number: int,
        blocks: int,
        seed: int,
        *,
        loopback: bool,
        lease: float,
        orphan_timeout: float,
        token: SecretStr,
        journal: str | None,
        journal_bytes: int,
        memory_bytes: int | None,
        fresh: bool,
    ) -> None:
        keep_freed_memory()
        kernels.warm_up()
        host = "127.0.0.1" if loopback else ray.util.get_node_ip_address()
        self._journal = journal
        if fresh:
            self.forget()
        shard, recovery = open_shard(
            number, blocks, seed, journal=journal, journal_bytes=journal_bytes, memory_bytes=memory_bytes
        )
        self._recovered = recovery is not None
        shard.lease.grant(time.monotonic() + lease)
        self._server = ShardServer(shard, host, token=token)
        self._server.start()
        self._watchdog = Watchdog(orphan_timeout, lambda: os._exit(1), name="orphan-watchdog")

    def whereabouts(self) -> Whereabouts:
        node = ray.get_runtime_context().get_node_id()
        return Whereabouts(self._server.address, node, time.monotonic(), self._recovered)

    def set_block_map(self, block_map: BlockMap) -> None:
        self._server.call("set_block_map", described(block_map))

    def cancel_moves(self, epoch: int) -> None:
        """No move of blocks is under way any more, whatever this shard may remember; epoch: of the map in force.

        Raises:
            BusyError: the shard has another map, so that it cannot tell what is its own.
        """
        self._server.call("cancel_moves", {"epoch": epoch})

    def forget(self) -> None:
        """Throws the journal away: nobody will come back to what it holds."""
        if self._journal is not None:
            shutil.rmtree(self._journal, ignore_errors=True)

    def beat(self, lease_until: float) -> Pulse:
        """The coordinator lives, and lets the shard serve up to `lease_until` of this process's monotonic clock."""
        self._watchdog.beat()
        shard = self._server.shard
        shard.lease.grant(lease_until)
        return Pulse(time.monotonic(), shard.clocks.generation, shard.clocks.step, shard.block_map.epoch, shard.moving)
