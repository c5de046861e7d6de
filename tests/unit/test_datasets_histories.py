"""Histories: who is in which part, what is dealt, how items are numbered."""

from __future__ import annotations

import sys
from collections import Counter
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest
from embershard.cluster.cli import main
from embershard.datasets.files import load_schema
from embershard.datasets.histories import convert_histories
from embershard.datasets.schema import DataError


def people(folder: Path) -> list[dict[str, list[int]]]:
    return pq.read_table(folder).select(["history", "liked"]).to_pylist()


@pytest.fixture
def log(tmp_path: Path) -> tuple[Path, dict[int, set[int]]]:
    """Ratings from 1 to 5 of 60 people, some pairs twice; and what each likes."""
    rng = np.random.default_rng(0)
    users, ratings = rng.integers(0, 60, 1500), rng.integers(1, 6, 1500)
    items = (rng.random(1500) ** 3 * 50).astype(int) * 3 + 7
    lines = [f"{u},{i},{r}" for u, i, r in zip(users, items, ratings, strict=True)]
    (tmp_path / "log.csv").write_text("user,item,rating\n" + "\n".join(lines + lines[:100]) + "\n")
    liked: dict[int, set[int]] = {}
    for u, i, r in zip(users.tolist(), items.tolist(), ratings.tolist(), strict=True):
        if r >= 4:
            liked.setdefault(u, set()).add(i)
    return tmp_path / "log.csv", liked


def test_each_persons_items_are_dealt_in_halves_and_nobody_stands_twice(
    log: tuple[Path, dict[int, set[int]]], tmp_path: Path
) -> None:
    source, liked = log
    summary = convert_histories([str(source)], str(tmp_path / "out"), seed=3)
    rows = {part: people(tmp_path / "out" / part) for part in ("train", "eval")}
    assert summary["people"] == {part: len(own) for part, own in rows.items()} == {"train": 48, "eval": 12}
    assert summary["items"] == len(set().union(*liked.values()))
    for row in [*rows["train"], *rows["eval"]]:
        assert row["history"] == sorted(set(row["history"]) - set(row["liked"]))
    sizes = [len(row["history"]) + len(row["liked"]) for row in rows["train"]]
    assert not Counter(sizes) - Counter(map(len, liked.values()))
    assert {len(row["history"]) - len(row["liked"]) for row in rows["train"]} == {0, 1}
    counts = np.bincount([i for row in rows["train"] for bag in row.values() for i in bag], minlength=summary["items"])
    assert (np.diff(counts) <= 0).all() and summary["items_to_find"] == np.count_nonzero(counts)
    schema = load_schema(str(tmp_path / "out" / "eval"))
    assert [(c.name, c.bag, c.cardinality) for c in schema.categorical] == [
        ("history", True, summary["items"]),
        ("liked", True, summary["items_to_find"]),
    ]


def test_the_seed_decides(log: tuple[Path, dict[int, set[int]]], tmp_path: Path) -> None:
    for name, seed in (("a", 1), ("b", 1), ("c", 2)):
        convert_histories([str(log[0])], str(tmp_path / name), seed=seed)
    a, b, c = (people(tmp_path / name / "train") for name in "abc")
    assert a == b != c


def test_several_deals_split_anew_what_those_to_train_on_like(
    log: tuple[Path, dict[int, set[int]]], tmp_path: Path
) -> None:
    convert_histories([str(log[0])], str(tmp_path / "once"), seed=3)
    summary = convert_histories([str(log[0])], str(tmp_path / "out"), seed=3, deals=3)
    assert summary["people"] == {"train": 48, "eval": 12} and summary["rows"] == {"train": 144, "eval": 12}
    assert people(tmp_path / "out" / "eval") == people(tmp_path / "once" / "eval")
    rows = people(tmp_path / "out" / "train")
    assert rows[:48] == people(tmp_path / "once" / "train")
    deals = [rows[begin : begin + 48] for begin in (0, 48, 96)]
    for dealt in zip(*deals, strict=True):
        assert len({tuple(sorted(row["history"] + row["liked"])) for row in dealt}) == 1
    assert sum(first["history"] != other["history"] for first, other in zip(*deals[:2], strict=True)) > 40
    assert load_schema(str(tmp_path / "out" / "train")).rows == 144


def test_rare_items_are_known_but_not_to_be_found(log: tuple[Path, dict[int, set[int]]], tmp_path: Path) -> None:
    plain = convert_histories([str(log[0])], str(tmp_path / "plain"))
    summary = convert_histories([str(log[0])], str(tmp_path / "out"), found_by=10)
    train = people(tmp_path / "plain" / "train")
    counts = np.bincount([i for row in train for bag in row.values() for i in bag], minlength=plain["items"])
    assert summary["items"] == plain["items"] and summary["items_to_find"] == (counts >= 10).sum() < plain["items"]
    limit = summary["items_to_find"]
    kept = [row | {"liked": [i for i in row["liked"] if i < limit]} for row in train]
    assert people(tmp_path / "out" / "train") == [row for row in kept if row["liked"]]


def test_when_one_folder_cannot_be_written_the_other_is_not_either(
    log: tuple[Path, dict[int, set[int]]], tmp_path: Path
) -> None:
    output = tmp_path / "out"
    (output / "eval").mkdir(parents=True)
    (output / "eval" / "old").touch()
    with pytest.raises(DataError, match="out/eval: exists already; remove it or name another output"):
        convert_histories([str(log[0])], str(output))
    assert [path.name for path in output.iterdir()] == ["eval"]


def test_nobody_left_is_an_error(tmp_path: Path) -> None:
    (tmp_path / "log.csv").write_text("user,item\n1,2\n2,3\n")
    with pytest.raises(DataError, match="nobody is left for train: give more rows, or a lower --found-by"):
        convert_histories([str(tmp_path / "log.csv")], str(tmp_path / "out"))
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (("criteo", "--histories"), "--histories is for movielens and interactions without --negatives, not criteo"),
        (("interactions", "--histories", "--negatives", "2"), "without --negatives, not --negatives"),
        (("interactions", "--found-by", "2"), "--found-by is for --histories"),
        (("interactions", "--deals", "2"), "--deals is for --histories"),
    ],
)
def test_wrong_options(
    arguments: tuple[str, ...], says: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(sys, "argv", ["embershard", "convert", *arguments, "in", "out"])
    with pytest.raises(SystemExit) as end:
        main()
    assert end.value.code == 2 and says in capsys.readouterr().err
