"""Faults at random, on the shards and the coordinator of a running job: kill, stop, partition, rescale."""

from __future__ import annotations

import os
import random
import signal
import threading
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from typing import Any

import ray
from ray.exceptions import RayError

from ..parameter_server import failpoints
from .chaos_history import KINDS, Recorder
from .errors import one_line, root_cause
from .shard_group import NAME, shard_name

INTERVAL_SECONDS = (5.0, 8.0)  # between two faults: more than six a minute
SHORT_INTERVAL_SECONDS = (1.5, 2.0)  # in a run of less than a minute
AGAIN_SECONDS = 1.0  # after one that came to nothing
SHARDS = (2, 5)
ASK_SECONDS = 3.0
SCALE_SECONDS = 300.0
HEAL_SECONDS = 60.0


def _process_id(_: Any) -> int:
    return os.getpid()


def _arm(_: Any, points: str) -> None:
    failpoints.arm(points)


def others_first(kind: str, bag: list[str], rng: random.Random) -> list[str]:
    """The bag that kinds are taken from, last one first, after `kind` came to nothing: the other kinds, then it."""
    others = [other for other in bag if other != kind] or [other for other in KINDS if other != kind]
    return [kind, *rng.sample(others, len(others))]


class Faults:
    """namespace: of the job. lease: of its shards, which some stops exceed. armed: failpoints that always stay armed.

    What is stopped or cut off is healed on a thread of its own while the next faults come. missing: the kinds that have
    not come about yet.
    """

    def __init__(
        self,
        namespace: str,
        recorder: Recorder,
        *,
        seed: int,
        lease: float,
        armed: str,
        shards: Callable[[], int],
        note: Callable[[str], None],
    ) -> None:
        self.rescaled = 0
        self.missing = set(KINDS)
        self._namespace = namespace
        self._recorder = recorder
        self._random = random.Random(seed)
        self._lease = lease
        self._armed = armed
        self._shards = shards
        self._note = note
        self._healing = ThreadPoolExecutor(32, thread_name_prefix="heal")
        self._scaling = threading.Event()
        self._until, self._interval = 0.0, INTERVAL_SECONDS
        self._ended = threading.Event()
        self._thread = threading.Thread(target=self._run, name="faults", daemon=True)

    def start(self, seconds: float) -> None:
        """For so long, and until there was one of each kind."""
        self._until = time.monotonic() + seconds
        if seconds < 60:
            self._interval = SHORT_INTERVAL_SECONDS
        self._thread.start()

    def end(self) -> None:
        """No more faults; returns when everything is healed."""
        self._ended.set()
        self._thread.join()
        self._healing.shutdown()

    def kill_every_shard(self) -> None:
        """All at once; one that does not answer is down already."""
        pids = []
        for number in range(self._shards()):
            with suppress(RayError, ValueError):
                pids.append(self._pid(shard_name(number)))
        for pid in pids:
            with suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)

    def _run(self) -> None:
        bag: list[str] = []
        pause = self._interval[1]
        while not self._ended.wait(pause) and (self.missing or time.monotonic() < self._until):
            pause = self._random.uniform(*self._interval)
            bag = bag or self._random.sample(KINDS, len(KINDS))
            kind = bag.pop()
            try:
                target, seconds = getattr(self, f"_{kind}")()
            except Exception as error:  # the victim, or the coordinator, is down already: another fault at another time
                self._note(f"fault: {kind} came to nothing: {one_line(root_cause(error))}")
                bag = others_first(kind, bag, self._random)
                pause = AGAIN_SECONDS
                continue
            self.missing.discard(kind)
            self._recorder.write("fault", kind=kind, target=target, seconds=round(seconds, 2))
            self._note(f"fault: {kind} {target}" + (f" for {seconds:.1f} s" if seconds else ""))

    def _kill(self) -> tuple[str, float]:
        name = NAME if self._random.random() < 0.2 else self._any_shard()
        os.kill(self._pid(name), signal.SIGKILL)
        return name, 0.0

    def _stop(self) -> tuple[str, float]:
        name = self._any_shard()
        beyond_lease = self._random.random() < 0.25
        seconds = self._lease + 6.0 if beyond_lease else self._random.uniform(1.0, 4.0)
        pid = self._pid(name)
        os.kill(pid, signal.SIGSTOP)
        self._heal(seconds, lambda: os.kill(pid, signal.SIGCONT))
        return name, seconds

    def _partition(self) -> tuple[str, float]:
        """Half of the time only answers are lost, after what was asked has been done."""
        name = self._any_shard()
        answers = self._random.random() < 0.5
        seconds = self._random.uniform(0.5, 1.5) if answers else self._random.uniform(1.0, 5.0)
        point = "network.answer" if answers else "network.cut"
        # Healed also if nobody answers here: one that is stopped hears of it when it goes on.
        self._heal(seconds, lambda: self._rejoin(name))
        self._ask(name, _arm, ",".join(filter(None, [self._armed, f"{point}=skip"])))
        return f"{name} ({'answers lost' if answers else 'cut off'})", seconds

    def _rejoin(self, name: str) -> None:
        """Until the shard has heard it; one that has died meanwhile comes back without the fault."""
        deadline = time.monotonic() + HEAL_SECONDS
        while time.monotonic() < deadline:
            with suppress(RayError, ValueError):
                self._ask(name, _arm, self._armed)
                return
            time.sleep(0.5)
        self._note(f"{name} could not be reached for {HEAL_SECONDS:g} s to end its partition")

    def _rescale(self) -> tuple[str, float]:
        if self._scaling.is_set():
            raise RuntimeError("the last one is still under way")
        now = self._shards()
        target = self._random.choice([n for n in range(SHARDS[0], SHARDS[1] + 1) if n != now])
        call = self._actor(NAME).scale.remote(target)
        self._scaling.set()
        self._healing.submit(self._follow, call, now, target)
        return f"{now} to {target} shards", 0.0

    def _follow(self, call: Any, before: int, target: int) -> None:
        try:
            result = ray.get(call, timeout=SCALE_SECONDS)
            self.rescaled += 1
            self._note(f"rescaled from {before} to {target} shards in {result['seconds']:.1f} s")
        except Exception as error:  # cut short by another fault; every block has one owner all the same
            self._note(f"rescale from {before} to {target} was cut short: {one_line(root_cause(error))}")
        finally:
            self._scaling.clear()

    def _heal(self, seconds: float, action: Callable[[], object]) -> None:
        def run() -> None:
            time.sleep(seconds)
            with suppress(ProcessLookupError):  # replaced meanwhile
                action()

        self._healing.submit(run)

    def _any_shard(self) -> str:
        return shard_name(self._random.randrange(self._shards()))

    def _actor(self, name: str) -> Any:
        return ray.get_actor(name, namespace=self._namespace)

    def _ask(self, name: str, function: Callable[..., Any], *arguments: Any) -> Any:
        return ray.get(self._actor(name).__ray_call__.remote(function, *arguments), timeout=ASK_SECONDS)

    def _pid(self, name: str) -> int:
        pid: int = self._ask(name, _process_id)
        return pid
