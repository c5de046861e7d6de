"""Shards with journals on a Ray of several nodes, a job that pushes to them, and the few things a coordinator does.

The block map in force stands in a file, written before anybody is told of it, and a shard is replaced only while no
blocks are being moved: what `cluster.coordinator` does by itself, here at the moment that a scenario says.
"""

from __future__ import annotations

import json
import multiprocessing
import os
import shutil
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import ray
from embershard.cluster.chaos_history import HISTORY_FILE, History, Recorder, Verdict, Workload, check, read_tables
from embershard.cluster.chaos_pusher import Pusher, read_items
from embershard.cluster.migration import described
from embershard.cluster.rescale import Rescale
from embershard.parameter_server import failpoints
from embershard.parameter_server.blocks import BlockMap
from embershard.parameter_server.client import StoreClient
from embershard.parameter_server.store import StoreError

sys.path.insert(0, str(Path(__file__).parents[1] / "integration"))
from proxy import Proxy

sys.path.insert(0, str(Path(__file__).parent))
from ray_shard import BLOCKS, TOKEN, RayShard

_context = multiprocessing.get_context("forkserver")
_context.set_forkserver_preload(["embershard.cluster.rescale", "embershard.parameter_server.client"])
WORKLOAD = Workload(seed=11, rows=400, touched=24)
ROUND_STEPS = 10


def write_map(file: Path, block_map: BlockMap) -> None:
    temporary = file.with_suffix(".new")
    temporary.write_text(json.dumps(described(block_map)))
    temporary.replace(file)


def read_map(file: Path) -> BlockMap:
    content = json.loads(file.read_text())
    return BlockMap(content["epoch"], np.array(content["owners"], np.uint16), tuple(content["addresses"]))


def coordinate(map_file: Path, addresses: list[str], shards: int, points: str) -> None:
    """Rescales, as a coordinator that may be killed or stopped on the way: in a process of its own."""
    failpoints.arm(points)
    with StoreClient.connect(addresses, token=TOKEN) as store:
        store.adopt(read_map(map_file))
        Rescale(store, lambda: addresses, lambda block_map: write_map(map_file, block_map)).run(shards)


def save(addresses: list[str], directory: str, points: str) -> None:
    """Writes a checkpoint, as a worker that may be killed on the way: in a process of its own."""
    failpoints.arm(points)
    with StoreClient.connect(addresses, token=TOKEN) as store:
        store.save(directory).result()


class Shards:
    """`count` shards that serve, `spare` that may join, dealt out to the nodes, all with journals below `folder`.

    proxied: each is reached through a proxy.
    """

    def __init__(
        self,
        folder: Path,
        count: int,
        spare: int = 0,
        *,
        proxied: bool = False,
        workload: Workload = WORKLOAD,
        memory_bytes: int | None = None,
    ) -> None:
        self.workload = workload
        self.memory_bytes = memory_bytes
        self.folder = folder
        self.map_file = folder / "block-map.json"
        self.changing = threading.RLock()
        self.nodes = [node["NodeID"] for node in ray.nodes() if node["Alive"]]
        self.processes = [self._start(number) for number in range(count + spare)]
        self.replaced: list[RayShard] = []  # by a process elsewhere, and alive
        self.proxies = [Proxy(process.address) for process in self.processes] if proxied else []
        self.recorder = Recorder(folder / HISTORY_FILE)
        self.recorder.write("workload", **workload.__dict__)
        write_map(self.map_file, BlockMap.initial(BLOCKS, tuple(self.addresses()[:count])))
        for number in range(count):
            self._tell(number)
        self.store = self.connect()
        self.store.create_tables(workload.tables())
        self.step = 0

    def _start(self, number: int) -> RayShard:
        return RayShard(number, self.folder / f"shard-{number}", self._node(number), self.memory_bytes)

    def _node(self, number: int) -> str:
        return self.nodes[number % len(self.nodes)]

    def _tell(self, number: int) -> None:
        with StoreClient.connect(self.processes[number].address, token=TOKEN) as store:
            address, block_map = self.processes[number].address, self.block_map()
            store.control_at(address, "set_block_map", described(block_map))
            store.control_at(address, "cancel_moves", {"epoch": block_map.epoch})

    def block_map(self) -> BlockMap:
        return read_map(self.map_file)

    def addresses(self) -> list[str]:
        return [end.address for end in self.proxies or self.processes]

    def connect(self, timeout: float = 120.0) -> StoreClient:
        return StoreClient.connect(self.addresses(), timeout=timeout, token=TOKEN, find_map=self.block_map)

    def begin(self, generation: int = 1, step: int = 0, workers: int = 1) -> None:
        self.store.begin(generation, workers, step)
        self.recorder.write("generation", generation=generation, step=step, workers=workers)
        self.generation, self.step, self.workers = generation, step, workers

    def pusher(self, store: StoreClient, client: int = 0) -> Pusher:
        generation, workers = self.generation, self.workers
        return Pusher(store, self.workload, self.recorder, client=client, workers=workers, generation=generation)

    @contextmanager
    def pushing(self) -> Iterator[None]:
        """A worker pushes all the time; at the end of the block it stops and everything is acknowledged."""
        stop = threading.Event()
        failed: list[BaseException] = []

        def run() -> None:
            try:
                with self.connect() as store:
                    pusher = self.pusher(store)
                    while not stop.is_set():
                        pusher.run(self.step + 1, ROUND_STEPS, sync=False)
                        self.step += ROUND_STEPS
            except BaseException as error:
                failed.append(error)

        worker = threading.Thread(target=run)
        worker.start()
        try:
            self.wait_until(lambda: self.step > 0 or failed, "the first pushes")
            yield
        finally:
            stop.set()
            worker.join(180)
        assert not failed, failed
        assert not worker.is_alive(), "pushes are still unanswered"

    def more_steps(self) -> None:
        """Until the worker has done a round that began after this call."""
        begin = self.step
        self.wait_until(lambda: self.step >= begin + 2 * ROUND_STEPS, "more steps")

    @staticmethod
    def wait_until(condition: Callable[[], Any], what: str, timeout: float = 120.0) -> None:
        deadline = time.monotonic() + timeout
        while not condition():
            assert time.monotonic() < deadline, f"not within {timeout:g} s: {what}"
            time.sleep(0.02)

    def coordinator(self, shards: int, points: str) -> BaseProcess:
        """A coordinator that rescales."""
        return _started(coordinate, self.map_file, self.addresses(), shards, points)

    def saver(self, directory: str, points: str) -> BaseProcess:
        """A worker that writes a checkpoint."""
        return _started(save, self.addresses(), directory, points)

    def rescale(self, shards: int) -> dict[str, Any]:
        """Shards that join are new, and those that leave end: their journals go with them."""
        while len(self.processes) < shards:
            self.processes.append(self._start(len(self.processes)))
        move = Rescale(self.store, self.addresses, lambda m: write_map(self.map_file, m), alone=self.changing)
        result = move.run(shards)
        for number in range(shards, len(self.processes)):
            self.processes[number].kill()
            shutil.rmtree(self.folder / f"shard-{number}")
        del self.processes[shards:]
        return result

    def arm(self, number: int, points: str) -> None:
        with suppress(StoreError):  # one that stops or dies at once cannot answer any more
            self.store.control_at(self.processes[number].address, "arm", {"points": points}, within=2.0)

    def restart(self, number: int, *, elsewhere: bool = False) -> None:
        """A shard that dies, with its journal; nothing is told to the workers. elsewhere: at another address."""
        self.processes[number].wait()
        with self.changing:
            before = self.processes[number].address
            if elsewhere:
                (self.folder / f"shard-{number}" / "port").unlink()
            self.processes[number] = self._start(number)
            assert (self.processes[number].address != before) == elsewhere
            self.settle()

    def replace(self, number: int, *, journal: bool) -> RayShard:
        """On another node, so that the old process, which is returned, lives on; with its journal or without."""
        with self.changing:
            old, there = self.processes[number], self.folder / f"shard-{number}-elsewhere"
            if journal:
                shutil.copytree(self.folder / f"shard-{number}", there)
            self.processes[number] = RayShard(number, there, self._node(number + 1))
            self.settle()
        self.replaced.append(old)
        return old

    def settle(self) -> None:
        """What a coordinator does that has come back or has replaced a shard."""
        block_map = self.block_map()
        addresses = tuple(self.addresses()[: len(block_map.addresses)])
        if addresses != block_map.addresses:
            write_map(self.map_file, BlockMap(block_map.epoch + 1, block_map.owners, addresses))
        for number, process in enumerate(self.processes):
            if process.alive():
                self._tell(number)
        self.store.adopt(self.block_map())

    def kill(self, number: int) -> None:
        os.kill(self.processes[number].pid, signal.SIGKILL)

    def stop(self, number: int) -> None:
        os.kill(self.processes[number].pid, signal.SIGSTOP)

    def is_stopped(self, number: int) -> bool:
        return psutil.Process(self.processes[number].pid).status() == psutil.STATUS_STOPPED

    def go_on(self, number: int) -> None:
        os.kill(self.processes[number].pid, signal.SIGCONT)

    def verdict(self, name: str = "final") -> Verdict:
        """Saves everything and compares it with the history; nothing may be under way."""
        directory = str(self.folder / name)
        self.store.adopt(self.block_map())
        self.store.save(directory).result()
        held = sum(statistics["blocks"] for statistics in self.store.statistics())
        assert held == BLOCKS, "a block has two owners, or none"
        tables = read_tables(directory)
        np.testing.assert_array_equal(read_items(self.store, self.workload), tables["items"].values)
        return check(History.read(self.folder / HISTORY_FILE), tables)

    def close(self) -> None:
        self.store.close()
        for process in self.processes + self.replaced:
            process.kill()
        for proxy in self.proxies:
            proxy.close()


def _started(function: Callable[..., None], *arguments: Any) -> BaseProcess:
    process = _context.Process(target=function, args=arguments)
    process.start()
    return process
