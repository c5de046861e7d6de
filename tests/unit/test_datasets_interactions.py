"""Interactions, MovieLens and Avazu to Parquet."""

import gzip
import re
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest
from embershard.datasets.avazu import CATEGORICAL_NAMES, NAMES, convert_avazu
from embershard.datasets.files import load_schema
from embershard.datasets.interactions import convert_interactions, convert_movielens
from embershard.datasets.schema import DataError

SHARED = Path(__file__).resolve().parents[2].parent / "shared" / "data"


def rows_of(folder: Path) -> list[dict]:
    return [row for file in sorted(folder.glob("*.parquet")) for row in pq.read_table(file).to_pylist()]


def converted(tmp_path: Path, text: str, name: str = "log", **options) -> list[tuple]:
    (tmp_path / name).write_text(text)
    convert_interactions([str(tmp_path / name)], str(tmp_path / "out"), **options)
    return [(row["label"], row["user"], row["item"]) for row in rows_of(tmp_path / "out")]


@pytest.mark.parametrize(
    "text",
    [
        "1,20,4\n1,30,3.5\n2,20,5\n",
        "1\t20\t4\t978300760\n1\t30\t3.999\t0\n2\t20\t4.5\t0\n",
        "1::20::4::978300760\r\n1::30::1::0\r\n2::20::5::0\r\n",
        "rating,item,extra,user_id\n4,20,x,1\n1,30,,1\n5,20,y,2",
        "user,movie,rating\n1,20,4\n1,30,0\n2,20,5",
    ],
)
def test_ratings_become_labels_whatever_separates_the_fields(tmp_path, text):
    assert converted(tmp_path, text) == [(1, 1, 20), (0, 1, 30), (1, 2, 20)]


def test_the_threshold_is_an_option(tmp_path):
    rows = converted(tmp_path, "1,1,3\n1,2,2.5\n1,3,2.4\n", positive_from=2.5)
    assert [label for label, _, _ in rows] == [1, 1, 0]


def test_negatives_are_items_that_the_user_did_not_choose(tmp_path):
    rng = np.random.default_rng(0)
    pairs = sorted({(int(u), int(i)) for u, i in zip(rng.integers(0, 20, 300), rng.integers(0, 60, 300), strict=True)})
    text = "user,item\n" + "".join(f"{u},{i * 7}\n" for u, i in pairs)
    rows = converted(tmp_path, text, negatives=3, seed=5)
    assert rows[::4] == [(1, u, i * 7) for u, i in pairs]
    drawn = [row for at, row in enumerate(rows) if at % 4]
    assert [(label, user) for label, user, _ in drawn] == [(0, u) for u, _ in pairs for _ in range(3)]
    assert not {(user, item // 7) for _, user, item in drawn} & set(pairs)
    assert {item for _, _, item in drawn} <= {i * 7 for _, i in pairs}
    counts = np.bincount([item // 7 for _, _, item in drawn], minlength=60)
    assert counts.std() < 2 * np.sqrt(counts.mean())
    for seed, same in ((5, True), (6, False)):
        (tmp_path / "again").mkdir(exist_ok=True)
        folder = tmp_path / f"again/{seed}"
        convert_interactions([str(tmp_path / "log")], str(folder), negatives=3, seed=seed)
        again = [(row["label"], row["user"], row["item"]) for row in rows_of(folder)]
        assert (again == rows) == same


def test_rows_rated_below_the_threshold_get_no_negatives(tmp_path):
    rows = converted(tmp_path, "1,1,5\n1,2,1\n2,3,5\n", negatives=1)
    assert [label for label, _, _ in rows] == [1, 0, 0, 1, 0]
    assert (rows[1][1], rows[1][2], rows[4][1]) == (1, 3, 2)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("1,2,5\n1,x,5\n", "line 2: column 'item' is 'x', expected a decimal number below 2^63"),
        ("1,2,5\n,3,5\n", "line 2: column 'user' is '', expected a decimal number below 2^63"),
        ("1,2,5\n1,-3,5\n", "line 2: column 'item' is '-3', expected a decimal number"),
        ("1,2,5\n1,9223372036854775808,5\n", "line 2: column 'item' is '9223372036854775808', expected"),
        ("1,2,5\n1,3\n", "line 2: 2 fields separated by commas, expected 3"),
        ("1,2,5\n1,3,good\n", "line 2: column 'rating' is 'good', expected a number such as 3 or 4.5"),
        ("1,2,5\n1,3\0,5\n", r"line 2: column 'item' is '3\x00', expected a decimal number"),
        ("1,2,5\n1,3é,5\n", r"line 2: column 'item' is '3\xc3\xa9', expected a decimal number"),
        ("1,2\n3,4\n", "no ratings, so every label would be 1: give --negatives N"),
        ("1 2 5\n", "line 1: expected user and item separated by a comma, a tab or `::`"),
        ("who,what\n1,2\n", "line 1: the header must name the columns user and item; it has who, what"),
        ("", "the file is empty"),
        ("1,2,5\n" + "x" * 10_000_000 + "\n", "line 2: a line of more than 1048576 bytes"),
    ],
)
def test_what_cannot_be_used_is_named(tmp_path, text, message):
    with pytest.raises(DataError) as caught:
        converted(tmp_path, text)
    assert message in str(caught.value)
    assert str(tmp_path / "log") in str(caught.value)
    assert not (tmp_path / "out").exists()


def test_bad_rows_are_skipped_and_counted_once(tmp_path):
    (tmp_path / "log").write_text("1,2,5\nbad\n3,4,5\n")
    summary = convert_interactions([str(tmp_path / "log")], str(tmp_path / "out"), negatives=1, on_bad_rows="skip")
    assert (summary["rows"], summary["bad_rows"]) == (4, 1)
    assert summary["examples"] == [f"{tmp_path / 'log'}, line 2: 1 fields separated by commas, expected 3"]


def test_movielens_takes_the_ratings_of_a_folder(tmp_path):
    folder = tmp_path / "ml"
    folder.mkdir()
    (folder / "movies.dat").write_text("1::Toy Story (1995)::Comedy\n")
    (folder / "users.dat").write_text("1::F::1::10::48067\n")
    with pytest.raises(DataError, match=r"0 files named ratings\.dat or .* in this folder, expected one"):
        convert_movielens([str(folder)], str(tmp_path / "out"))
    (folder / "ratings.dat").write_text("1::1193::5::978300760\n1::661::3::978302109\n")
    convert_movielens([str(folder)], str(tmp_path / "out"))
    assert rows_of(tmp_path / "out") == [{"label": 1, "user": 1, "movie": 1193}, {"label": 0, "user": 1, "movie": 661}]
    assert load_schema(str(tmp_path / "out")).source == "movielens"


def test_the_whole_of_movielens(tmp_path):
    if not (SHARED / "ml-1m").is_dir():
        pytest.skip("the MovieLens sample is not here")
    summary = convert_movielens([str(SHARED / "ml-1m")], str(tmp_path / "out"))
    assert summary["rows"] == 1_000_209
    assert round(summary["label_rate"], 3) == 0.575
    user, movie = load_schema(str(tmp_path / "out")).categorical
    assert abs(user.distinct - 6040) < 0.05 * 6040
    assert abs(movie.distinct - 3706) < 0.05 * 3706


AVAZU = "1000009418151094273,0,14102100,1005,0,1fbe01fe,f3845767,28905ebd,ecad2386,7801e8d9,07d7df22,"
AVAZU += "a99f214a,ddd2926e,44956a24,1,2,15706,320,50,1722,0,35,-1,79"


def data_of_the_page_of_results() -> list[str]:
    page = (Path(__file__).parents[2] / "docs" / "results-methods.md").read_text()
    return re.findall(r"^```python data\n(.*?)^```", page, re.MULTILINE | re.DOTALL)


def test_the_page_of_results_draws_a_fifth_of_the_rows_apart(tmp_path, monkeypatch):
    code, _ = data_of_the_page_of_results()
    rows = [f"{i},{i % 7},{i % 5 + 1}" for i in range(2000)]
    (tmp_path / "ml-1m").mkdir()
    with gzip.open(tmp_path / "ml-1m" / "ratings.csv.gz", "wt") as file:
        file.write("\n".join(["user,movie,rating", *rows]) + "\n")
    monkeypatch.chdir(tmp_path)
    exec(code, {})
    users = {}
    for name in ("train", "eval"):
        convert_interactions([f"{name}.csv"], name)
        users[name] = [row["user"] for row in rows_of(tmp_path / name)]
    assert sorted(users["train"] + users["eval"]) == list(range(2000)) and 340 < len(users["eval"]) < 460


def test_the_page_of_results_draws_a_fifth_of_the_pairs_apart(tmp_path, monkeypatch):
    """A pair that stands twice stays on one side, and what is not a rating on neither."""
    _, code = data_of_the_page_of_results()
    rows = [f"{i % 7},{i % 500},{i % 3},{i % 6},{i}" for i in range(7000)]
    (tmp_path / "ciao").mkdir()
    with gzip.open(tmp_path / "ciao" / "ratings.csv.gz", "wt") as file:
        file.write("\n".join(["user,item,category,rating,helpfulness", *rows]) + "\n")
    monkeypatch.chdir(tmp_path)
    exec(code, {})
    drawn = {name: (tmp_path / f"{name}.csv").read_text().splitlines()[1:] for name in ("train", "eval")}
    assert sorted(drawn["train"] + drawn["eval"]) == sorted(row for row in rows if row.split(",")[3] != "0")
    pairs = {name: {tuple(row.split(",")[:2]) for row in own} for name, own in drawn.items()}
    assert not pairs["train"] & pairs["eval"] and 0.17 < len(pairs["eval"]) / 3500 < 0.23


def test_avazu(tmp_path):
    lines = [",".join(NAMES), AVAZU, AVAZU.replace("273,0,", "274,1,")]
    (tmp_path / "train.gz").write_bytes(gzip.compress("\n".join(lines).encode()))
    summary = convert_avazu([str(tmp_path / "train.gz")], str(tmp_path / "out"))
    assert (summary["rows"], summary["positives"]) == (2, 1)
    (row, _) = rows_of(tmp_path / "out")
    assert list(row) == ["label", *CATEGORICAL_NAMES]
    fields = dict(zip(NAMES, AVAZU.split(","), strict=True))
    for name in CATEGORICAL_NAMES:
        wanted = int(fields[name], 16) if len(fields[name]) == 8 and name != "hour" else int(fields[name])
        assert row[name] == (None if wanted == -1 else wanted)


@pytest.mark.parametrize(
    ("line", "message"),
    [
        (AVAZU.replace(",0,1410", ",2,1410"), "line 2: column 'click' is '2', expected 0 or 1"),
        (
            AVAZU.replace("1fbe01fe", "1fbe01fg"),
            "line 2: column 'site_id' is '1fbe01fg', expected 8 hexadecimal digits",
        ),
        (
            AVAZU.replace(",320,", ",-2,"),
            "line 2: column 'C15' is '-2', expected a decimal number below 2^63, or nothing",
        ),
        (AVAZU[:-3], "line 2: 23 fields separated by commas, expected 24"),
    ],
)
def test_bad_rows_of_avazu(tmp_path, line, message):
    (tmp_path / "train").write_text("\n".join([",".join(NAMES), line]))
    with pytest.raises(DataError) as caught:
        convert_avazu([str(tmp_path / "train")], str(tmp_path / "out"))
    assert message in str(caught.value)
    (tmp_path / "train").write_text(line)
    with pytest.raises(DataError, match="line 1: the header must be id,click,hour,C1,banner_pos"):
        convert_avazu([str(tmp_path / "train")], str(tmp_path / "out"))
