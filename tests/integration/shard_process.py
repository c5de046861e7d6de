"""One shard with a journal, in a process that a test may kill; forked from one that has imported everything."""

from __future__ import annotations

import multiprocessing
import os
from contextlib import suppress
from multiprocessing.connection import Connection
from pathlib import Path

from embershard.parameter_server import failpoints, kernels
from embershard.parameter_server.blocks import BlockMap
from embershard.parameter_server.recovery import open_shard
from embershard.parameter_server.server import ShardServer

BLOCKS = 70
_context = multiprocessing.get_context("forkserver")
_context.set_forkserver_preload(["embershard.parameter_server.recovery", "embershard.parameter_server.server"])


def _serve(
    folder: str | None, points: str, journal_bytes: int, number: int, alone: bool, memory: int | None, pipe: Connection
) -> None:
    os.environ[failpoints.VARIABLE] = points
    failpoints.arm(points)
    kernels.warm_up()
    shard, recovery = open_shard(number, BLOCKS, 0, journal=folder, journal_bytes=journal_bytes, memory_bytes=memory)
    address = ShardServer(shard).start()
    if recovery is None and alone:
        shard.set_block_map(BlockMap.initial(BLOCKS, (address,)))
    pipe.send((address, None if recovery is None else recovery.as_dict()))
    with suppress(EOFError):  # the test has ended
        while True:
            shard.lease.grant(pipe.recv())
            pipe.send("granted")


class ShardProcess:
    """recovery: what the shard reported when it came back, None if it is new.

    alone: it is the only shard, and owns every block from the beginning. memory_bytes: see `StoreConfig`.
    """

    def __init__(
        self,
        folder: Path | None,
        points: str = "",
        journal_bytes: int = 1 << 30,
        *,
        number: int = 0,
        alone: bool = True,
        memory_bytes: int | None = None,
    ) -> None:
        self._pipe, theirs = _context.Pipe()
        path = None if folder is None else str(folder)
        arguments = (path, points, journal_bytes, number, alone, memory_bytes, theirs)
        self._process = _context.Process(target=_serve, args=arguments, daemon=True)
        self._process.start()
        theirs.close()
        self.address, self.recovery = self._pipe.recv()

    @property
    def pid(self) -> int:
        assert self._process.pid is not None
        return self._process.pid

    def grant_lease(self, until: float) -> None:
        """The shard serves up to `until` (`time.monotonic()` seconds); without a grant it serves for ever."""
        self._pipe.send(until)
        self._pipe.recv()

    def wait(self, timeout: float = 30.0) -> int | None:
        """Until the process has ended; its exit code, None if it lives on."""
        self._process.join(timeout)
        return self._process.exitcode

    def kill(self) -> None:
        """As `kill -9`."""
        self._process.kill()
        self._process.join()
