"""A shard as a Ray actor: Ray's calls carry control, gRPC carries rows."""

from __future__ import annotations

import os

import ray
from pydantic import SecretStr

from ..parameter_server import kernels
from ..parameter_server.allocator import keep_freed_memory
from ..parameter_server.blocks import BlockMap
from ..parameter_server.server import ShardServer
from ..parameter_server.shard import Shard
from ..parameter_server.tables import Layout
from .watchdog import Watchdog


class ShardActor:
    """Serves one shard from the moment it is created.

    loopback: listen on 127.0.0.1 alone, where every worker is on this machine. orphan_timeout: seconds without a
    `beat` of the coordinator after which the process ends itself, so that nothing stays behind whoever died. token:
    what every call must show.
    """

    def __init__(
        self, number: int, blocks: int, seed: int, *, loopback: bool, orphan_timeout: float, token: SecretStr
    ) -> None:
        keep_freed_memory()
        kernels.warm_up()
        host = "127.0.0.1" if loopback else ray.util.get_node_ip_address()
        self._server = ShardServer(Shard(number, Layout(blocks, seed)), host, token=token)
        self._server.start()
        self._watchdog = Watchdog(orphan_timeout, lambda: os._exit(1), name="orphan-watchdog")

    def address(self) -> str:
        """host:port of the gRPC server."""
        return self._server.address

    def set_block_map(self, block_map: BlockMap) -> None:
        self._server.shard.set_block_map(block_map)

    def beat(self) -> None:
        self._watchdog.beat()
