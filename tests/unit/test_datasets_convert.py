"""Criteo lines to Parquet: the same values, every fault named, complete or absent."""

import gzip
import os
import signal
import socket
import subprocess
import sys
import tempfile
import textwrap
from pathlib import Path

import fsspec
import numpy as np
import pyarrow.parquet as pq
import pytest
from embershard.datasets import convert as conversion
from embershard.datasets.criteo import NAMES, convert_criteo
from embershard.datasets.files import load_schema
from embershard.datasets.schema import DataError
from embershard.datasets.stream import ParquetStream
from embershard.datasets.writer import DatasetWriter

sys.path.insert(0, str(Path(__file__).parents[1] / "oracles"))
import datasets_reference as reference

SHARED = Path(__file__).resolve().parents[2].parent / "shared" / "data"
HEADER = "\t".join(NAMES)


def line(number: int, hexadecimal: bool = True) -> str:
    integers = [str(number * k - 3) if (number + k) % 4 else "" for k in range(13)]
    ids = [(number * 2_654_435_761 * (f + 1)) % 2**32 for f in range(26)]
    shown = [f"{i:08x}" if hexadecimal else str(i * 251) for i in ids]
    return "\t".join([str(number % 2), *integers, *("" if (number + f) % 9 == 0 else s for f, s in enumerate(shown))])


def replaced(text: str, field: int, value: str) -> str:
    fields = text.split("\t")
    fields[field] = value
    return "\t".join(fields)


def write(path: Path, lines: list[str], end: str = "\n") -> Path:
    content = "".join(text + end for text in lines).encode("latin-1")
    path.write_bytes(gzip.compress(content) if path.suffix == ".gz" else content)
    return path


def rows_of(folder: Path) -> list[dict]:
    return [row for file in sorted(folder.glob("*.parquet")) for row in pq.read_table(file).to_pylist()]


@pytest.mark.parametrize("name", ["day_0", "train.txt", "day_0.gz"])
@pytest.mark.parametrize("end", ["\n", "\r\n"])
@pytest.mark.parametrize("form", ["hexadecimal", "decimal", "header"])
def test_values_are_those_of_the_lines(tmp_path, name, end, form):
    lines = [line(number, form == "hexadecimal") for number in range(50)]
    write(tmp_path / name, [HEADER] * (form == "header") + lines, end)
    summary = convert_criteo([str(tmp_path / name)], str(tmp_path / "out"))
    assert rows_of(tmp_path / "out") == [reference.criteo_row(text, form == "hexadecimal") for text in lines]
    assert summary["rows"] == 50
    assert summary["positives"] == 25
    schema = load_schema(str(tmp_path / "out"))
    nulls = sum(text.split("\t")[14] == "" for text in lines)
    assert schema.categorical[0].missing == nulls / 50
    assert schema.categorical[0].distinct == 50 - nulls
    assert schema.source == "criteo"


def test_blocks_and_row_groups_may_cut_anywhere(tmp_path, monkeypatch):
    monkeypatch.setattr(conversion, "BLOCK_BYTES", 1000)
    monkeypatch.setattr("embershard.datasets.criteo.ROW_GROUP_ROWS", 7)
    lines = [line(number) for number in range(40)]
    (tmp_path / "day_0").write_text("\n".join(lines))  # and no newline at the end
    convert_criteo([str(tmp_path / "day_0")], str(tmp_path / "out"))
    assert rows_of(tmp_path / "out") == [reference.criteo_row(text, True) for text in lines]


def test_one_file_per_input_folders_and_equal_names(tmp_path):
    for folder in ("a", "b"):
        (tmp_path / folder).mkdir()
        write(tmp_path / folder / "day_0.gz", [line(1), line(2)])
    write(tmp_path / "b" / "day_1", [line(3)])
    steps = []
    summary = convert_criteo(
        [str(tmp_path / "b"), str(tmp_path / "a" / "day_0.gz")],
        str(tmp_path / "out"),
        progress=lambda done, total: steps.append((done, total)),
    )
    parts = sorted(path.name for path in (tmp_path / "out").glob("*.parquet"))
    assert parts == ["00000-day_0.parquet", "00001-day_1.parquet", "00002-day_0.parquet"]
    assert (summary["files"], summary["rows"]) == (3, 5)
    assert steps[-1] == (summary["input_bytes"], summary["input_bytes"])
    assert load_schema(str(tmp_path / "out")).categorical[0].distinct == 3


BAD = [
    ("too few fields", "0\t1\t2", "3 fields separated by tabs, expected 40"),
    ("too many fields", line(2) + "\t", "41 fields separated by tabs, expected 40"),
    ("empty line", "", "1 fields separated by tabs, expected 40"),
    ("bad hexadecimal", replaced(line(2), 20, "68fd1e6g"), "column 'c7' is '68fd1e6g', expected 8 hexadecimal digits"),
    ("short hexadecimal", replaced(line(2), 14, "68fd"), "column 'c1' is '68fd', expected 8 hexadecimal digits"),
    ("embedded NUL", replaced(line(2), 3, "1\x002"), r"column 'i3' is '1\x002', expected an integer of 32 bits"),
    ("other encoding", replaced(line(2), 39, "caf\xe9"), r"column 'c26' is 'caf\xe9', expected 8 hexadecimal digits"),
    ("overflow", replaced(line(2), 1, "2147483648"), "column 'i1' is '2147483648', expected an integer of 32 bits"),
    ("label", replaced(line(2), 0, "2"), "column 'label' is '2', expected 0 or 1"),
    ("no label", replaced(line(2), 0, ""), "column 'label' is '', expected 0 or 1"),
    ("minus", replaced(line(2), 1, "-"), "column 'i1' is '-', expected an integer of 32 bits"),
]


@pytest.mark.parametrize(("text", "message"), [case[1:] for case in BAD], ids=[case[0] for case in BAD])
def test_bad_rows_are_named_and_fail_or_are_skipped(tmp_path, text, message):
    path = write(tmp_path / "day_0", [line(0), line(1), text, line(3)])
    with pytest.raises(DataError) as caught:
        convert_criteo([str(path)], str(tmp_path / "out"))
    assert str(caught.value) == f"{path}, line 3: {message} (--on-bad-rows skip leaves such rows out)"
    assert [p.name for p in tmp_path.iterdir()] == ["day_0"]
    summary = convert_criteo([str(path)], str(tmp_path / "out"), on_bad_rows="skip")
    assert (summary["rows"], summary["bad_rows"]) == (3, 1)
    assert summary["examples"] == [f"{path}, line 3: {message}"]
    assert rows_of(tmp_path / "out") == [reference.criteo_row(line(n), True) for n in (0, 1, 3)]


@pytest.mark.parametrize("value", ["-5", "9223372036854775808", "99999999999999999999", "1.5"])
def test_decimal_ids_that_are_negative_overflow_or_are_no_integers(tmp_path, value):
    lines = [line(n, False) for n in range(20)]
    path = write(tmp_path / "part", [HEADER, *lines, replaced(line(21, False), 14, value)])
    with pytest.raises(DataError, match=rf"line 22: column 'c1' is '{value}', expected a decimal number below 2\^63"):
        convert_criteo([str(path)], str(tmp_path / "out"))


def test_largest_decimal_id(tmp_path):
    lines = [replaced(line(n, False), 14, str(2**63 - 1)) for n in range(20)]
    convert_criteo([str(write(tmp_path / "part", lines))], str(tmp_path / "out"))
    assert rows_of(tmp_path / "out")[0]["c1"] == 2**63 - 1


def test_line_of_ten_megabytes(tmp_path):
    path = write(tmp_path / "day_0", [line(0), "x" * 10_000_000, line(2)])
    with pytest.raises(DataError, match="day_0, line 2: a line of more than 1048576 bytes"):
        convert_criteo([str(path)], str(tmp_path / "out"))
    summary = convert_criteo([str(path)], str(tmp_path / "out"), on_bad_rows="skip")
    assert (summary["rows"], summary["bad_rows"]) == (2, 1)
    assert rows_of(tmp_path / "out")[1] == reference.criteo_row(line(2), True)


def test_damaged_gzip_empty_file_foreign_header_and_no_input(tmp_path):
    path = write(tmp_path / "day_0.gz", [line(n) for n in range(100)])
    path.write_bytes(path.read_bytes()[:-50])
    for name, content, message in (
        ("day_0.gz", None, "damaged or incomplete gzip data"),
        ("empty", "", "the file is empty"),
        ("header", "label\tprice\n", "line 1: the header must be label, i1 to i13, c1 to c26"),
    ):
        if content is not None:
            (tmp_path / name).write_text(content)
        with pytest.raises(DataError, match=rf"{name}.*{message}"):
            convert_criteo([str(tmp_path / name)], str(tmp_path / "out"))
    with pytest.raises(DataError, match="nothing: no such file or folder"):
        convert_criteo([str(tmp_path / "nothing")], str(tmp_path / "out"))
    with pytest.raises(DataError, match="no usable row in the whole file"):
        convert_criteo([str(write(tmp_path / "bad", ["x"]))], str(tmp_path / "out"), on_bad_rows="skip")
    assert not (tmp_path / "out").exists()


def test_one_bad_file_leaves_no_output_of_the_good_ones(tmp_path):
    inputs = [write(tmp_path / f"day_{n}", [line(n), "bad" if n == 5 else line(9)]) for n in range(8)]
    with pytest.raises(DataError, match="day_5, line 2"):
        convert_criteo([str(path) for path in inputs], str(tmp_path / "out"))
    assert sorted(p.name for p in tmp_path.iterdir()) == [f"day_{n}" for n in range(8)]


def test_existing_output_and_a_second_writer_are_refused(tmp_path):
    path = write(tmp_path / "day_0", [line(0)])
    output = str(tmp_path / "out")
    with DatasetWriter(output), pytest.raises(DataError, match="another process is writing it"):
        convert_criteo([str(path)], output)
    convert_criteo([str(path)], output)
    with pytest.raises(DataError, match="exists already; remove it or name another output"):
        convert_criteo([str(path)], output)


KILLED = """
    import os, signal, sys
    from embershard.datasets import convert, writer
    from embershard.datasets.criteo import convert_criteo
    convert.os.cpu_count = lambda: 1
    publish = writer.DatasetWriter.publish
    def second(self, part):
        if part == "day_1.parquet":
            os.kill(os.getpid(), signal.SIGKILL)
        publish(self, part)
    writer.DatasetWriter.publish = second
    convert_criteo(sys.argv[1:4], sys.argv[4], on_bad_rows="skip")
"""


def _inputs(folder: Path) -> list[str]:
    return [str(write(folder / f"day_{n}", ["bad", *(line(k) for k in range(100))])) for n in range(3)]


def _killed(inputs: list[str], output: Path) -> None:
    process = subprocess.run([sys.executable, "-c", textwrap.dedent(KILLED), *inputs, str(output)], check=False)
    assert process.returncode == -signal.SIGKILL


def test_killed_conversion_leaves_nothing_that_looks_finished_and_goes_on_file_by_file(tmp_path, monkeypatch):
    inputs, output = _inputs(tmp_path), tmp_path / "out"
    _killed(inputs, output)
    assert not output.exists()
    assert sorted(os.listdir(tmp_path / ".out.incomplete")) == ["_day_1.parquet", "day_0.parquet", "lock"]
    with pytest.raises(DataError, match=r"no \*\.parquet files"):
        load_schema(str(tmp_path))
    opened = []
    open_input = conversion.Input.open
    monkeypatch.setattr(conversion.Input, "open", lambda self: opened.append(self.path) or open_input(self))
    summary = convert_criteo(inputs, str(output), on_bad_rows="skip")
    assert sorted(opened) == inputs[1:]
    assert (summary["rows"], summary["files_kept"], summary["bad_rows"]) == (300, 1, 3)
    assert len(summary["examples"]) == 3
    assert rows_of(output) == [reference.criteo_row(line(k), True) for _ in range(3) for k in range(100)]
    assert not (tmp_path / ".out.incomplete").exists()


@pytest.mark.parametrize("change", ["input", "mode"])
def test_a_finished_file_of_another_input_or_other_options_is_not_kept(tmp_path, change):
    inputs, output = _inputs(tmp_path), tmp_path / "out"
    _killed(inputs, output)
    if change == "input":
        write(Path(inputs[0]), [line(k) for k in range(50)])
        assert convert_criteo(inputs, str(output), on_bad_rows="skip")["rows"] == 250
    else:
        with pytest.raises(DataError, match="day_0, line 1"):
            convert_criteo(inputs[:1], str(output))


def test_output_in_an_object_store_is_not_read_before_it_is_complete(tmp_path, monkeypatch):
    output = f"memory://{tmp_path.name}/out"
    inputs = _inputs(tmp_path)

    def killed(self: DatasetWriter, part: str) -> None:
        if part != "day_0.parquet":
            raise KeyboardInterrupt
        publish(self, part)

    publish = DatasetWriter.publish
    monkeypatch.setattr(DatasetWriter, "publish", killed)
    monkeypatch.setattr(conversion.os, "cpu_count", lambda: 1)
    with pytest.raises(KeyboardInterrupt):
        convert_criteo(inputs, output, on_bad_rows="skip")
    with pytest.raises(DataError, match="not complete: the command that writes it was stopped or still runs"):
        load_schema(output)
    monkeypatch.setattr(DatasetWriter, "publish", publish)
    summary = convert_criteo(inputs, output, on_bad_rows="skip")
    assert (summary["rows"], summary["files_kept"], summary["output"]) == (300, 1, output)
    schema = load_schema(output)
    assert (schema.rows, schema.positives) == (300, 150)
    stream = ParquetStream(output, batch_size=64, schema=schema)
    assert sum(batch.rows for batch in stream.batches(0)) == 300
    with pytest.raises(DataError, match="exists already"):
        convert_criteo(inputs, output)
    with pytest.raises(DataError, match="day_0, line 1"):
        convert_criteo(inputs, output + "2")
    with pytest.raises(DataError, match="no such file or folder"):
        load_schema(output + "2")


def other_machine(monkeypatch: pytest.MonkeyPatch, folder: Path) -> None:
    """What is written from here on knows nothing of the staged files before."""
    folder.mkdir()
    monkeypatch.setattr(tempfile, "tempdir", str(folder))


def test_a_second_machine_is_refused_while_the_first_writes_an_object_store(tmp_path, monkeypatch):
    output, fs, folder = f"memory://{tmp_path.name}/out", fsspec.filesystem("memory"), f"/{tmp_path.name}/out"
    with DatasetWriter(output) as first:
        first.keep({})
        with monkeypatch.context() as elsewhere:
            other_machine(elsewhere, tmp_path / "elsewhere")
            with pytest.raises(DataError) as caught:
                convert_criteo(_inputs(tmp_path), output, on_bad_rows="skip")
        message = str(caught.value)
        assert message.startswith(f"{output}: process {os.getpid()} on {socket.gethostname()}, ")
        assert message.endswith(
            "is writing it, or was stopped; remove the folder if it no longer runs, or name another output"
        )
        assert [path.rsplit("/", 1)[1] for path in fs.find(folder)] == ["_incomplete"]
        first.staged("a.parquet").write_bytes(b"x")
        first.publish("a.parquet")
        fs.rm(folder, recursive=True)  # as the message says
        other_machine(monkeypatch, tmp_path / "again")
        assert convert_criteo(_inputs(tmp_path), output, on_bad_rows="skip")["rows"] == 300
        with pytest.raises(DataError, match="another process is writing it, or was stopped"):
            first.finish()
    assert load_schema(output).rows == 300


def test_a_second_machine_that_took_the_output_over_is_noticed_and_keeps_its_files(tmp_path, monkeypatch):
    output, fs = f"memory://{tmp_path.name}/out", fsspec.filesystem("memory")
    publish = DatasetWriter.publish

    def taken_over(self: DatasetWriter, part: str) -> None:
        fs.pipe_file(f"/{tmp_path.name}/out/_incomplete", b"process 7 on elsewhere")
        publish(self, part)

    monkeypatch.setattr(DatasetWriter, "publish", taken_over)
    with pytest.raises(DataError, match="out: process 7 on elsewhere is writing it"):
        convert_criteo(_inputs(tmp_path), output, on_bad_rows="skip")
    assert fs.find(f"/{tmp_path.name}/out") == [f"/{tmp_path.name}/out/_incomplete"]
    assert fs.cat_file(f"/{tmp_path.name}/out/_incomplete") == b"process 7 on elsewhere"


def test_a_part_that_another_process_wrote_is_not_taken_for_ones_own(tmp_path, monkeypatch):
    output, fs = f"memory://{tmp_path.name}/out", fsspec.filesystem("memory")
    publish = DatasetWriter.publish

    def crowded(self: DatasetWriter, part: str) -> None:
        fs.pipe_file(f"/{tmp_path.name}/out/strange.parquet", b"x")
        publish(self, part)

    monkeypatch.setattr(DatasetWriter, "publish", crowded)
    with pytest.raises(DataError, match=r"out: strange\.parquet came from another process"):
        convert_criteo(_inputs(tmp_path), output, on_bad_rows="skip")
    assert not fs.find(f"/{tmp_path.name}/out")


def test_what_a_failure_leaves_in_an_object_store_never_looks_complete(tmp_path, monkeypatch):
    """Its marker goes last: whoever is killed while it cleans up leaves it there."""
    output, fs = f"memory://{tmp_path.name}/out", fsspec.filesystem("memory")
    removed = []
    monkeypatch.setattr(DatasetWriter, "_remove", lambda self, path: removed.append(path) or fs.rm_file(path))
    write(tmp_path / "day_9", ["bad"])
    monkeypatch.setattr(conversion.os, "cpu_count", lambda: 1)
    with pytest.raises(DataError, match="day_9, line 1"):
        convert_criteo([str(write(tmp_path / "day_0", [line(0)])), str(tmp_path / "day_9")], output)
    assert [path.rsplit("/", 1)[1] for path in removed] == ["day_0.parquet", "_incomplete"]


def test_remote_inputs_are_read_in_blocks(tmp_path, monkeypatch):
    monkeypatch.setattr(conversion, "BLOCK_BYTES", 1000)
    path = write(tmp_path / "day_0.gz", [line(k) for k in range(100)])
    fs = fsspec.filesystem("memory")
    fs.put_file(str(path), f"/{tmp_path.name}/in/day_0.gz")
    convert_criteo([f"memory://{tmp_path.name}/in"], str(tmp_path / "out"))
    assert rows_of(tmp_path / "out") == [reference.criteo_row(line(k), True) for k in range(100)]


def test_metadata_states_mean_and_deviation(tmp_path):
    lines = [line(k) for k in range(200)]
    inputs = [str(write(tmp_path / "a", lines[:30])), str(write(tmp_path / "b", lines[30:]))]
    convert_criteo(inputs, str(tmp_path / "out"))
    column = load_schema(str(tmp_path / "out")).dense[4]
    values = np.array([row["i5"] for row in rows_of(tmp_path / "out") if row["i5"] is not None])
    assert column.mean == pytest.approx(values.mean())
    assert column.deviation == pytest.approx(values.std())


@pytest.mark.parametrize(
    ("name", "rows", "positives"),
    [
        ("criteo-raw/kaggle_train_first5000.tsv.gz", 5000, 1068),
        ("criteo-raw/terabyte_day0_first1000.tsv.gz", 1000, 21),
        ("criteo-tb/part-0.tsv.gz", 10_000, 297),
    ],
)
def test_real_samples(tmp_path, name, rows, positives):
    if not (SHARED / name).exists():
        pytest.skip("../shared/data is not beside this checkout")
    summary = convert_criteo([str(SHARED / name)], str(tmp_path / "out"))
    assert (summary["rows"], summary["positives"], summary["bad_rows"]) == (rows, positives, 0)
    lines = gzip.decompress((SHARED / name).read_bytes()).decode().splitlines()
    hexadecimal = not lines[0].startswith("label")
    expected = [reference.criteo_row(text, hexadecimal) for text in (lines if hexadecimal else lines[1:])]
    assert rows_of(tmp_path / "out") == expected
    for column in load_schema(str(tmp_path / "out")).categorical:
        values = [row[column.name] for row in expected]
        distinct = len({value for value in values if value is not None})
        assert abs(column.distinct - distinct) <= 0.05 * distinct
        assert column.missing == values.count(None) / rows
