"""An S3 server that throttles, drops connections, answers slowly and lists in pages; every retry is counted."""

import itertools
import tempfile
import threading
from collections.abc import Callable, Iterator
from typing import Any
from wsgiref.types import StartResponse, WSGIEnvironment

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

pytest.importorskip("s3fs", reason='needs pip install "embershard[test-s3]"')
pytest.importorskip("moto", reason='needs pip install "embershard[test-s3]"')
pytest.importorskip("flask_cors", reason='needs pip install "embershard[test-s3]"')

import fsspec
from embershard.datasets import remote
from embershard.datasets.criteo import convert_criteo
from embershard.datasets.files import load_schema
from embershard.datasets.schema import DataConfig, DataError
from embershard.datasets.stream import ParquetStream
from embershard.datasets.synthetic import generate
from embershard.datasets.writer import DatasetWriter
from moto.server import DomainDispatcherApplication, create_backend_app
from werkzeug.serving import make_server

CONFIG = DataConfig(label="label", dense=["i1"], categorical=["c1"])
FILES, ROWS = 3, 40


class Faulty:
    """moto's application behind a fault: fault(request) returns a status line, `drop`, or None to let it through."""

    def __init__(self) -> None:
        self._app = DomainDispatcherApplication(create_backend_app)
        self.fault: Callable[[WSGIEnvironment], str | None] = lambda request: None
        self.page: int | None = None
        self.listings = 0

    def __call__(self, request: WSGIEnvironment, answer: StartResponse):
        if "list-type=2" in request.get("QUERY_STRING", ""):
            self.listings += 1
            if self.page is not None:
                request["QUERY_STRING"] += f"&max-keys={self.page}"
        found = self.fault(request)
        if found is None:
            return self._app(request, answer)
        if found == "drop":
            answer("200 OK", [("Content-Length", "1000000")])
            return [b"half"]
        answer(found, [("Content-Type", "application/xml")])
        return [b"<Error><Code>SlowDown</Code><Message>Please reduce your request rate.</Message></Error>"]


@pytest.fixture(scope="module")
def server() -> Iterator[tuple[str, Faulty]]:
    app = Faulty()
    listener = make_server("127.0.0.1", 0, app, threaded=True)
    thread = threading.Thread(target=listener.serve_forever, daemon=True)
    thread.start()
    yield f"http://127.0.0.1:{listener.port}", app
    listener.shutdown()
    thread.join()


def _write(fs: Any, path: str, ids: np.ndarray) -> None:
    with fs.open(path, "wb") as file:
        pq.write_table(pa.table({"label": ids % 2, "i1": ids, "c1": ids}), file, row_group_size=20, compression="none")


@pytest.fixture
def bucket(server, monkeypatch) -> Iterator[tuple[str, Faulty]]:
    """A URL with Parquet files, and the server; waits between attempts are short."""
    url, app = server
    settings = {
        "key": "a",
        "secret": "b",
        "endpoint_url": url,
        "config_kwargs": {"read_timeout": 0.5},
    }
    monkeypatch.setitem(fsspec.config.conf, "s3", settings)
    monkeypatch.setattr(remote, "_FIRST_WAIT", 0.001)
    app.fault, app.page = lambda request: None, None
    fs = remote.filesystem("s3://logs/x")[0]
    fs.invalidate_cache()
    if not fs.exists("logs"):
        fs.mkdir("logs")
        for number in range(FILES):
            _write(fs, f"logs/train/{number}.parquet", np.arange(ROWS) + number * ROWS)
    yield "s3://logs/train", app
    app.fault = lambda request: None


def read(path: str) -> tuple[list[int], ParquetStream]:
    stream = ParquetStream(path, batch_size=16, schema=load_schema(path, CONFIG))
    try:
        return sorted(i for batch in stream.batches(0) for i in batch.ids.values.tolist()), stream
    finally:
        stream.close()


def every(n: int, what: str) -> Callable[[WSGIEnvironment], str | None]:
    numbers = itertools.count(1)
    lock = threading.Lock()

    def fault(request: WSGIEnvironment) -> str | None:
        if what == "drop" and request["REQUEST_METHOD"] == "HEAD":  # nothing to break off
            return None
        with lock:
            return what if next(numbers) % n == 0 else None

    return fault


def test_without_faults_nothing_is_retried_and_listings_come_in_pages(bucket):
    path, app = bucket
    app.page = 2
    before = app.listings
    ids, stream = read(path)
    assert ids == list(range(FILES * ROWS))
    assert stream.retries == 0
    assert app.listings - before >= 2


@pytest.mark.parametrize("what", ["503 Slow Down", "drop"])
def test_throttling_and_dropped_connections_are_survived_and_counted(bucket, what):
    path, app = bucket
    app.fault = every(3, what)
    before = remote.RETRIES.count
    ids, stream = read(path)
    assert ids == list(range(FILES * ROWS))
    assert stream.retries >= 3
    assert remote.RETRIES.count - before >= stream.retries


def test_slow_reads_are_given_up_and_asked_again(bucket):
    path, app = bucket
    release, stuck = threading.Event(), iter([True, True])

    def fault(request: WSGIEnvironment) -> None:
        if "HTTP_RANGE" in request and next(stuck, False):
            release.wait(5)

    app.fault = fault
    before = remote.RETRIES.count
    ids, _ = read(path)
    release.set()
    assert remote.RETRIES.count - before == 2
    assert ids == list(range(FILES * ROWS))
    assert next(stuck, None) is None


def test_retries_are_bounded_and_the_message_says_how_many(bucket):
    path, app = bucket
    requests = itertools.count()
    stream = ParquetStream(path, batch_size=16, schema=load_schema(path, CONFIG))

    def fault(request: WSGIEnvironment) -> str | None:
        if "HTTP_RANGE" not in request:
            return None
        next(requests)
        return "503 Slow Down"

    app.fault = fault
    with pytest.raises(DataError, match=r"\.parquet: .*the store failed 6 times, the last time with: .*reduce your"):
        list(stream.batches(0))
    stream.close()
    assert next(requests) <= 3 * remote.ATTEMPTS
    assert stream.retries >= remote.ATTEMPTS - 1


def test_missing_bucket_and_missing_folder_are_not_retried(bucket):
    before = remote.RETRIES.count
    for path in ("s3://logs/nothing", "s3://nowhere/x"):
        with pytest.raises(DataError, match="no such file or folder"):
            load_schema(path, CONFIG)
    assert remote.RETRIES.count == before


def _replace(fs: Any) -> None:
    """By one of the same size: its ETag alone tells."""
    ids = np.arange(ROWS)[::-1] + ROWS
    before = fs.info("logs/changing/1.parquet")
    _write(fs, "logs/changing/1.parquet", ids)
    fs.invalidate_cache()
    after = fs.info("logs/changing/1.parquet")
    assert after["size"] == before["size"] and after["ETag"] != before["ETag"]


@pytest.mark.parametrize(
    "change", [_replace, lambda fs: fs.rm("logs/changing/1.parquet")], ids=["replaced", "vanished"]
)
@pytest.mark.parametrize("read_ahead", [500, 1 << 20], ids=["before it is opened", "after its last row was decoded"])
def test_a_file_that_is_replaced_or_vanishes_during_an_epoch_is_named(bucket, change, read_ahead):
    fs, path = remote.filesystem("s3://logs/x")[0], "s3://logs/changing"
    for number in range(FILES):
        _write(fs, f"logs/changing/{number}.parquet", np.arange(ROWS) + number * ROWS)
    schema = load_schema(path, CONFIG)
    stream = ParquetStream(path, batch_size=10, schema=schema, shuffle=False, read_ahead_bytes=read_ahead)
    batches = stream.batches(0)
    read = [next(batches)]
    if read_ahead > 500:
        read += [next(batches) for _ in range(FILES * ROWS // 10 - 1)]
    change(fs)
    try:
        with pytest.raises(
            DataError, match=r"logs/changing/1\.parquet: the file vanished or changed while it was being"
        ):
            read += batches
    finally:
        stream.close()
    whole = FILES * ROWS if read_ahead > 500 else ROWS
    assert [i for batch in read for i in batch.ids.values.tolist()] == list(range(whole))


def test_a_file_that_appears_during_an_epoch_is_named(bucket):
    path, _ = bucket
    fs = remote.filesystem(path)[0]
    stream = ParquetStream(path, batch_size=16, schema=load_schema(path, CONFIG))
    batches = stream.batches(0)
    next(batches)
    fs.copy("logs/train/0.parquet", "logs/train/9.parquet")
    try:
        with pytest.raises(DataError, match=r"logs/train/9\.parquet: the file appeared while"):
            list(batches)
    finally:
        fs.rm("logs/train/9.parquet")
        stream.close()


def criteo_line(number: int) -> str:
    return "\t".join([str(number % 2), *[str(number)] * 13, *[f"{number:08x}"] * 26]) + "\n"


@pytest.mark.parametrize("what", [None, "503 Slow Down", "drop"])
def test_converting_from_a_store_into_a_store(bucket, what):
    _, app = bucket
    name = (what or "calm").split()[0]
    fs = remote.filesystem("s3://logs/x")[0]
    for day in range(2):
        fs.pipe_file(f"logs/raw-{name}/day_{day}", "".join(map(criteo_line, range(50))).encode())
    if what:
        app.fault = every(5, what)
    summary = convert_criteo([f"s3://logs/raw-{name}/"], f"s3://logs/out-{name}")
    app.fault = lambda request: None
    assert (summary["rows"], summary["files"], summary["retries"] >= 3) == (100, 2, bool(what))
    stream = ParquetStream(f"s3://logs/out-{name}", batch_size=64)
    assert sorted(i for batch in stream.batches(0) for i in batch.ids["c1"][0].tolist()) == sorted([*range(50)] * 2)
    stream.close()
    with pytest.raises(DataError, match="exists already"):
        convert_criteo([f"s3://logs/raw-{name}/"], f"s3://logs/out-{name}")


def test_generating_into_a_store_and_a_second_machine_that_writes_the_same(bucket, tmp_path, monkeypatch):
    output = "s3://logs/generated"
    with DatasetWriter(output), monkeypatch.context() as elsewhere:
        elsewhere.setattr(tempfile, "tempdir", str(tmp_path))
        with pytest.raises(DataError, match=r"s3://logs/generated: process .* is writing it, or was stopped"):
            generate(output, rows=100, cardinalities=[5], dense=1)
    with pytest.raises(DataError, match="not complete: the command that writes it"):
        load_schema(output)
    assert generate(output, rows=100, cardinalities=[5], dense=1)["rows"] == load_schema(output).rows == 100
