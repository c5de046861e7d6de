"""A run from start to end, as the driver sees it: shards up, workers up, follow, write down, everything down."""

from __future__ import annotations

import os
import secrets
import threading
import time
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from types import ModuleType
from typing import Any, cast

import ray
from pydantic import SecretStr
from ray.exceptions import RayError

from ..parameter_server.security import Security, run_token
from . import run_state
from .calls import CONTROL_SECONDS, ask
from .config import RunConfig
from .coordinator import Coordinator, News
from .errors import RUN_THREAD, RunFailed, RunInterrupted, is_user_error, one_line, root_cause
from .interrupt import Interrupt, interrupts
from .preparation import prepare
from .progress import ProgressReporter
from .ray_session import ray_session
from .run_folder import RunFolder, read_run
from .run_state import ShardPlan
from .shard_group import NAME, end_named

POLL_SECONDS = 0.5


class Trainer:
    """Trains what a RunConfig describes, on shards and workers that exist for this run alone.

    Usage: `Trainer(RunConfig.load("criteo.yaml")).fit()`; with resume=True it takes up `config.run.dir`.
    """

    def __init__(self, config: RunConfig, *, resume: bool = False, progress: ProgressReporter | None = None) -> None:
        self.config = config
        self.resume = resume
        self.progress = progress or ProgressReporter()

    def fit(self) -> dict[str, Any]:
        """Returns the summary that `embershard train --json` prints.

        Raises:
            ConfigError, DataError, TableError, SecurityError: the configuration, the data, a certificate or a token
                cannot be right; nothing was started.
            RunFailed: a worker or shard failed, or the cluster has no room; one line with the cause.
            RunInterrupted: Ctrl-C or SIGTERM; a checkpoint was written at a step boundary.
        """
        Security.of_process()  # certificates and a given token can be read
        prepare(self.config, self.progress)
        folder = RunFolder.open(self.config.run_dir, resume=self.resume)
        status = "failed"
        try:
            folder.save_config(self.config.to_yaml())
            with interrupts() as interrupt, self.progress:
                summary = self._train(folder, interrupt)
            status = "finished"
            return summary
        except (RunInterrupted, KeyboardInterrupt):
            status = "interrupted"
            raise
        finally:
            folder.close(status)

    def _train(self, folder: RunFolder, interrupt: Interrupt) -> dict[str, Any]:
        cluster = self.config.cluster
        namespace = f"embershard-{folder.path.name}-{secrets.token_hex(4)}"
        self.progress.note("starting Ray" if cluster.address is None else f"joining Ray at {cluster.address}")
        with ray_session(cluster.address, namespace, cluster.start_timeout) as address:
            if self.resume:
                _end_leftovers(read_run(folder.path), address)
            folder.update(ray_address=address, ray_auth_mode=os.environ.get("RAY_AUTH_MODE"), namespace=namespace)
            members = Members(namespace, cluster.driver_timeout, run_token(namespace))
            try:
                return _Session(self.config, folder, members, interrupt, self.progress).run()
            finally:
                members.end()


class Members:
    """The coordinator of this start of the run, and through it the shards."""

    def __init__(self, namespace: str, driver_timeout: float, token: SecretStr) -> None:
        self.namespace = namespace
        self.coordinator: Any = (
            ray.remote(Coordinator)
            .options(
                name=NAME, namespace=namespace, lifetime="detached", num_cpus=0, max_restarts=-1, max_concurrency=16
            )
            .remote(namespace, driver_timeout, token)
        )

    def poll(self) -> News:
        """Raises RunFailed when the coordinator is gone and does not come back."""
        news: News = ask(self.coordinator, "poll")
        return news

    def end(self) -> None:
        _end_namespace(self.namespace)


class _Session:
    """One start of a run, while its coordinator lives."""

    def __init__(
        self, config: RunConfig, folder: RunFolder, members: Members, interrupt: Interrupt, progress: ProgressReporter
    ) -> None:
        self.config = config
        self.folder = folder
        self.members = members
        self.interrupt = interrupt
        self.progress = progress

    def run(self) -> dict[str, Any]:
        started = time.monotonic()
        addresses = self._start_shards()
        self.progress.note(f"{len(addresses)} shards up after {time.monotonic() - started:.0f} s; starting workers")
        self.folder.update(status="running")
        namespace = self.members.namespace
        summary: dict[str, Any] = self._in_background(
            lambda: _worker_group().start_workers(self.config, self.folder, namespace), self._ask_to_stop
        )
        news = self.members.poll()
        self._take(news)
        again = {"restarts": news.restarts, "resizes": news.resizes, "steps_redone": news.steps_redone}
        summary = {"run_dir": str(self.folder.path), "shards": len(news.addresses)} | summary | again
        if self.interrupt.asked and summary.get("stopped"):
            raise RunInterrupted(
                f"stopped at step {summary['steps']}; go on with: embershard train {self.folder.path} --resume"
            )
        return summary

    def _start_shards(self) -> tuple[str, ...]:
        cluster, store = self.config.cluster, self.config.store
        plan = ShardPlan(
            namespace=self.members.namespace,
            shards=cluster.shards,
            cpus=cluster.shard_cpus,
            blocks=store.blocks,
            seed=self.config.seed,
            loopback=cluster.address is None and len(ray.nodes()) == 1,
            start_timeout=cluster.start_timeout,
            generation=self.folder.generation,
            lease=cluster.lease,
            max_restarts=cluster.max_restarts,
            journal=self._journal_folder(),
            journal_bytes=store.journal_bytes,
            memory_bytes=store.memory_bytes,
        )

        waits = 3 * cluster.start_timeout  # for a place, for the shards, and once more if the coordinator dies

        def give_up() -> None:
            raise RunInterrupted("stopped before the first step; nothing was trained")

        def start() -> tuple[str, ...]:
            threading.Thread(target=_worker_group, daemon=True).start()  # meanwhile
            return cast("tuple[str, ...]", ask(self.members.coordinator, "start", plan, within=CONTROL_SECONDS + waits))

        addresses: tuple[str, ...] = self._in_background(start, give_up)
        return addresses

    def _journal_folder(self) -> str | None:
        store = self.config.store
        if store.durability == "none":
            return None
        return str(
            Path(store.journal_dir).expanduser().resolve() if store.journal_dir else self.folder.path / "journal"
        )

    def _in_background(self, work: Callable[[], Any], on_interrupt: Callable[[], None]) -> Any:
        """Runs `work` on a thread while this one polls the coordinator, writes its records and hears Ctrl-C.

        On a thread also because Ray Train takes SIGINT for itself on the main one.
        """
        outcome: dict[str, Any] = {}
        done = threading.Event()

        def run() -> None:
            try:
                outcome["result"] = work()
            except BaseException as error:
                outcome["error"] = error
            finally:
                done.set()

        threading.Thread(target=run, name=RUN_THREAD, daemon=True).start()
        asked = False
        while not done.wait(POLL_SECONDS):
            self._take(self.members.poll())
            if self.interrupt.asked and not asked:
                asked = True
                on_interrupt()
        if "error" in outcome:
            self._fail(outcome["error"])
        self._take(self.members.poll())
        return outcome["result"]

    def _ask_to_stop(self) -> None:
        self.progress.note("stopping at the next step boundary and writing a checkpoint (Ctrl-C again: end at once)")
        ask(self.members.coordinator, "request_stop")

    def _take(self, news: News) -> None:
        self.folder.begin_generation(news.generation)
        if news.addresses:
            self.folder.shards_are(news.addresses)
        for record in news.records:
            if note := record.get("note"):
                self.progress.note(str(note))
                continue
            self.folder.record(record)
            if "step" in record:
                self.progress.advance(record)
        if news.problem is not None:
            raise RunFailed(f"{news.problem}; go on from the newest checkpoint with --resume")

    def _fail(self, error: BaseException) -> None:
        """Turns what Ray wrapped into the one line that names the cause."""
        news = self.members.poll()
        cause = root_cause(error)
        if news.problem is not None:  # a dead shard explains the workers' errors better than they do
            raise RunFailed(f"{news.problem}; go on from the newest checkpoint with --resume") from error
        if isinstance(cause, (RunFailed, RunInterrupted)):
            raise cause from None
        raise RunFailed(one_line(cause), user_error=is_user_error(cause)) from error


def _worker_group() -> ModuleType:
    """Ray Train takes seconds to import, which is done while the shards start."""
    from . import worker_group

    return worker_group


def _end_leftovers(previous: dict[str, Any], address: str) -> None:
    """Ends what an earlier driver of this run, killed a moment ago, may have left on the same cluster."""
    if previous.get("ray_address") == address and isinstance(previous.get("namespace"), str):
        _end_namespace(previous["namespace"])


def _end_namespace(namespace: str) -> None:
    """Ends coordinator, shards and placement group of one start, whichever of them are left."""
    with suppress(ValueError, RayError):  # it is not there, or does not answer: the rest is found by name
        ray.get(ray.get_actor(NAME, namespace=namespace).end.remote(), timeout=CONTROL_SECONDS)
    end_named(namespace)
    run_state.forget(namespace)
