"""What a chaos run did, written down, and the judgement whether every acknowledged push counts exactly once.

Every push has whole-numbered gradients that follow from (seed, client, step), for the same rows of two tables: `items`
under SGD with rate 1, whose weights are then exact sums in any order, and `squares` under Adagrad, whose accumulators
are exact sums of squares. The last column of every gradient is 1, so it counts pushes. A history is JSON, one record
per line, appended by all processes of a run; the check needs nothing but it and the tables at the end.
"""

from __future__ import annotations

import itertools
import json
import os
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from ..parameter_server.checkpoint import read_block, read_manifest
from ..parameter_server.kernels import rows_of_share
from ..parameter_server.tables import Initializer, Optimizer, TableSpec
from .errors import ConfigError

HISTORY_FILE = "history.jsonl"
FINAL = "final"  # the checkpoint that is compared, in the same folder
KINDS = ("kill", "stop", "partition", "rescale")
FAULTS_PER_MINUTE = 6
VALUES = {"items": "weight", "squares": "sum"}
"""Table -> what of it is compared."""
MAX_UNKNOWN = 12  # pushes to one block that were never answered: every subset of them is tried


@dataclass(frozen=True)
class Workload:
    """rows, width: of both tables; touched: distinct rows of every push."""

    seed: int
    rows: int = 2000
    width: int = 4
    touched: int = 32

    def gradients(self, client: int, step: int) -> tuple[np.ndarray, np.ndarray]:
        """Rows, int64 [touched], and whole numbers from -3 to 3, float32 [touched, width], 1 in the last column."""
        generator = np.random.default_rng((self.seed, client, step))
        rows = generator.choice(self.rows, self.touched, replace=False, shuffle=False)
        grads = generator.integers(-3, 4, (self.touched, self.width)).astype(np.float32)
        grads[:, -1] = 1
        return rows, grads

    def tables(self) -> list[TableSpec]:
        zero = Initializer(kind="constant", scale=0.0)
        kinds = {"items": Optimizer(kind="sgd"), "squares": Optimizer(kind="adagrad")}
        return [
            TableSpec(name=name, rows=self.rows, width=self.width, initializer=zero, optimizer=kinds[name])
            for name in VALUES
        ]


class Recorder:
    """Appends to a history; several processes may append to the same one."""

    def __init__(self, path: Path) -> None:
        self._file = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND | os.O_CLOEXEC, 0o600)

    def write(self, what: str, **fields: Any) -> None:
        record = {"what": what, **fields, "at": round(time.time(), 4)}
        os.write(self._file, (json.dumps(record) + "\n").encode())

    def close(self) -> None:
        os.close(self._file)


@dataclass
class _Push:
    generation: int
    client: int
    step: int
    sync: bool
    acknowledged: bool = False


@dataclass
class History:
    """A history that was read. began: generation -> the step that it went on from; ends: when pushes ended, seconds."""

    workload: Workload
    pushes: list[_Push] = field(default_factory=list)
    began: dict[int, int] = field(default_factory=dict)
    faults: list[dict[str, Any]] = field(default_factory=list)
    acknowledged_at: list[float] = field(default_factory=list)

    @classmethod
    def read(cls, path: Path) -> History:
        """A last line that a kill cut short is left out.

        Raises:
            ValueError: not a history; names file and line.
        """
        history: History | None = None
        pushes: dict[tuple[int, int, int], _Push] = {}
        for number, line in enumerate(path.read_text(encoding="utf-8").splitlines(keepends=True), 1):
            if not line.endswith("\n"):
                break
            try:
                record = json.loads(line)
                what, at = record.pop("what"), record.pop("at")
                if what == "workload":
                    history = cls(Workload(**record))
                elif history is None:
                    raise ValueError("the workload comes first")
                elif what == "generation":
                    history.began[record["generation"]] = record["step"]
                elif what == "fault":
                    history.faults.append({**record, "at": at})
                else:
                    key = (record["generation"], record["client"], record["step"])
                    if what == "issued":
                        pushes[key] = _Push(*key, sync=record["sync"])
                    else:
                        pushes[key].acknowledged = True
                        history.acknowledged_at.append(at)
            except (KeyError, TypeError, ValueError) as error:
                raise ValueError(f"{path}:{number}: not a line of a history: {error}") from None
        if history is None:
            raise ValueError(f"{path}: empty, not a history")
        history.pushes = list(pushes.values())
        return history

    def undone(self, push: _Push) -> bool:
        """Whether a later generation went back to before it."""
        return any(later > push.generation and step < push.step for later, step in self.began.items())

    def longest_stall(self) -> float:
        """The longest time without an acknowledgement between the first and the last, in seconds."""
        return max((b - a for a, b in itertools.pairwise(sorted(self.acknowledged_at))), default=0.0)


@dataclass(frozen=True)
class TableState:
    """One table at the end. values: float32 [rows, width], NaN where a row was not found; block: int64 [rows]."""

    values: np.ndarray
    block: np.ndarray


def read_tables(directory: str) -> dict[str, TableState]:
    """What a checkpoint holds of the two tables. Raises CheckpointError: missing or damaged."""
    manifest = read_manifest(directory)
    found = {}
    for name, part in VALUES.items():
        spec = manifest.table(name)
        if spec is None:
            raise ValueError(f"checkpoint {directory} has no table {name!r}: it is not that of a chaos run")
        values = np.full((spec.rows, spec.width), np.nan, np.float32)
        block = np.full(spec.rows, -1, np.int64)
        for entry in manifest.files:
            share = read_block(directory, entry)[f"{name}/{part}"]
            rows = np.empty(len(share), np.int64)
            rows_of_share(entry.block, manifest.blocks, spec.rows, np.uint64(spec.key), rows)
            values[rows], block[rows] = share, entry.block
        found[name] = TableState(values, block)
    return found


@dataclass
class Verdict:
    """rows_*: of both tables together. A row that was changed otherwise than by counting wrong is lost and doubled."""

    pushes_acknowledged: int = 0
    pushes_unknown: int = 0  # never answered: either is right, but whole within a block
    pushes_undone: int = 0  # of generations that went back
    rows_touched: int = 0
    rows_compared: int = 0
    rows_lost: int = 0
    rows_doubled: int = 0
    longest_stall_seconds: float = 0.0
    faults_injected: dict[str, int] = field(default_factory=dict)

    def as_dict(self) -> dict[str, Any]:
        return asdict(self)

    @property
    def nothing_lost(self) -> bool:
        return self.rows_lost == self.rows_doubled == 0 and self.rows_compared == self.rows_touched > 0


@dataclass(frozen=True)
class _Contribution:
    """What is applied as one: a push, or a step of `sync`. delta: float64 [rows, width] by table."""

    rows: np.ndarray
    delta: dict[str, np.ndarray]
    certain: bool


def check(history: History, tables: Mapping[str, TableState]) -> Verdict:
    """Compares the tables at the end with what the history says must be in them.

    Raises:
        ValueError: tables of another shape, or too many pushes to one block that were never answered.
    """
    surviving = [push for push in history.pushes if not history.undone(push)]
    verdict = Verdict(
        pushes_acknowledged=sum(push.acknowledged for push in history.pushes),
        pushes_unknown=sum(not push.acknowledged for push in surviving),
        pushes_undone=len(history.pushes) - len(surviving),
        longest_stall_seconds=round(history.longest_stall(), 2),
    )
    for fault in history.faults:
        verdict.faults_injected[fault["kind"]] = verdict.faults_injected.get(fault["kind"], 0) + 1
    workload = history.workload
    touched = np.zeros(workload.rows, np.bool_)
    for push in history.pushes:
        touched[workload.gradients(push.client, push.step)[0]] = True
    contributions = list(_contributions(workload, surviving))
    for name in VALUES:
        state = tables[name]
        if state.values.shape != (workload.rows, workload.width):
            raise ValueError(f"table {name!r} is {list(state.values.shape)}, not {[workload.rows, workload.width]}")
        verdict.rows_touched += int(touched.sum())
        verdict.rows_compared += int((touched & ~np.isnan(state.values).any(axis=1)).sum())
        lost, doubled = _compare(name, state, contributions)
        verdict.rows_lost += lost
        verdict.rows_doubled += doubled
    return verdict


def _contributions(workload: Workload, pushes: Sequence[_Push]) -> Iterator[_Contribution]:
    steps: dict[tuple[int, int], list[_Push]] = {}
    for push in pushes:
        if push.sync:
            steps.setdefault((push.generation, push.step), []).append(push)
            continue
        rows, grads = workload.gradients(push.client, push.step)
        yield _contribution(rows, grads, push.acknowledged)
    for together in steps.values():  # the optimizer sees the sum of all workers
        parts = [workload.gradients(push.client, push.step) for push in together]
        rows, inverse = np.unique(np.concatenate([rows for rows, _ in parts]), return_inverse=True)
        grads = np.zeros((len(rows), workload.width))
        np.add.at(grads, inverse, np.concatenate([grads for _, grads in parts]))
        yield _contribution(rows, grads, any(push.acknowledged for push in together))


def _contribution(rows: np.ndarray, grads: np.ndarray, certain: bool) -> _Contribution:
    exact = grads.astype(np.float64)
    return _Contribution(rows, {"items": -exact, "squares": exact * exact}, certain)


def _compare(name: str, state: TableState, contributions: Sequence[_Contribution]) -> tuple[int, int]:
    """Rows lost and rows doubled of one table."""
    expected = np.zeros(state.values.shape)
    unknown: dict[int, list[np.ndarray]] = {}  # block -> what may be in it or not
    for one in contributions:
        if one.certain:
            expected[one.rows] += one.delta[name]
            continue
        blocks = state.block[one.rows]
        for block in np.unique(blocks).tolist():
            change = np.zeros_like(expected)
            change[one.rows[blocks == block]] = one.delta[name][blocks == block]
            unknown.setdefault(block, []).append(change)
    for block, changes in unknown.items():
        here = np.flatnonzero(state.block == block)
        expected[here] = _likeliest(state.values[here], expected[here], [change[here] for change in changes], block)
    wrong = (state.values != expected).any(axis=1)
    sign = -1 if name == "items" else 1
    counted, due = sign * state.values[:, -1], sign * expected[:, -1]
    lost, doubled = wrong & (counted < due), wrong & (counted > due)
    odd = wrong & ~lost & ~doubled
    return int((lost | odd).sum()), int((doubled | odd).sum())


def _likeliest(values: np.ndarray, expected: np.ndarray, changes: Sequence[np.ndarray], block: int) -> np.ndarray:
    """`expected` with those changes, each whole or not at all, that leave the fewest rows wrong."""
    if len(changes) > MAX_UNKNOWN:
        raise ValueError(f"block {block}: {len(changes)} pushes were never answered, more than {MAX_UNKNOWN}")
    best, fewest = expected, len(values) + 1
    for chosen in itertools.product((0.0, 1.0), repeat=len(changes)):
        candidate = expected + sum((factor * change for factor, change in zip(chosen, changes, strict=True)), 0.0)
        wrong = int((values != candidate).any(axis=1).sum())
        if wrong < fewest:
            best, fewest = candidate, wrong
    return best


def judge(folder: Path, minutes: float) -> dict[str, Any]:
    """Compares history and final checkpoint of a run; `problems`: why it does not count. minutes: it was to last.

    Raises:
        ConfigError: the folder holds no history. ValueError, CheckpointError: what it holds cannot be read.
    """
    if not (folder / HISTORY_FILE).is_file():
        raise ConfigError(f"{folder}: not the folder of a chaos run (no {HISTORY_FILE})")
    verdict = check(History.read(folder / HISTORY_FILE), read_tables(str(folder / FINAL)))
    return verdict.as_dict() | {"problems": problems_of(verdict, minutes)}


def problems_of(verdict: Verdict, minutes: float) -> list[str]:
    """Why a run does not count; empty if it does."""
    problems = []
    if verdict.rows_lost or verdict.rows_doubled:
        problems.append(f"{verdict.rows_lost} rows lost and {verdict.rows_doubled} doubled")
    if verdict.rows_compared != verdict.rows_touched or not verdict.rows_touched:
        problems.append(f"{verdict.rows_compared} of {verdict.rows_touched} rows touched were compared")
    faults = verdict.faults_injected
    if missing := [kind for kind in KINDS if not faults.get(kind)]:
        problems.append(f"no {', '.join(missing)} was injected")
    if (count := sum(faults.values())) < int(FAULTS_PER_MINUTE * minutes):
        problems.append(f"{count} faults in {minutes:g} minutes are fewer than {FAULTS_PER_MINUTE} a minute")
    return problems
