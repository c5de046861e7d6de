"""The folder of a run: who writes it, what it was asked for, what came out.

RUN/run.json  config.yaml  metrics.jsonl  tb/  logs/  checkpoints/. One writer at a time: a lock on RUN/.lock that the
driver's process holds and that goes with it, however it ends.
"""

from __future__ import annotations

import fcntl
import json
import os
import socket
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, TextIO

from .errors import ConfigError

RUN_FILE = "run.json"
CONFIG_FILE = "config.yaml"
METRICS_FILE = "metrics.jsonl"


def is_run(path: Path) -> bool:
    return (path / RUN_FILE).is_file()


class RunFolder:
    """The open, locked folder of a run; `generation` counts its starts and restarts, from 1."""

    def __init__(self, path: Path, lock: TextIO, record: dict[str, Any]) -> None:
        self.path = path
        self._lock = lock
        self._record = record
        self._metrics: TextIO | None = None
        self._tensorboard: Any = None

    @classmethod
    def open(cls, path: Path, *, resume: bool) -> RunFolder:
        """Creates the folder, or with `resume` takes up an existing one; starts the next generation.

        Raises:
            ConfigError: it exists without `resume`, does not exist with it, or another process has it.
        """
        path = path.expanduser().resolve()
        if resume and not is_run(path):
            raise ConfigError(f"--resume: {path} holds no run; leave --resume out to start one, or give run.dir=RUN")
        try:
            path.mkdir(parents=True, exist_ok=True)
            lock = (path / ".lock").open("a+", encoding="utf-8")
        except OSError as error:
            raise ConfigError(f"run.dir: {path} cannot be written: {error.strerror}") from None
        _take_lock(lock, path)
        try:
            if not resume and (existing := _what_exists(path)):
                raise ConfigError(
                    f"run.dir: {path} already holds {existing}; add --resume to go on, or give another run.dir"
                )
            previous = read_run(path) if resume else {}
        except ConfigError:
            lock.close()
            raise
        folder = cls(path, lock, previous)
        for name in ("checkpoints", "logs", "tb"):
            (path / name).mkdir(exist_ok=True)
        folder.update(
            generation=int(previous.get("generation", 0)) + 1,
            status="starting",
            started=time.strftime("%Y-%m-%dT%H:%M:%S%z"),
            lock={"host": socket.gethostname(), "pid": os.getpid()},
        )
        return folder

    @property
    def generation(self) -> int:
        return int(self._record["generation"])

    @property
    def checkpoints(self) -> Path:
        return self.path / "checkpoints"

    @property
    def logs(self) -> Path:
        return self.path / "logs"

    def update(self, **fields: Any) -> None:
        """Changes fields of run.json, atomically."""
        self._record.update(fields)
        _write_atomically(self.path / RUN_FILE, json.dumps(self._record, indent=2) + "\n")

    def begin_generation(self, generation: int) -> None:
        """The workers of this start have begun again, as generation `generation`."""
        if generation > self.generation:
            self.update(generation=generation)

    def shards_are(self, addresses: Sequence[str]) -> None:
        """Where the shards listen, for `embershard status`."""
        if self._record.get("shards") != list(addresses):
            self.update(shards=list(addresses))

    def save_config(self, text: str) -> None:
        _write_atomically(self.path / CONFIG_FILE, text)

    def record(self, metrics: Mapping[str, Any]) -> None:
        """One line of metrics.jsonl, and a TensorBoard scalar for each number in it, at its `step`.

        After one with `steps_redone`, TensorBoard shows nothing any more of the steps that are done again.
        """
        if self._metrics is None:
            self._metrics = (self.path / METRICS_FILE).open("a", encoding="utf-8")
        self._metrics.write(
            json.dumps({"time": round(time.time(), 3), "generation": self.generation, **metrics}) + "\n"
        )
        self._metrics.flush()
        step, again = int(metrics.get("step", 0)), "steps_redone" in metrics
        if again and self._tensorboard is not None:
            self._tensorboard.close()
            self._tensorboard = None
        if self._tensorboard is None:
            from torch.utils.tensorboard import SummaryWriter

            self._tensorboard = SummaryWriter(str(self.path / "tb"), purge_step=step + again)
        for name, value in _scalars(metrics):
            self._tensorboard.add_scalar(name, value, step)

    def close(self, status: str) -> None:
        """Writes the run's last status and lets go of the lock."""
        if self._tensorboard is not None:
            self._tensorboard.close()
        if self._metrics is not None:
            self._metrics.close()
        self.update(status=status, lock=None)
        self._lock.close()


def newest_run(folder: Path) -> Path:
    """The run in `folder` that said something of itself last. Raises ConfigError: there is none."""
    found = [path for path in folder.glob("*") if is_run(path)]
    if not found:
        raise ConfigError(f"{folder}: no run in here; give the folder of one")
    return max(found, key=lambda path: (path / RUN_FILE).stat().st_mtime_ns)


def read_run(path: Path) -> dict[str, Any]:
    """run.json of a run. Raises ConfigError: missing or damaged."""
    try:
        record = json.loads((path / RUN_FILE).read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise ConfigError(f"{path}: not a run (no {RUN_FILE})") from None
    except ValueError as error:
        raise ConfigError(f"{path / RUN_FILE}: damaged ({error}); remove it to start the run anew") from None
    if not isinstance(record, dict):
        raise ConfigError(f"{path / RUN_FILE}: damaged (not an object); remove it to start the run anew")
    return record


def read_metrics(path: Path) -> list[dict[str, Any]]:
    """All complete lines of metrics.jsonl; a last line that a kill cut short is left out."""
    try:
        text = (path / METRICS_FILE).read_text(encoding="utf-8")
    except FileNotFoundError:
        return []
    return [json.loads(line) for line in text.splitlines(keepends=True) if line.endswith("}\n")]


def _take_lock(lock: TextIO, path: Path) -> None:
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:
        lock.seek(0)
        holder = lock.read().strip() or "another process"
        lock.close()
        raise ConfigError(
            f"run.dir: {path} is being written by {holder}; stop that one, or give another run.dir"
        ) from None
    lock.seek(0)
    lock.truncate()
    lock.write(f"process {os.getpid()} on {socket.gethostname()}")
    lock.flush()


def _what_exists(path: Path) -> str | None:
    if is_run(path):
        return "a run"
    # Never mix a run into somebody's folder of other things; `data` is what the built-in run generates first.
    others = sorted(p.name for p in path.iterdir() if p.name not in {".lock", "data"})
    return f"other files ({others[0]}, ...)" if others else None


def _write_atomically(path: Path, text: str) -> None:
    temporary = path.with_name(f".{path.name}.{os.getpid()}")
    temporary.write_text(text, encoding="utf-8")
    temporary.replace(path)


_NO_SCALARS = {"step", "time", "generation"}


def _scalars(metrics: Mapping[str, Any], above: str = "") -> list[tuple[str, float]]:
    found: list[tuple[str, float]] = []
    for name, value in metrics.items():
        if isinstance(value, Mapping):
            found += _scalars(value, f"{above}{name}/")
        elif isinstance(value, (int, float)) and not isinstance(value, bool) and (above or name not in _NO_SCALARS):
            found.append((above + name, float(value)))
    return found
