"""`embershard compare`: methods x ratios x seeds on one dataset, each with the same budget of trials."""

from __future__ import annotations

import hashlib
import itertools
import json
import os
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from pydantic import BaseModel, ConfigDict, Field, field_validator

from ..datasets.files import load_schema
from ..datasets.schema import Schema
from ..workers.embeddings.base import SIZE_OPTIONS, EmbeddingError
from ..workers.embeddings.planning import METHODS, build_method
from ..workers.job import TrainingJob
from ..workers.network import NetworkSpec
from .compare_results import qualities, summarise
from .config import RunConfig
from .errors import ConfigError
from .progress import ProgressReporter

RESULTS, PAGE, CELLS = "results.json", "index.html", "cells"


class Comparison(BaseModel):
    """What is compared. widths, rates: what every method at every ratio may choose from, by the validation rows.

    widths: of the vectors (mlet: of the trained factor); rates: multiples of optimizer.sparse.learning_rate.
    """

    model_config = ConfigDict(extra="forbid", frozen=True)
    methods: tuple[str, ...] = Field(min_length=1)
    ratios: tuple[float, ...] = Field(min_length=1)
    seeds: int = Field(ge=1)
    widths: tuple[int, ...] = Field(min_length=1)
    rates: tuple[float, ...] = Field(min_length=1)

    @field_validator("methods")
    @classmethod
    def _known(cls, methods: tuple[str, ...]) -> tuple[str, ...]:
        for name in methods:
            if name not in METHODS:
                raise ValueError(f"unknown method {name!r}; one of {', '.join(METHODS)}")
        # `full` is what the others are compared with: always there, never at a ratio.
        return tuple(dict.fromkeys(name for name in methods if name != "full"))

    @field_validator("ratios")
    @classmethod
    def _smaller(cls, ratios: tuple[float, ...]) -> tuple[float, ...]:
        for ratio in ratios:
            if not 1 < ratio < float("inf"):
                raise ValueError(f"{ratio:g} is not above 1: a ratio says how many times smaller than `full`")
        return tuple(dict.fromkeys(ratios))

    @property
    def choices(self) -> list[Choice]:
        return [Choice(width, rate) for width, rate in itertools.product(self.widths, self.rates)]


@dataclass(frozen=True)
class Choice:
    """One of the settings that a method may choose."""

    width: int
    rate: float


@dataclass(frozen=True)
class Cell:
    """One training run. ratio 1: `full`."""

    method: str
    ratio: float
    choice: Choice
    seed: int
    job: TrainingJob

    @property
    def name(self) -> str:
        choice = f"w{self.choice.width}-r{self.choice.rate:g}"
        return f"{self.method}-{self.ratio:g}x-{choice}-s{self.seed}"

    @property
    def digest(self) -> str:
        return hashlib.sha256(self.job.model_dump_json().encode()).hexdigest()


# Runs cells, in any order, and yields each with its record as it is done.
Execute = Callable[[Sequence[Cell]], Iterator[tuple[Cell, dict[str, Any]]]]


def compare(
    config: RunConfig, comparison: Comparison, output: Path, execute: Execute, progress: ProgressReporter
) -> dict[str, Any]:
    """Runs what `output` does not hold yet; returns the results (see `compare_results.summarise`).

    The best `full` table over all choices comes first: ratios are taken against its bytes. Then every method chooses,
    with the first seed and by the validation rows (logloss, or a ranker's nDCG@10); what it chose runs with every seed.

    Raises:
        ConfigError: no data to evaluate on, or `output` holds something else.
    """
    open_output(output)
    schema = load_data(config)
    runner = _Runner(output, execute, progress)
    planner = _Planner(config, comparison, schema)
    tuning = [planner.full(choice, 0) for choice in comparison.choices]
    records = runner.run("choosing the width of full", tuning)
    reference = _best(tuning, records)
    planner.reference = reference, records[reference.name]["embedding_bytes"]

    asked = list(itertools.product(comparison.methods, comparison.ratios))
    candidates: dict[tuple[str, float], list[Cell]] = {}
    reasons: dict[tuple[str, float], str] = {}
    for method, ratio in asked:
        candidates[method, ratio], reasons[method, ratio] = planner.candidates(method, ratio)
    tuning = [cell for cells in candidates.values() for cell in cells]
    records |= runner.run("every method chooses", tuning)
    chosen = {key: _best(cells, records) for key, cells in candidates.items() if cells}
    finals = [planner.again(cell, s) for cell in (reference, *chosen.values()) for s in range(comparison.seeds)]
    records |= runner.run("every seed", finals)
    return summarise(
        config,
        comparison=comparison.model_dump(mode="json"),
        trials=len(comparison.choices),
        full=_row(reference, finals, records, [planner.full(choice, 0) for choice in comparison.choices]),
        rows=[
            _row(chosen[key], finals, records, candidates[key])
            if key in chosen
            else {"method": key[0], "ratio": key[1], "unreachable": reasons[key]}
            for key in asked
        ],
    )


def load_data(config: RunConfig) -> Schema:
    """The columns of the data.

    Raises:
        ConfigError: nothing to train or to evaluate on. DataError: it cannot be read.
    """
    if config.data.path is None or config.data.eval_path is None:
        raise ConfigError("data.eval_path: `compare` needs data.path to train on and data.eval_path to evaluate on")
    load_schema(config.data.eval_path, config.data, labels=True)
    return load_schema(config.data.path, config.data, labels=True)


def open_output(output: Path) -> None:
    """Creates the folder of a comparison, or finds one.

    Raises:
        ConfigError: it holds something else.
    """
    if output.exists() and not (output / CELLS).is_dir() and (output.is_file() or any(output.iterdir())):
        raise ConfigError(f"--output {output}: holds something that is not a comparison; give an empty or new folder")
    (output / CELLS).mkdir(parents=True, exist_ok=True)


def _best(cells: Sequence[Cell], records: dict[str, dict[str, Any]]) -> Cell:
    """By the validation rows."""

    def badness(cell: Cell) -> float:
        measured = records[cell.name]["validation"]
        first = qualities(measured)[0]
        return -first.sign * float(measured[first.key])

    return min(cells, key=badness)


def _row(cell: Cell, finals: Iterable[Cell], records: dict[str, Any], tried: Sequence[Cell]) -> dict[str, Any]:
    own = [one for one in finals if (one.method, one.ratio) == (cell.method, cell.ratio)]
    return {
        "method": cell.method,
        "ratio": cell.ratio,
        "choice": asdict(cell.choice),
        "trials": [{**asdict(one.choice), "validation": records[one.name]["validation"]} for one in tried],
        "runs": [{"seed": one.job.seed, **records[one.name]} for one in own],
    }


class _Planner:
    """Turns (method, ratio, choice, seed) into jobs. `reference`: the best `full`, and the bytes of its embeddings."""

    reference: tuple[Cell, int]

    def __init__(self, config: RunConfig, comparison: Comparison, schema: Schema) -> None:
        self._config = config
        self._comparison = comparison
        self._schema = schema

    def full(self, choice: Choice, seed: int) -> Cell:
        return Cell("full", 1.0, choice, seed, self._job("full", choice, seed, {"dim": choice.width}))

    def again(self, cell: Cell, seed: int) -> Cell:
        """The same cell with another seed."""
        job = cell.job.model_copy(update={"seed": self._config.seed + seed})
        return Cell(cell.method, cell.ratio, cell.choice, seed, job)

    def candidates(self, method: str, ratio: float) -> tuple[list[Cell], str]:
        """The choices with which the method gets that small; if none does, why the last one does not."""
        found, reason = [], ""
        for choice in self._comparison.choices:
            try:
                cell = Cell(method, ratio, choice, 0, self._job(method, choice, 0, self._sizes(method, ratio, choice)))
                spec = NetworkSpec.plan(
                    self._schema, cell.job.embedding, cell.job.model, cell.job.optimizer.sparse.update, cell.job.seed
                )
                for feature in spec.features:
                    build_method(feature, spec.optimizer)
                found.append(cell)
            except EmbeddingError as error:
                reason = str(error)
        return found, reason

    def _sizes(self, method: str, ratio: float, choice: Choice) -> dict[str, Any]:
        """Settings with which the *exported* embeddings are `ratio` times smaller than the reference."""
        reference, full_bytes = self.reference
        if "ratio" in METHODS[method].options:
            return {"dim": choice.width, "bytes": int(full_bytes / ratio)}
        # MLET is exported as a table of width `dim`, whatever the width of the factor that is trained.
        dim = int(reference.choice.width / ratio)
        if dim < 1 or choice.width < dim:
            raise EmbeddingError(f"{method} keeps a vector per id: at most {reference.choice.width} times smaller")
        return {"dim": dim, "inner_dim": choice.width}

    def _job(self, method: str, choice: Choice, seed: int, sizes: dict[str, Any]) -> TrainingJob:
        config = self._config
        # What the configuration says of a method's shape stays where the method takes it; sizes are set here.
        ours = ("ratio", "rows", "moduli", "inner_dim", "token_rows", "weight_rows")
        dropped = [name for name in SIZE_OPTIONS if name in ours or name not in METHODS[method].options]
        update = {**dict.fromkeys(dropped), "bytes": None, "method": method, **sizes}
        sparse = config.optimizer.sparse
        rate = sparse.model_copy(update={"learning_rate": sparse.learning_rate * choice.rate})
        return config.job().model_copy(
            update={
                "embedding": config.embedding.model_copy(update=update),
                "optimizer": config.optimizer.model_copy(update={"sparse": rate}),
                "seed": config.seed + seed,
            }
        )


class _Runner:
    """Cells that are done stand in OUTPUT/cells; a cell whose job has changed since runs again."""

    def __init__(self, output: Path, execute: Execute, progress: ProgressReporter) -> None:
        self._folder = output / CELLS
        self._execute = execute
        self._progress = progress

    def run(self, stage: str, cells: Sequence[Cell]) -> dict[str, dict[str, Any]]:
        """The record of each cell, by name."""
        records = {cell.name: record for cell in cells if (record := self._read(cell)) is not None}
        missing = [cell for cell in cells if cell.name not in records]
        self._progress.note(f"{stage}: {len(missing)} of {len(cells)} runs to do")
        for done, (cell, record) in enumerate(self._execute(missing), 1):
            self._write(cell, record)
            records[cell.name] = record
            first = qualities(record["validation"])[0]
            measured = f"validation {first.name} {record['validation'][first.key]:.5f}"
            self._progress.note(
                f"{done}/{len(missing)} {cell.name}: {measured}, trained {record['train_seconds']:.1f} s"
            )
        return records

    def _read(self, cell: Cell) -> dict[str, Any] | None:
        try:
            kept = json.loads((self._folder / f"{cell.name}.json").read_text())
        except (OSError, ValueError):
            return None
        record: dict[str, Any] = kept["record"]
        return record if kept["digest"] == cell.digest else None

    def _write(self, cell: Cell, record: dict[str, Any]) -> None:
        path = self._folder / f"{cell.name}.json"
        temporary = path.with_suffix(".tmp")
        temporary.write_text(json.dumps({"digest": cell.digest, "record": record}))
        os.replace(temporary, path)
