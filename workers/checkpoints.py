"""When checkpoints are written and which one a run begins with; how they look is the parameter server's affair."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from concurrent.futures import Future
from contextlib import suppress
from dataclasses import dataclass
from typing import Any

import fsspec
import numpy as np

from ..parameter_server import checkpoint
from ..parameter_server.files import MANIFEST, CheckpointError, read_signed, write_signed
from ..parameter_server.store import Store, StoreError

BEST = "best.json"  # which checkpoint was evaluated best so far


@dataclass
class Found:
    """What a run goes on from. state: as it was given to `Checkpoints.save`; tensors: the dense part."""

    path: str
    step: int
    state: dict[str, Any]
    tensors: dict[str, np.ndarray]


class Checkpoints:
    """The checkpoints of a run, below `directory`: one at a time, written in the background.

    The newest `keep` stay, and the best one (`judge`).
    """

    def __init__(
        self,
        directory: str,
        store: Store,
        keep: int,
        report: Callable[[dict[str, Any]], object] = lambda record: None,
    ) -> None:
        self.newest: str | None = None
        self.directory = directory.rstrip("/")
        self._store = store
        self._keep = keep
        self._report = report
        self._writing: tuple[str, Future[dict[str, Any]]] | None = None
        self._best: dict[str, Any] | None = None

    @property
    def best(self) -> str | None:
        """The checkpoint that was evaluated best; None before the first evaluation of one."""
        best = self._read_best()
        return f"{self.directory}/{_name(best['step'])}" if best else None

    def judge(self, step: int, metric: str, value: float) -> None:
        """What the evaluation at `step` said of the checkpoint of that step; higher is better."""
        best = self._read_best()
        if best is None or best["metric"] != metric or value > best["value"]:
            self._best = {"step": step, "metric": metric, "value": value}
            write_signed(self.directory, BEST, self._best)

    def _read_best(self) -> dict[str, Any] | None:
        if self._best is None:
            with suppress(CheckpointError):
                self._best = read_signed(self.directory, BEST)
        return self._best

    def save(self, step: int, tensors: Mapping[str, np.ndarray], state: Mapping[str, Any]) -> None:
        """Returns when the cut stands on every shard. Every push must have been acknowledged.

        Raises:
            CheckpointError: the previous one could not be written.
        """
        self.finish()
        path = f"{self.directory}/{_name(step)}"
        self._writing = (path, self._store.save(path, step=step, tensors=tensors, state=state))

    def finish(self) -> bool:
        """Until the checkpoint being written is complete; then removes those that are too many.

        False: there is none, because a shard failed meanwhile; that was reported, and training may go on.
        """
        if self._writing is None:
            return True
        path, future = self._writing
        self._writing = None
        try:
            future.result()
        except StoreError as error:  # a shard that restarted has lost its cut
            self._report({"note": f"{path} was not written: {error}"})
            return False
        self.newest = path
        self._remove_old()
        return True

    def _remove_old(self) -> None:
        fs, root = fsspec.core.url_to_fs(self.directory)
        names = sorted(name.rstrip("/").rsplit("/", 1)[-1] for name in fs.ls(root, detail=False))
        steps = [name for name in names if name.startswith("step-")]
        kept = [name for name in steps if fs.exists(f"{root}/{name}/{MANIFEST}")][-self._keep :]
        if best := self._read_best():
            kept.append(_name(best["step"]))
        for name in [name for name in steps if name not in kept]:
            # Without its manifest it is no checkpoint any more, however far the rest of the removal gets.
            if fs.exists(manifest := f"{root}/{name}/{MANIFEST}"):
                fs.rm(manifest)
            fs.rm(f"{root}/{name}", recursive=True)


def _name(step: int) -> str:
    return f"step-{step:09d}"


def newest(directory: str) -> tuple[Found | None, list[str]]:
    """The newest checkpoint below `directory` that verifies, and what was skipped on the way, and why."""
    path, skipped = checkpoint.latest(directory)
    if path is None:
        return None, skipped
    manifest = checkpoint.read_manifest(path)
    return Found(path, manifest.step, manifest.state, checkpoint.read_dense(path, manifest)), skipped


def load_by_name(store: Store, path: str) -> str:
    """`train.init_from`: loads the tables that fit by name; returns a line on what was loaded and what was not.

    Raises:
        CheckpointError: missing or damaged, or not one table fits.
    """
    saved = {table.name: table for table in checkpoint.read_manifest(path).tables}
    here = {table.name: table for table in store.layout.tables}
    shared = [name for name in here if name in saved]
    fits = [n for n in shared if (here[n].rows, here[n].width) == (saved[n].rows, saved[n].width)]
    lists = {
        "new here": [name for name in here if name not in saved],
        "dropped": [name for name in saved if name not in here],
        "of another shape": [
            f"{n} ({saved[n].rows} x {saved[n].width} there, {here[n].rows} x {here[n].width} here)"
            for n in shared
            if n not in fits
        ],
    }
    rest = "".join(f"; {what}: {', '.join(names)}" for what, names in lists.items() if names)
    if not fits:
        raise checkpoint.CheckpointError(f"train.init_from: no table of {path} fits this run{rest}")
    store.load(path, {name: name for name in fits})
    return f"init_from {path}: {len(fits)} tables loaded{rest}"
