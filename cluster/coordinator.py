"""The coordinator of a run: a detached Ray actor that creates and replaces shards, and ends everything with the run.

Detached, because an actor dies with the actor or driver that created it; in a namespace of its own per start of a run,
so that two runs on one cluster never meet. The driver's `poll` is its heartbeat. Ray starts it again when it dies; it
then goes on with what it had written to `run_state`, and training goes on meanwhile: shards serve until their leases
end.
"""

from __future__ import annotations

import os
import threading
import time
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass, field
from typing import Any

import ray
from pydantic import SecretStr

from ..parameter_server.blocks import BlockMap
from ..parameter_server.client import StoreClient
from . import run_state
from .errors import RunFailed, one_line
from .generations import Assignment, Generations
from .rescale import Rescale
from .run_state import ShardPlan
from .shard_actor import Pulse
from .shard_group import NAME, ShardGroup, end_actor
from .watchdog import Watchdog

BEAT_SECONDS = 2.0


@dataclass
class News:
    """What happened since the last poll. problem: why the run cannot go on; addresses: of the shards of now.

    The rest counts from the run's start.
    """

    records: list[dict[str, Any]] = field(default_factory=list)
    problem: str | None = None
    generation: int = 0
    restarts: int = 0
    resizes: int = 0
    steps_redone: int = 0
    addresses: tuple[str, ...] = ()


class Coordinator(Generations):
    """Calls come on several threads (max_concurrency); `start` and `join` take as long as shards need to come up.

    token: of the shards' ports. An argument of the actor, so that it reaches shards and workers through Ray's own
    channel and stands in no file.
    """

    def __init__(self, namespace: str, driver_timeout: float, token: SecretStr) -> None:
        super().__init__(run_state.load(namespace))
        self._namespace = namespace
        self._driver_timeout = driver_timeout
        self._token = token
        self._changing = threading.RLock()  # held by whoever replaces shards or changes the block map
        self._problem: str | None = None
        self._ended = threading.Event()
        self._scaling = threading.Lock()
        self._rescale: Rescale | None = None
        self._repairing = False
        self._group: ShardGroup | None = None
        self._watchdog = Watchdog(driver_timeout, self._driver_is_gone, name="driver-watchdog")
        if self._state is not None:
            self._state.block_map = _without_idle(self._state.block_map)  # before anybody asks for it
            self._group = ShardGroup(self._state, self._orphan_timeout(self._state.plan), token)
            self._repair(self._take_up)
            threading.Thread(target=self._watch, name="shard-watch", daemon=True).start()

    def start(self, plan: ShardPlan) -> tuple[str, ...]:
        """Creates the shards, spread over the nodes, and gives them their blocks; returns their gRPC addresses.

        A second call, of a driver that did not hear the answer to the first, finds them there.

        Raises:
            RunFailed: Ray cannot place or start them within `plan.start_timeout` seconds.
            TableError: more shards than the store's blocks can serve.
        """
        with self._changing:
            if self._state is None:
                state, group = ShardGroup.create(plan, self._orphan_timeout(plan), self._token)
                state.save()
                group.announce(state.block_map)
                self._state, self._group = state, group
                threading.Thread(target=self._watch, name="shard-watch", daemon=True).start()
            return self._state.block_map.addresses

    def join(self, workers: int) -> Assignment:
        """A group of `workers` begins, and every older one is over: rank 0 calls this when its processes are there.

        Raises:
            RunFailed: shards are still missing after `start_timeout` seconds.
        """
        state = self._running()
        if not self._changing.acquire(timeout=2 * state.plan.start_timeout):
            raise RunFailed("the shards are still being replaced; raise cluster.start_timeout")
        try:
            assert self._group is not None
            self._saw(self._group.pulses())
            return self._next_generation(workers)
        finally:
            self._changing.release()

    def block_map(self) -> BlockMap:
        """The present one, for workers that do not reach a shard."""
        return self._running().block_map

    def scale(self, shards: int) -> dict[str, Any]:
        """Starts or ends shards and spreads all blocks over `shards` of them, while workers go on.

        Returns `rescale.Progress.summary()`, shards, and milliseconds that pulls took meanwhile: pull_p50 and pull_p99
        (of the slowest shard), pull_longest.

        Raises:
            TableError: more shards than the store's blocks can serve.
            RunFailed: no room, scaling already, or shards were lost meanwhile.
            RescaleError: blocks could not be moved; every block has one owner, and the call may be made again.
        """
        if not self._scaling.acquire(blocking=False):
            raise RunFailed("this run is being scaled already; wait for that to end")
        try:
            state, group = self._running(), self._group
            assert group is not None
            BlockMap.initial(state.plan.blocks, ("",) * shards)
            with self._store() as store:
                # Before shards start, so that it can be given up while they do.
                self._rescale = Rescale(store, group.addresses, self._write, alone=self._changing)
                with self._changing:
                    group.grow(shards)
                    state.save()
                    group.announce(state.block_map)
                result = self._move_blocks(store, self._rescale, shards)
            with self._changing:
                if len(state.block_map.addresses) > shards:
                    raise RunFailed("shards were lost meanwhile and all began afresh: scale again")
                group.shrink(shards)
            self._note(f"{shards} shards now: {result['blocks_moved']} blocks moved in {result['seconds']:.1f} s")
            return {"shards": shards, **result}
        finally:
            self._rescale = None
            self._scaling.release()

    def _move_blocks(self, store: StoreClient, rescale: Rescale, shards: int) -> dict[str, Any]:
        store.control_all("pull_times", {})
        result = rescale.run(shards)
        times = store.control_all("pull_times", {})
        slowest = {name: max(t[name] for t in times) for name in ("p50", "p99", "longest")}
        return result | {f"pull_{name}": value for name, value in slowest.items()}

    def _store(self) -> StoreClient:
        addresses = self._running().block_map.addresses
        return StoreClient.connect(addresses, token=self._token, find_map=self.block_map)

    def statistics(self) -> list[dict[str, Any]]:
        """What every shard holds and has done."""
        with self._store() as store:
            return store.statistics()

    def give_up_scaling(self) -> bool:
        """Ends the scaling under way as `Rescale.give_up` says; False if there is none."""
        rescale = self._rescale
        if rescale is None:
            return False
        rescale.give_up()
        return True

    def scale_progress(self) -> dict[str, Any] | None:
        """`rescale.Progress.summary()` of the scaling under way, if any."""
        return None if self._rescale is None else self._rescale.progress.summary()

    def token(self) -> SecretStr:
        """What the shards ask of every call."""
        return self._token

    def poll(self) -> News:
        """The driver's heartbeat; takes what was reported since the last one."""
        self._watchdog.beat()
        with self._lock:
            records = list(self._records)
            self._records.clear()
            if (state := self._state) is None:
                return News(records, self._problem)
            counts = (state.generation, state.restarts, state.resizes, state.steps_redone)
            return News(records, self._problem, *counts, state.block_map.addresses)

    def end(self) -> None:
        """Ends the shards and gives back their place; the caller then ends this actor."""
        self._ended.set()
        self._watchdog.stop()
        if self._group is not None:
            self._group.end()
        run_state.forget(self._namespace)

    def _orphan_timeout(self, plan: ShardPlan) -> float:
        # Longer than the coordinator waits for the driver: only a coordinator that never came back is noticed there.
        return 2 * self._driver_timeout + plan.start_timeout

    def _watch(self) -> None:
        group = self._group
        assert group is not None
        while not self._ended.wait(BEAT_SECONDS):
            try:
                pulses = group.beat(BEAT_SECONDS)
                self._saw(pulses)
                if not self._repairing and group.lost():
                    self._repair(self._replace)
                elif not self._repairing and self._left_behind(pulses):
                    self._repair(self._settle)
            except Exception as error:  # the cluster's head may be gone for a moment; without beats leases would end
                self._note(f"the shards could not be looked after: {one_line(error)}")

    def _left_behind(self, pulses: list[Pulse]) -> bool:
        """Whether a shard missed a block map, or the end of a move, while nobody changes anything."""
        if not self._changing.acquire(blocking=False):
            return False
        try:
            epoch = self._running().block_map.epoch
            return any(pulse.epoch < epoch or pulse.moving for pulse in pulses)
        finally:
            self._changing.release()

    def _repair(self, work: Callable[[], None]) -> None:
        """Beats go on while shards are replaced: on a thread of its own, one at a time."""
        self._repairing = True

        def run() -> None:
            try:
                with self._changing:
                    work()
            except Exception as error:
                self._problem = one_line(error)
            finally:
                self._repairing = False

        threading.Thread(target=run, name="repair", daemon=True).start()

    def _take_up(self) -> None:
        """After a restart of the coordinator: the shards are there, unless they died meanwhile."""
        state, group = self._running(), self._group
        assert group is not None
        group.take_up()
        if state.broken is not None:
            self._begin_afresh(state.broken)
        else:
            self._settle()
        self._note("the coordinator died and is back")

    def _replace(self) -> None:
        """A shard with a journal comes back with everything acknowledged; without one, the whole run goes back."""
        state, group = self._running(), self._group
        assert group is not None
        for number, why in group.lost().items():
            if self._ended.is_set():
                return
            if number >= len(state.block_map.addresses):
                group.restart_empty(number)  # it was to join, and owned nothing
                continue
            if state.plan.journal is None:
                self._begin_afresh(f"shard {number} {why}")
                return
            self._note(f"shard {number} {why}; starting it again with its journal")
            began = time.monotonic()
            if (missing := group.replace(number)) is not None:
                self._begin_afresh(f"shard {number} {why}, and came back without what it held: {missing}")
                return
            self._settle()
            self._note(f"shard {number} is back after {time.monotonic() - began:.0f} s; nothing acknowledged is lost")

    def _settle(self) -> None:
        """A shard that came back listens elsewhere, perhaps; it may have missed a block map, or the end of a move."""
        state, group = self._running(), self._group
        assert group is not None
        block_map = state.block_map
        addresses = group.addresses()[: len(block_map.addresses)]
        if addresses != block_map.addresses:
            block_map = BlockMap(block_map.epoch + 1, block_map.owners, addresses)
        self._commit(block_map)  # also the same once more: a write that failed may have left another one
        group.cancel_moves(state.block_map.epoch)

    def _begin_afresh(self, why: str) -> None:
        """All shards anew and empty: the workers find no generation there, begin again and load the checkpoint."""
        state, group = self._running(), self._group
        assert group is not None
        if state.restarts >= state.plan.max_restarts:
            self._problem = why
            return
        began = time.monotonic()
        self._saw(group.pulses())
        with self._lock:
            state.broken = why
            state.save()
        self._note(f"{why}: its rows are lost; all shards begin afresh, and training goes back to the last checkpoint")
        group.replace_all()
        addresses = group.addresses()
        initial = BlockMap.initial(state.plan.blocks, addresses)
        self._commit(BlockMap(state.block_map.epoch + 1, initial.owners, addresses))
        self._note(f"{len(addresses)} shards up again after {time.monotonic() - began:.0f} s")

    def _commit(self, block_map: BlockMap) -> None:
        """Written where it survives this process, then announced. `_changing` is held."""
        group = self._group
        assert group is not None
        self._write(block_map)
        group.announce(block_map)

    def _write(self, block_map: BlockMap) -> None:
        state = self._running()
        with self._lock:
            before = state.block_map, state.broken
            state.block_map, state.broken = block_map, None
            try:
                state.save()
            except BaseException:  # announced later, a map that was not written could drop what has not moved
                state.block_map, state.broken = before
                raise

    def _driver_is_gone(self) -> None:
        self.end()
        with suppress(ValueError):
            end_actor(ray.get_actor(NAME, namespace=self._namespace))  # for good: Ray would start it again otherwise
            time.sleep(10.0)
        os._exit(0)


def _without_idle(block_map: BlockMap) -> BlockMap:
    """Without the last shards as far as they own nothing; the same if they all own something.

    They were about to join when the last coordinator died. Workers may not have heard of them for longer than the steps
    are held, and a shard that missed steps refuses the next ones; outside the map it can join once more.
    """
    shards = int(block_map.owners.max()) + 1
    if shards == len(block_map.addresses):
        return block_map
    return BlockMap(block_map.epoch + 1, block_map.owners, block_map.addresses[:shards])
