"""`embershard chaos`: faults at random against a job that pushes, and at the end every row is counted.

The job is three processes that push whole-numbered gradients through the store's own client to shards that keep
journals, under the coordinator of every run: two workers, whose steps have a clock, and a tool, whose pushes have none
and wait for nobody. docs/chaos.md says what is injected and compared.
"""

from __future__ import annotations

import os
import secrets
import threading
import time
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
import ray
from pydantic import SecretStr
from ray.exceptions import RayError

from ..parameter_server import failpoints
from ..parameter_server.security import run_token
from ..parameter_server.store import StoreError
from .calls import ask
from .chaos_faults import Faults
from .chaos_history import FINAL, HISTORY_FILE, Recorder, Workload, judge, read_tables
from .chaos_pusher import read_items
from .chaos_worker import CALL_SECONDS, ChaosWorker, connect
from .errors import ConfigError, RunFailed, one_line, root_cause
from .launch import Members
from .progress import ProgressReporter
from .ray_session import ray_session
from .run_state import ShardPlan

WORKERS = 2
BLOCKS = 64
LEASE_SECONDS = 8.0
START_SECONDS = 300.0  # for processes to come up, on a machine that is busy
HEARTBEAT_SECONDS = 0.5
EXTRA_SECONDS = 60.0  # at most, for the kinds of faults that did not come about in time
ROUND_STEPS = 100  # rounds of `bounded` and of `sync` take turns


def run_chaos(
    folder: Path, minutes: float, seed: int, mutant: str | None, progress: ProgressReporter
) -> dict[str, Any]:
    """Runs the job on a Ray of its own and compares; the result is what `embershard chaos --json` prints.

    mutant: a guard of the shards (`failpoints.GUARDS`) that is switched off. `problems` in the result says why the run
    does not count, if it does not.

    Raises:
        ConfigError: the folder is not empty. RunFailed: shards or pushers could not be started, or nothing compared.
    """
    if folder.exists() and any(folder.iterdir()):
        raise ConfigError(f"{folder} is not empty: give --output another folder")
    folder.mkdir(parents=True, exist_ok=True)
    armed = f"{mutant}=skip" if mutant else ""
    os.environ[failpoints.VARIABLE] = armed  # of every process of this Ray
    namespace = f"embershard-chaos-{secrets.token_hex(4)}"
    progress.note(f"chaos for {minutes:g} minutes, seed {seed}, in {folder}; starting Ray")
    with ray_session(None, namespace, START_SECONDS):
        members = Members(namespace, START_SECONDS, run_token(namespace))
        try:
            with _Job(folder.resolve(), seed, armed, members, progress) as job:
                problem = job.run(minutes)
                job.compare()
        finally:
            members.end()
    result = judge(folder, minutes) | {"minutes": minutes, "seed": seed, "rescales_completed": job.faults.rescaled}
    if problem is not None:
        result["problems"].insert(0, problem)
    return result


class _Job:
    """Shards, pushers and faults of one run."""

    def __init__(self, folder: Path, seed: int, armed: str, members: Members, progress: ProgressReporter) -> None:
        self._folder = folder
        self._members = members
        self._progress = progress
        self._workload = Workload(seed)
        self._recorder = Recorder(folder / HISTORY_FILE)
        self._shards = 2
        self._problem: str | None = None
        self._ended = threading.Event()
        self._token: SecretStr = self._start(seed)
        self._store = connect(members.coordinator, self._token)
        self._store.create_tables(self._workload.tables())
        self._store.begin(1, WORKERS, 0)
        self._recorder.write("workload", **asdict(self._workload))
        self._recorder.write("generation", generation=1, step=0, workers=WORKERS)
        self.faults = Faults(
            members.namespace,
            self._recorder,
            seed=seed,
            lease=LEASE_SECONDS,
            armed=armed,
            shards=lambda: self._shards,
            note=progress.note,
        )
        self._heart = threading.Thread(target=self._beat, name="heartbeat", daemon=True)
        self._heart.start()

    def __enter__(self) -> _Job:
        return self

    def __exit__(self, *exc: object) -> None:
        self._ended.set()
        self._heart.join()
        self._store.close()
        self._recorder.close()

    def _beat(self) -> None:
        """The coordinator hears from its driver, whatever that waits for."""
        while not self._ended.wait(HEARTBEAT_SECONDS):
            try:
                news = self._members.poll()
            except (RunFailed, RayError) as error:
                self._progress.note(f"no news: {one_line(root_cause(error))}")
                continue
            for record in news.records:
                if note := record.get("note"):
                    self._progress.note(str(note))
            self._shards = len(news.addresses) or self._shards
            self._problem = self._problem or news.problem

    def _start(self, seed: int) -> SecretStr:
        plan = ShardPlan(
            namespace=self._members.namespace,
            shards=self._shards,
            cpus=0.1,
            blocks=BLOCKS,
            seed=seed,
            loopback=True,
            start_timeout=START_SECONDS,
            lease=LEASE_SECONDS,
            journal=str(self._folder / "journal"),
            journal_bytes=1 << 20,
        )
        ask(self._members.coordinator, "start", plan, within=3 * START_SECONDS)
        token: SecretStr = ask(self._members.coordinator, "token")
        return token

    def run(self, minutes: float) -> str | None:
        """Rounds of pushes under faults until the time is over, and there was a fault of each kind.

        Returns why it ended early, if it did.
        """
        actor = ray.remote(ChaosWorker).options(num_cpus=0)
        where = self._members.namespace, self._token, self._workload, str(self._folder / HISTORY_FILE)
        workers = [actor.remote(*where, client=number, workers=WORKERS) for number in range(WORKERS)]
        tool = actor.remote(*where, client=WORKERS, workers=0)
        self._wait([pusher.run.remote(1, 0, False) for pusher in (*workers, tool)])  # until they are there
        end, step, number = time.monotonic() + 60 * minutes, 1, 0
        self.faults.start(60 * minutes)
        problem = None
        try:
            while (late := time.monotonic() - end) < 0 or (late < EXTRA_SECONDS and self.faults.missing):
                sync = number % 3 == 2
                calls = [worker.run.remote(step, ROUND_STEPS, sync) for worker in workers]
                self._wait([*calls, tool.run.remote(step, ROUND_STEPS, False)])
                step, number = step + ROUND_STEPS, number + 1
                self._progress.advance({"step": step - 1, "shards": self._shards})
        except (RunFailed, RayError) as error:
            problem = one_line(root_cause(error))
            self._progress.note(f"pushing ended early: {problem}")
        finally:
            self.faults.end()
        for pusher in (*workers, tool):
            ray.kill(pusher)
        return problem

    def _wait(self, calls: list[Any]) -> None:
        """Until all calls have come back, or one or the whole run has failed."""
        while calls:
            done, calls = ray.wait(calls, timeout=HEARTBEAT_SECONDS)
            ray.get(done)
            if self._problem is not None:
                raise RunFailed(self._problem)

    def compare(self) -> None:
        """Kills every shard once more, waits for them, and writes down what they hold as the checkpoint FINAL.

        Raises:
            RunFailed: they do not come back, or pulls and checkpoint do not agree.
        """
        self._progress.note("killing every shard once more, then comparing")
        self._shards = len(ask(self._members.coordinator, "block_map").addresses)
        self.faults.kill_every_shard()
        self._patiently(self._save)
        pulled = self._patiently(lambda: read_items(self._store, self._workload))
        saved = read_tables(str(self._folder / FINAL))["items"].values
        if not np.array_equal(pulled, saved):
            raise RunFailed(f"rows as pulled and as in {self._folder / FINAL} differ")

    def _patiently(self, action: Callable[[], Any]) -> Any:
        deadline = time.monotonic() + 2 * CALL_SECONDS
        while True:
            try:
                return action()
            except StoreError as error:
                if time.monotonic() > deadline:
                    raise RunFailed(f"the shards did not come back to be compared: {one_line(error)}") from error
                self._progress.note(f"not yet: {one_line(error)}")
            time.sleep(1.0)

    def _save(self) -> None:
        self._store.save(str(self._folder / FINAL)).result()
