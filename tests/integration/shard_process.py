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


def _serve(folder: str, journal_bytes: int, pipe: Connection) -> None:
    os.environ[failpoints.VARIABLE] = ""  # it may be armed
    kernels.warm_up()
    shard, recovery = open_shard(0, BLOCKS, 0, journal=folder, journal_bytes=journal_bytes)
    address = ShardServer(shard).start()
    if recovery is None:
        shard.set_block_map(BlockMap.initial(BLOCKS, (address,)))
    pipe.send((address, None if recovery is None else recovery.as_dict()))
    with suppress(EOFError):  # the test has ended
        pipe.recv()


class ShardProcess:
    """recovery: what the shard reported when it came back, None if it is new: then it owns every block."""

    def __init__(self, folder: Path, journal_bytes: int = 1 << 30) -> None:
        self._pipe, theirs = _context.Pipe()
        self._process = _context.Process(target=_serve, args=(str(folder), journal_bytes, theirs), daemon=True)
        self._process.start()
        theirs.close()
        self.address, self.recovery = self._pipe.recv()

    def wait(self, timeout: float = 30.0) -> int | None:
        """Until the process has ended; its exit code, None if it lives on."""
        self._process.join(timeout)
        return self._process.exitcode

    def kill(self) -> None:
        """As `kill -9`."""
        self._process.kill()
        self._process.join()
