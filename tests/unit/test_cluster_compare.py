"""`compare` without Ray: equal bytes, choices by validation rows, resuming, and the page."""

from __future__ import annotations

import json
import re
import sys
import xml.etree.ElementTree as ElementTree
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest
import scipy.stats
from embershard.cluster.cli import main
from embershard.cluster.compare import Cell, Comparison, compare
from embershard.cluster.compare_page import page
from embershard.cluster.compare_results import student_t, table
from embershard.cluster.config import RunConfig
from embershard.cluster.errors import ConfigError
from embershard.cluster.progress import ProgressReporter
from embershard.datasets.synthetic import generate
from embershard.workers.embeddings.planning import METHODS
from embershard.workers.trial import run_trial

CARDINALITIES = (7, 300, 2000)
FULL_BYTES = 4 * 8 * sum(CARDINALITIES)


@pytest.fixture(scope="module")
def config(tmp_path_factory: pytest.TempPathFactory) -> RunConfig:
    folder = tmp_path_factory.mktemp("data")
    for name, rows in (("train", 600), ("eval", 401)):
        generate(str(folder / name), rows=rows, seed=rows, cardinalities=CARDINALITIES, dense=2)
    paths = [f"data.path={folder / 'train'}", f"data.eval_path={folder / 'eval'}", "data.batch_size=200"]
    paths.append("data.eval_batch_size=51")  # odd: rows, not batches, begin with validation
    return RunConfig.load(None, *paths, "model.top=[8]", "model.bottom=[8]", "embedding.dim=8", "seed=5")


def comparison(**changes: Any) -> Comparison:
    asked = {"methods": ("hash",), "ratios": (4.0,), "seeds": 2, "widths": (8,), "rates": (1.0,)}
    return Comparison(**{**asked, **changes})


class Recorder:
    """Runs cells here, or makes their records up; remembers which."""

    def __init__(self, record: Any = None) -> None:
        self.ran: list[Cell] = []
        self._record = record or (lambda cell: run_trial(cell.job, 20))

    def __call__(self, cells: Sequence[Cell]) -> Iterator[tuple[Cell, dict[str, Any]]]:
        for cell in cells:
            self.ran.append(cell)
            yield cell, self._record(cell)


def invented(cell: Cell) -> dict[str, Any]:
    """Width 4 is best on the validation rows and worst on the test rows."""
    validation = 0.3 if cell.choice.width == 4 else 0.5
    quality = {"auc": 0.8 - 0.01 * cell.seed, "normalized_entropy": 1.0, "calibration": 1.0, "samples": 10}
    size = cell.job.embedding.bytes or 4 * cell.choice.width * sum(CARDINALITIES)
    return {
        "validation": {**quality, "logloss": validation},
        "test": {**quality, "logloss": 0.9 - validation + (0.02 * cell.seed if cell.method == "hash" else 0)},
        "embedding_bytes": size,
        "model_bytes": size + 10,
        "training_bytes": size,
        "steps": 3,
        "train_seconds": 1.0,
        "lookup_us": 9.0,
    }


@pytest.fixture
def quiet() -> ProgressReporter:
    return ProgressReporter()


def test_methods_run_at_equal_bytes(config: RunConfig, tmp_path: Path, quiet: ProgressReporter) -> None:
    """Really trained; the exported bytes of each are at most those asked for, and near them."""
    methods = ("hash", "qr", "memcom", "mlet", "narrow", "mem_rec")
    asked = comparison(methods=methods, ratios=(2.0,), seeds=1)
    results = compare(config, asked, tmp_path / "out", Recorder(), quiet)
    rows = {row["method"]: row for row in results["rows"]}
    assert rows["full"]["embedding_bytes"] == rows["full"]["training_bytes"] == FULL_BYTES
    for method in methods:
        # narrow: 3 of 8 columns, since 4 and the projection are more than half
        least = 0.7 if method == "narrow" else 0.9
        assert least * FULL_BYTES / 2 <= rows[method]["embedding_bytes"] <= FULL_BYTES / 2, method
        assert 0 < rows[method]["logloss"]["mean"] < 1 and rows[method]["lookup_us"] > 0
    assert rows["mlet"]["training_bytes"] > 1.9 * rows["mlet"]["embedding_bytes"]
    run = rows["full"]["runs"][0]
    assert (run["validation"]["samples"], run["test"]["samples"]) == (201, 200)
    assert run["validation"]["logloss"] != run["test"]["logloss"]


def test_every_method_chooses_by_validation_rows_and_ratios_follow_the_best_full(
    config: RunConfig, tmp_path: Path, quiet: ProgressReporter
) -> None:
    recorder = Recorder(invented)
    asked = comparison(widths=(8, 4), rates=(1.0, 3.0), methods=("hash", "full"), ratios=(4.0, 8.0), seeds=3)
    results = compare(config, asked, tmp_path, recorder, quiet)
    full, hashed, _ = results["rows"]
    assert full["choice"]["width"] == hashed["choice"]["width"] == 4
    assert hashed["embedding_bytes"] == 4 * 4 * sum(CARDINALITIES) // 4  # a quarter of the best full, of width 4
    assert hashed["actual_ratio"] == pytest.approx(4, rel=1e-3)
    assert results["trials_per_method"] == len(hashed["trials"]) == len(full["trials"]) == 4
    assert [run["seed"] for run in hashed["runs"]] == [5, 6, 7]
    # test logloss: full 0.6 throughout; hash 0.60, 0.62, 0.64
    quality = hashed["logloss"]
    names = ("mean", "deviation", "difference", "difference_deviation", "change")
    assert [quality[name] for name in names] == pytest.approx([0.62, 0.02, 0.02, 0.02, 0.02 / 0.6])
    half = scipy.stats.t.ppf(0.975, 2) * 0.02 / 3**0.5
    assert quality["interval"] == pytest.approx([0.02 - half, 0.02 + half], rel=1e-4)
    assert quality["change_interval"] == pytest.approx([end / 0.6 for end in quality["interval"]])
    assert full["logloss"]["difference"] == 0
    names = [cell.name for cell in recorder.ran]
    assert len(names) == len(set(names)) == 3 * 4 + 3 * 2  # the trial with the first seed is the first run
    rates = {cell.job.optimizer.sparse.learning_rate for cell in recorder.ran if cell.choice.rate == 3}
    assert rates == {3 * config.optimizer.sparse.learning_rate}


def test_quantiles_are_those_of_student() -> None:
    for freedom in (*range(1, 15), 29, 100):
        assert student_t(freedom) == pytest.approx(scipy.stats.t.ppf(0.975, freedom), rel=2e-4), freedom


def test_rankers_choose_the_highest_ndcg(config: RunConfig, tmp_path: Path, quiet: ProgressReporter) -> None:
    def ranked(cell: Cell) -> dict[str, Any]:
        def at(value: float) -> dict[str, Any]:
            return {"ndcg_at_10": value, "samples": 10}

        found = 0.4 if cell.choice.width == 4 else 0.3
        worse = 0.0 if cell.method == "full" else 0.02 + 0.01 * cell.seed
        return invented(cell) | {"validation": at(found), "test": at(0.5 - worse)}

    asked = comparison(widths=(8, 4))
    results = json.loads(json.dumps(compare(config, asked, tmp_path, Recorder(ranked), quiet)))
    full, hashed = results["rows"]
    assert full["choice"]["width"] == hashed["choice"]["width"] == 4
    assert [trial["validation"]["ndcg_at_10"] for trial in hashed["trials"]] == [0.3, 0.4]
    assert hashed["ndcg_at_10"]["change"] == pytest.approx(-0.05) and "auc" not in hashed
    shown = table(results)[1]["nDCG@10 - full"]
    assert re.fullmatch(r"-0.02500 \[-0.08853, \+0.03853\] -5.0 %", shown), shown
    html = page(results)
    assert html.count("<svg") == 1 and "nDCG@10 on test people against size" in html and "AUC" not in html


def test_an_interrupted_comparison_goes_on(config: RunConfig, tmp_path: Path, quiet: ProgressReporter) -> None:
    def stops(cell: Cell) -> dict[str, Any]:
        if cell.method == "hash":
            raise KeyboardInterrupt
        return invented(cell)

    with pytest.raises(KeyboardInterrupt):
        compare(config, comparison(), tmp_path, Recorder(stops), quiet)
    again = Recorder(invented)
    compare(config, comparison(), tmp_path, again, quiet)
    assert [cell.name for cell in again.ran] == ["hash-4x-w8-r1-s0", "full-1x-w8-r1-s1", "hash-4x-w8-r1-s1"]
    nothing = Recorder(invented)
    compare(config, comparison(), tmp_path, nothing, quiet)
    assert nothing.ran == []
    changed = Recorder(invented)
    compare(config.model_copy(update={"seed": 6}), comparison(), tmp_path, changed, quiet)
    assert len(changed.ran) == 4
    (tmp_path / "cells" / "hash-4x-w8-r1-s1.json").write_text("{")
    torn = Recorder(invented)
    compare(config.model_copy(update={"seed": 6}), comparison(), tmp_path, torn, quiet)
    assert [cell.name for cell in torn.ran] == ["hash-4x-w8-r1-s1"]


def test_a_ratio_out_of_reach_is_said_and_the_rest_runs(
    config: RunConfig, tmp_path: Path, quiet: ProgressReporter
) -> None:
    asked = comparison(methods=("memcom", "mlet", "hash"), ratios=(50.0,))
    results = compare(config, asked, tmp_path, Recorder(invented), quiet)
    memcom, mlet, hashed = results["rows"][1:]
    assert "embedding.bytes" in memcom["unreachable"] and "at most 8 times smaller" in mlet["unreachable"]
    assert hashed["embedding_bytes"] > 0
    assert [row["embeddings"] for row in table(results)][1:3] == ["not reachable"] * 2
    html = page(results)
    assert "memcom at 50x</b> was not run" in html


def test_the_page_needs_nothing_from_outside(config: RunConfig, tmp_path: Path, quiet: ProgressReporter) -> None:
    asked = comparison(methods=("hash", "qr"), ratios=(2.0, 4.0, 8.0))
    results = json.loads(json.dumps(compare(config, asked, tmp_path, Recorder(invented), quiet)))
    html = page(results)
    assert not re.search(r"https?:|<script|<link|<img|@import|url\(", html)
    drawings = re.findall(r"<svg.*?</svg>", html, re.DOTALL)
    assert len(drawings) == 2
    for drawing in drawings:
        tree = ElementTree.fromstring(drawing)
        circles = [(float(c.get("cx")), float(c.get("cy"))) for c in tree.iter("circle")]  # type: ignore[arg-type]
        assert len(circles) == 7 and all(0 < x < 760 and 0 < y < 420 for x, y in circles)
    logloss = ElementTree.fromstring(drawings[0])
    by_title = {g.findtext("title"): g.find("circle") for g in logloss.iter("g")}
    x = {title.split(":")[0]: float(c.get("cx")) for title, c in by_title.items()}  # type: ignore[union-attr]
    assert x["hash, 8.0 times smaller"] < x["hash, 2.0 times smaller"] < x["full"]
    assert "0.40000" in html and "0.41000" in html and "+0.01000" in html
    assert "trained 2 times" in html and "Where the interval holds 0" in html
    assert re.findall(r"<dt>(full|hash|qr|memcom)</dt><dd>\w", html) == ["full", "hash", "qr"]


@pytest.mark.parametrize("method", METHODS)
def test_the_page_says_what_every_method_is(method: str, config: RunConfig, tmp_path: Path) -> None:
    own = comparison(methods=(method,), seeds=1, ratios=(2.0,)) if method != "full" else comparison(seeds=1)
    results = compare(config, own, tmp_path, Recorder(invented), ProgressReporter())
    assert re.search(rf"<dt>{method}</dt><dd>[a-z].*\.</dd>", page(results)) and "trained once" in page(results)


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (("--methods", "hash,tripple", "--ratios", "4"), "--methods: unknown method 'tripple'; one of full, hash"),
        (("--methods", "hash", "--ratios", "4,x"), "--ratios: '4,x' is not a list of numbers"),
        (("--methods", "hash", "--ratios", "1"), "--ratios: 1 is not above 1"),
        (("--methods", "hash", "--ratios", "4", "data.path=there"), "data.eval_path"),
    ],
)
def test_wrong_options(
    arguments: tuple[str, ...],
    says: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setattr(sys, "argv", ["embershard", "compare", *arguments, "--output", str(tmp_path / "out")])
    with pytest.raises(SystemExit) as end:
        main()
    assert end.value.code == 2
    assert says in capsys.readouterr().err


def test_a_folder_of_something_else(config: RunConfig, tmp_path: Path, quiet: ProgressReporter) -> None:
    (tmp_path / "thesis.tex").write_text("")
    with pytest.raises(ConfigError, match="holds something that is not a comparison"):
        compare(config, comparison(), tmp_path, Recorder(invented), quiet)
