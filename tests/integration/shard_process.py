"""One shard with a journal, in a process that a test may kill; forked from one that has imported everything."""

from __future__ import annotations

import multiprocessing
import os
import time
from multiprocessing.connection import Connection
from pathlib import Path

from embershard.parameter_server import failpoints, kernels
from embershard.parameter_server.blocks import BlockMap
from embershard.parameter_server.recovery import open_shard
from embershard.parameter_server.server import ShardServer

BLOCKS = 40
_context = multiprocessing.get_context("forkserver")
_context.set_forkserver_preload(["embershard.parameter_server.recovery", "embershard.parameter_server.server"])


def _serve(
    folder: str | None, points: str, journal_bytes: int, number: int, alone: bool, lease: float, pipe: Connection
) -> None:
    os.environ[failpoints.VARIABLE] = points
    failpoints.arm(points)
    kernels.warm_up()
    shard, recovery = open_shard(number, BLOCKS, 0, journal=folder, journal_bytes=journal_bytes)
    if lease:
        shard.lease.grant(time.monotonic() + lease)
    address = ShardServer(shard).start()
    if recovery is None and alone:
        shard.set_block_map(BlockMap.initial(BLOCKS, (address,)))
    pipe.send((address, None if recovery is None else recovery.as_dict()))
    pipe.recv()


class ShardProcess:
    """recovery: what the shard reported when it came back, None if it is new.

    alone: it is the only shard, and owns every block from the beginning. lease: seconds that it serves, 0: for ever.
    """

    def __init__(
        self,
        folder: Path | None,
        points: str = "",
        journal_bytes: int = 1 << 30,
        *,
        number: int = 0,
        alone: bool = True,
        lease: float = 0.0,
    ) -> None:
        self._pipe, theirs = _context.Pipe()
        path = None if folder is None else str(folder)
        arguments = (path, points, journal_bytes, number, alone, lease, theirs)
        self._process = _context.Process(target=_serve, args=arguments, daemon=True)
        self._process.start()
        theirs.close()
        self.address, self.recovery = self._pipe.recv()

    @property
    def pid(self) -> int:
        assert self._process.pid is not None
        return self._process.pid

    def wait(self, timeout: float = 30.0) -> int | None:
        """Until the process has ended; its exit code, None if it lives on."""
        self._process.join(timeout)
        return self._process.exitcode

    def kill(self) -> None:
        """As `kill -9`."""
        self._process.kill()
        self._process.join()
