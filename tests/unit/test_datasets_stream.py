"""The stream against plain reading, and what it says about data that it cannot use."""

import os
import sys
import threading
import warnings
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from embershard.datasets import decode
from embershard.datasets.decode import RowGroupReader
from embershard.datasets.files import load_schema
from embershard.datasets.footers import DataFile
from embershard.datasets.order import Cursor, CursorError, Window
from embershard.datasets.schema import DataConfig, DataError
from embershard.datasets.stream import ParquetStream, join
from embershard.datasets.window import DecodedWindow

sys.path.insert(0, str(Path(__file__).parents[1] / "oracles"))
import datasets_reference as reference

CONFIG = DataConfig(label="label", dense=["i1", "i2"], categorical=["c1", "c2"])


def table(rows: int = 300, seed: int = 0, **columns: pa.Array) -> pa.Table:
    rng = np.random.default_rng(seed)
    data = {
        "label": pa.array(rng.integers(0, 2, rows), pa.int8()),
        "i1": pa.array(rng.integers(-2, 10_000, rows), pa.int32(), mask=rng.random(rows) < 0.2),
        "i2": pa.array(rng.integers(0, 5, rows), pa.int32()),
        "c1": pa.array(rng.integers(0, 2**40, rows), pa.int64(), mask=rng.random(rows) < 0.1),
        "c2": pa.array(np.arange(rows) + seed * 1_000_000, pa.int32()),
    }
    return pa.table(data | columns)


def write(folder: Path, tables: dict[str, pa.Table], row_group_size: int = 50) -> Path:
    for name, content in tables.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        pq.write_table(content, folder / name, row_group_size=row_group_size)
    return folder


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Two files, one in a subfolder, and things to be passed over."""
    write(tmp_path, {"a.parquet": table(), "day=1/b.parquet": table(233, seed=1), "_tmp/c.parquet": table(seed=2)})
    (tmp_path / "notes.txt").write_text("not data")
    return tmp_path


def stream(path: Path, **arguments) -> ParquetStream:
    return ParquetStream(str(path), schema=load_schema(str(path), CONFIG), **{"batch_size": 64} | arguments)


def expected(folder: Path, **arguments) -> list[tuple]:
    schema = load_schema(str(folder), CONFIG)
    return [row for f in ("a", "day=1/b") for row in reference.read_rows(folder / f"{f}.parquet", schema, **arguments)]


def test_without_shuffle_rows_come_as_they_lie_on_disk(folder):
    batches = list(stream(folder, shuffle=False, missing_id=5).batches(0))
    assert [row for batch in batches for row in reference.batch_rows(batch)] == expected(folder, missing_id=5)
    assert [batch.rows for batch in batches] == [64] * 8 + [21]
    assert [batch.global_rows for batch in batches] == [64] * 8 + [21]
    first = batches[0]
    assert first.labels.dtype == first.dense.dtype == np.float32
    assert first.dense.flags.c_contiguous
    assert first.ids.features == ("c1", "c2")
    assert first.ids.values.dtype == np.int64


def test_a_window_of_several_row_groups_whose_later_ids_need_64_bits(tmp_path):
    ids = np.arange(150)
    ids[60] = 2**40
    write(tmp_path, {"a.parquet": table(150, c1=pa.array(ids, mask=ids % 7 == 3))})
    one = stream(tmp_path)
    order = np.random.default_rng(3).permutation(150).astype(np.int32)
    window = DecodedWindow(one.reader, Window(0, tuple(one.reader.row_groups())), order, 20, 64, -1)
    pieces = []
    while not window.exhausted:
        pieces.append(window.take())
    batch = join(("c1", "c2"), pieces, 2, False, 150)
    rows = reference.read_rows(tmp_path, one.schema)
    assert reference.batch_rows(batch) == [rows[row] for row in order]


def test_shuffled_epochs_hold_every_row_once_in_different_orders(folder):
    one = stream(folder)
    epochs = [[row for batch in one.batches(epoch) for row in reference.batch_rows(batch)] for epoch in (0, 1)]
    again = [row for batch in stream(folder, read_ahead_bytes=2000).batches(0) for row in reference.batch_rows(batch)]
    assert sorted(epochs[0]) == sorted(epochs[1]) == sorted(expected(folder))
    assert epochs[0] != epochs[1]
    assert epochs[0] == again
    assert one.steps(0) == 9
    assert one.rows == 533


@pytest.mark.parametrize(("before", "after"), [(1, 2), (2, 5), (5, 1), (2, 2), (1, 1), (5, 5)])
def test_interrupted_and_resumed_with_any_ranks_yields_every_row_once(folder, before, after):
    rows, cursors = [], []
    for rank in range(before):
        part = stream(folder, rank=rank, workers=before)
        batches = part.batches(2)
        for _ in range(3):
            rows += reference.batch_rows(next(batches))
        cursors.append(part.cursor())
    cursor = Cursor.merge(cursors)
    steps = set()
    for rank in range(after):
        part = stream(folder, rank=rank, workers=after)
        rest = list(part.batches(2, cursor))
        rows += [row for batch in rest for row in reference.batch_rows(batch)]
        steps |= {len(rest), part.steps(2, cursor)}
    assert len(steps) == 1
    assert sorted(rows) == sorted(expected(folder))


def test_resume_is_exact_with_the_same_ranks(folder):
    whole = [reference.batch_rows(batch) for batch in stream(folder).batches(0)]
    first = stream(folder)
    batches = first.batches(0)
    for _ in range(4):
        next(batches)
    first.close()
    resumed = stream(folder).batches(0, first.cursor())
    assert [reference.batch_rows(batch) for batch in resumed] == whole[4:]


def test_rank_without_rows_takes_part_with_empty_batches(tmp_path):
    write(tmp_path, {"a.parquet": table(20)})
    parts = [list(stream(tmp_path, batch_size=8, rank=rank, workers=2).batches(0)) for rank in range(2)]
    assert [batch.rows for batch in parts[0]] == [4] * 5
    assert [(b.rows, b.dense.shape, b.ids.batch_size, b.global_rows) for b in parts[1]] == [(0, (0, 2), 0, 4)] * 5


def test_cursor_counts_what_was_handed_out_only_and_must_fit(folder):
    one = stream(folder)
    with pytest.raises(CursorError, match="no epoch was begun"):
        one.cursor()
    batches = one.batches(0)
    assert one.cursor() == Cursor(one.cursor().plan, 0, 1)
    next(batches)
    cursor = one.cursor()
    assert sum(cursor.begun.values()) + 50 * len(cursor.finished) == 64
    for other, epoch in ((one, 1), (stream(folder, seed=1), 0), (stream(folder, window_bytes=7), 0)):
        with pytest.raises(CursorError, match="another epoch or with other files, another seed"):
            other.batches(epoch, cursor)


@pytest.mark.parametrize(("limit", "most_open"), [(1 << 30, 40), (1, 1)])
def test_files_stay_open_as_long_as_their_footers_fit(tmp_path, monkeypatch, limit, most_open):
    write(tmp_path, {f"{k:02}.parquet": table(20, seed=k) for k in range(40)}, row_group_size=5)
    monkeypatch.setattr(decode, "_FOOTER_BYTES", limit)
    opened, open_file = [], DataFile.open
    monkeypatch.setattr(DataFile, "open", lambda self, *names: opened.append(self.name) or open_file(self, *names))
    one = stream(tmp_path)
    rows = [row for batch in one.batches(0) for row in reference.batch_rows(batch)]
    assert sorted(rows) == sorted(reference.read_rows(tmp_path, one.schema))
    assert len(set(opened)) == 40
    assert (len(opened) == 40) == (most_open == 40)
    assert len(one.reader._open) == most_open


def test_closing_in_the_middle_ends_the_threads_and_the_stream_goes_on(folder):
    one = stream(folder)
    batches = one.batches(0)
    next(batches)
    one.close()
    assert not [thread for thread in threading.enumerate() if thread.name.startswith("parquet-decode")]
    with pytest.raises(RuntimeError, match="closed, or another epoch begun"):
        next(batches)
    assert sum(batch.rows for batch in one.batches(0)) == 533


def test_columns_of_other_types_and_types_that_differ_between_files(tmp_path):
    odd = table(
        100,
        seed=3,
        label=pa.array([True, False] * 50),
        i1=pa.array(np.linspace(0, 9, 100), pa.float32()),
        i2=pa.array(np.arange(100), pa.uint16()),
        c1=pa.array(np.arange(100), pa.uint64()),
        c2=pa.array(np.arange(100), pa.int64()),
    )
    write(tmp_path, {"a.parquet": table(60), "b.parquet": odd})
    one = stream(tmp_path)
    assert one.schema.dense_transform == "none"
    rows = [row for batch in one.batches(0) for row in reference.batch_rows(batch)]
    assert sorted(rows) == sorted(reference.read_rows(tmp_path, one.schema))


# -- what cannot be used


def read_all(path: Path | str, config: DataConfig = CONFIG) -> None:
    for _ in ParquetStream(str(path), batch_size=64, schema=load_schema(str(path), config)).batches(0):
        pass


def refused(path: Path | str, config: DataConfig = CONFIG) -> str:
    with pytest.raises(DataError) as caught:
        read_all(path, config)
    message = str(caught.value)
    assert "\n" not in message
    return message


def test_missing_and_empty_paths(tmp_path):
    assert refused("") == "no path given: name a Parquet file, a folder of them, a pattern or a URL"
    assert refused(tmp_path / "nothing").endswith("nothing: no such file or folder")
    assert "no *.parquet files in this folder" in refused(tmp_path)
    pq.write_table(table(0), tmp_path / "empty.parquet")
    assert "the files hold no rows" in refused(tmp_path)


def test_not_parquet_and_truncated(tmp_path):
    (tmp_path / "a.parquet").write_bytes(b"label\ti1\n" * 100)
    assert "a.parquet: not a Parquet file, or cut short" in refused(tmp_path)
    pq.write_table(table(), tmp_path / "a.parquet")
    whole = (tmp_path / "a.parquet").read_bytes()
    (tmp_path / "a.parquet").write_bytes(whole[: len(whole) // 2])
    assert "a.parquet: not a Parquet file, or cut short" in refused(tmp_path)


def test_damaged_row_group(tmp_path):
    pq.write_table(table(5000), tmp_path / "a.parquet")
    content = bytearray((tmp_path / "a.parquet").read_bytes())
    content[100:4000] = bytes(3900)
    (tmp_path / "a.parquet").write_bytes(content)
    assert "a.parquet: row group 0 cannot be read, the file is damaged: " in refused(tmp_path)


def test_missing_column_and_wrong_types(tmp_path):
    write(tmp_path, {"a.parquet": table().drop_columns(["c2"])})
    assert "a.parquet: no column 'c2'; it has label, i1, i2, c1" in refused(tmp_path)
    for column, values, wanted in (
        ("c1", pa.array([1.5] * 300), "double, expected an integer id or a string (lists of ids go into data.bags)"),
        ("i2", pa.array(["x"] * 300), "string, expected an integer or a float"),
        ("label", pa.array(["1"] * 300), "string, expected 0 or 1"),
    ):
        write(tmp_path, {"a.parquet": table(**{column: values})})
        assert refused(tmp_path).endswith(f"a.parquet: column '{column}' is {wanted}")
        with pytest.raises(DataError, match=f"a.parquet: column '{column}' is "):
            load_schema(str(tmp_path), CONFIG)  # known before a row is read


@pytest.mark.parametrize("labels", [[0, 1, 2], [0, 1, None], [0.0, 1.0, 0.5], [0, 1, 300]])
def test_labels_outside_0_and_1(tmp_path, labels):
    write(tmp_path, {"a.parquet": table(3, label=pa.array(labels))})
    message = refused(tmp_path)
    assert "a.parquet: column 'label'" in message
    assert "labels must be 0 or 1" in message


def test_bad_label_names_the_row(tmp_path):
    labels = np.zeros(300, np.int64)
    labels[123] = 7
    write(tmp_path, {"a.parquet": table(label=pa.array(labels))})
    assert "column 'label', row 123: found 7; labels must be 0 or 1" in refused(tmp_path)


def test_nan_in_a_dense_column_and_ids_that_overflow(tmp_path):
    write(tmp_path, {"a.parquet": table(3, i2=pa.array([1.0, float("nan"), 2.0]))})
    assert "column 'i2', row 1: found nan; write a null where a value is missing" in refused(tmp_path)
    write(tmp_path, {"a.parquet": table(2, c1=pa.array([1, 2**63], pa.uint64()))})
    assert "a.parquet: column 'c1': values must fit int64" in refused(tmp_path)
    write(tmp_path, {"a.parquet": table(4, c1=pa.array([1, -1, -7, 2]))})
    message = "column 'c1', row 2: found -7; ids must be 0 or more; write a null, or -1 (data.missing_id)"
    assert message in refused(tmp_path)


def test_files_without_our_metadata_ask_for_the_columns(folder):
    message = refused(folder, DataConfig())
    for flag in ("data.label=", "data.dense=", "data.categorical=", "embershard inspect"):
        assert flag in message


def test_file_that_changes_or_vanishes_during_an_epoch(folder):
    for change in (lambda p: p.write_bytes(b"short"), os.remove):
        write(folder, {"a.parquet": table()})
        one = stream(folder)
        change(folder / "a.parquet")
        with pytest.raises(DataError, match=r"a\.parquet: the file vanished or changed"):
            list(one.batches(0))


@pytest.mark.parametrize("change", [os.remove, lambda path: os.truncate(path, 100)])
def test_file_that_changes_after_its_last_row_was_decoded(folder, change):
    one = stream(folder)
    batches = one.batches(0)
    while len(one.cursor().finished) < len(one.reader.row_groups()):
        next(batches)
    change(folder / "a.parquet")
    with pytest.raises(DataError, match=r"a\.parquet: the file vanished or changed while it was being read"):
        next(batches)


def test_file_that_changes_while_it_is_open(folder):
    one = stream(folder, read_ahead_bytes=2000)
    batches = one.batches(0)
    next(batches)
    for name in ("a.parquet", "day=1/b.parquet"):
        os.truncate(folder / name, 100)
    with pytest.raises(DataError, match=r"\.parquet: the file vanished or changed while it was being read"):
        next(batches), next(batches)
    assert one.cursor().finished


def test_file_that_appears_during_an_epoch(folder):
    one = stream(folder)
    batches = one.batches(0)
    next(batches)
    write(folder, {"late.parquet": table()})
    with pytest.raises(DataError, match=r"late\.parquet: the file appeared while .* was being read"):
        list(batches)


def test_next_epoch_is_read_ahead_while_one_ends(folder, monkeypatch):
    decoded = []
    read = RowGroupReader.read
    monkeypatch.setattr(RowGroupReader, "read", lambda self, group: decoded.append(group) or read(self, group))
    one, plain = stream(folder), stream(folder)
    groups = len(one.reader.row_groups())
    batches = one.batches(0, then=1)
    next(batches)
    one._ahead._decoder.submit(lambda: None).result()
    assert len(decoded) == 2 * groups
    first = [row for batch in batches for row in reference.batch_rows(batch)]
    second = [row for batch in one.batches(1) for row in reference.batch_rows(batch)]
    assert len(decoded) == 2 * groups
    wanted = [[row for batch in plain.batches(epoch) for row in reference.batch_rows(batch)] for epoch in (0, 1)]
    assert [len(first) + 64, second] == [len(wanted[0]), wanted[1]]
    assert not [thread for thread in threading.enumerate() if thread.name.startswith("parquet-decode")]


def test_an_epoch_left_early_or_another_than_announced_begins_anew(folder):
    one, plain = stream(folder), stream(folder)
    next(one.batches(0, then=1))
    for epoch, then in ((1, 5), (2, None)):
        rows = [row for batch in one.batches(epoch, then=then) for row in reference.batch_rows(batch)]
        assert rows == [row for batch in plain.batches(epoch) for row in reference.batch_rows(batch)]


def test_read_ahead_never_holds_more_than_its_limit_over_the_boundary(folder):
    one = stream(folder)
    largest = max(group.bytes for group in one.reader.row_groups())
    one = stream(folder, read_ahead_bytes=2 * largest)
    held = 0
    for epoch in (0, 1, 2):
        for _ in one.batches(epoch, then=epoch + 1):
            held = max(held, one._ahead._held)
    one.close()
    assert largest < held <= 2 * largest


def test_a_row_group_beyond_what_may_be_read_ahead_is_named(folder):
    write(folder, {"large.parquet": table(1000)}, 1000)
    with pytest.warns(UserWarning) as caught:
        one = stream(folder, read_ahead_bytes=10_000)
    assert [str(warning.message) for warning in caught] == [one.warning]
    assert one.warning.startswith(
        f"{folder}/large.parquet: row group 0 has 21,000 bytes when decoded, beyond data.read"
    )
    assert one.warning.endswith("write the file in row groups of at most 476 rows")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert stream(folder, read_ahead_bytes=21_000).warning is None


def test_ranks_and_batch_sizes_must_fit(folder):
    with pytest.raises(DataError, match=r"data\.batch_size: 2 rows cannot be divided over 3 workers"):
        stream(folder, batch_size=2, workers=3)
    with pytest.raises(ValueError, match="rank 3 is not one of 3"):
        stream(folder, rank=3, workers=3)


def test_folders_of_an_fsspec_url(folder):
    import fsspec

    memory = fsspec.filesystem("memory")
    memory.put(str(folder / "a.parquet"), "/stream-test/a.parquet")
    path = "memory://stream-test"
    one = ParquetStream(path, batch_size=64, schema=load_schema(path, CONFIG))
    rows = [row for batch in one.batches(0) for row in reference.batch_rows(batch)]
    assert sorted(rows) == sorted(reference.read_rows(folder / "a.parquet", one.schema))
    one.close()


@pytest.mark.parametrize("config", [{"dense": []}, {"categorical": []}])
def test_without_dense_or_without_categorical_columns(folder, config):
    schema = load_schema(str(folder), CONFIG.model_copy(update=config))
    one = ParquetStream(str(folder), batch_size=64, schema=schema)
    rows = [row for batch in one.batches(0) for row in reference.batch_rows(batch)]
    wanted = [row for f in ("a", "day=1/b") for row in reference.read_rows(folder / f"{f}.parquet", schema)]
    assert sorted(rows) == sorted(wanted)
