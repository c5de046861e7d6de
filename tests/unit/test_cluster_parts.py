"""The small parts of the driver: exit codes, one-line errors, watchdog, interrupts, progress, tables of text."""

import io
import os
import pickle
import signal
import threading
from pathlib import Path

import pytest
from embershard.cluster.builtin import generated_schema
from embershard.cluster.errors import ConfigError, RunFailed, RunInterrupted, exit_code, one_line, root_cause
from embershard.cluster.formatting import aligned, readable_bytes
from embershard.cluster.interrupt import interrupts
from embershard.cluster.progress import ProgressReporter
from embershard.cluster.watchdog import Watchdog
from embershard.datasets.files import load_schema
from embershard.datasets.schema import DataError
from embershard.datasets.synthetic import generate
from embershard.parameter_server.store import FencedError, StoreError
from embershard.parameter_server.tables import TableError


def test_generated_columns_are_known_before_they_exist(tmp_path: Path) -> None:
    generate(str(tmp_path / "log"), rows=10)
    schema, planned = load_schema(str(tmp_path / "log")), generated_schema()
    assert planned.columns == schema.columns
    assert [c.cardinality for c in planned.categorical] == [c.cardinality for c in schema.categorical]


@pytest.mark.parametrize(
    ("error", "code"),
    [
        (ConfigError("x"), 2),
        (DataError("x"), 2),
        (TableError("x"), 2),
        (RunFailed("x"), 1),
        (RunFailed("x", user_error=True), 2),
        (StoreError("x"), 1),
        (RuntimeError("x"), 1),
        (RunInterrupted("x"), 130),
        (KeyboardInterrupt(), 130),
    ],
)
def test_exit_codes(error: BaseException, code: int) -> None:
    assert exit_code(error) == code


def test_somebody_elses_class_of_the_same_name_is_no_user_error() -> None:
    assert exit_code(type("DataError", (ValueError,), {"__module__": "pandas"})("x")) == 1


def test_one_line() -> None:
    assert one_line(ConfigError("a\n  b")) == "a b"
    assert one_line(KeyError("k")) == "KeyError: 'k'"
    assert one_line(MemoryError()) == "MemoryError"


def test_root_cause_prefers_what_explains_the_rest() -> None:
    """When one rank fails, its peers fail too, with broken connections: theirs is not the news."""
    peers = RuntimeError("wrapped")
    peers.worker_failures = {0: ConnectionError("peer closed"), 1: FencedError("generation 1 is over")}  # type: ignore[attr-defined]
    assert str(root_cause(peers)) == "generation 1 is over"
    plain = RuntimeError("wrapped")
    plain.cause = ValueError("inner")  # type: ignore[attr-defined]
    assert str(root_cause(plain)) == "inner"


def test_run_failed_crosses_processes() -> None:
    copy = pickle.loads(pickle.dumps(RunFailed("x", user_error=True)))
    assert (str(copy), copy.user_error) == ("x", True)


def test_watchdog_barks_once_after_silence() -> None:
    barked = threading.Event()
    watchdog = Watchdog(0.05, barked.set)
    assert barked.wait(10)
    watchdog.stop()


def test_watchdog_is_quiet_while_it_hears_beats() -> None:
    barked, end = threading.Event(), threading.Event()
    watchdog = Watchdog(5.0, barked.set)
    for _ in range(20):
        watchdog.beat()
        end.wait(0.01)
    assert not barked.is_set()
    watchdog.stop()


def test_the_second_signal_ends_at_once() -> None:
    before = signal.getsignal(signal.SIGINT)
    with pytest.raises(KeyboardInterrupt), interrupts() as interrupt:
        assert not interrupt.asked
        os.kill(os.getpid(), signal.SIGINT)
        assert interrupt.asked
        os.kill(os.getpid(), signal.SIGTERM)
    assert signal.getsignal(signal.SIGINT) is before


def test_progress_without_a_terminal_is_a_line_per_interval() -> None:
    stream = io.StringIO()
    with ProgressReporter(stream, interval=3600.0) as progress:
        progress.note("starting [2 shards]")
        progress.advance({"step": 1, "steps_total": 2000, "loss": 0.5, "samples_per_second": 12345.6})
        progress.advance({"step": 2, "loss": 0.4})
    assert stream.getvalue() == "starting [2 shards]\nstep 1/2,000  loss 0.5000  12,346 samples/s\n"


def test_progress_of_a_conversion_shows_rate_and_time_left(monkeypatch: pytest.MonkeyPatch) -> None:
    """What an earlier start had done, here 10 MB, counts for no rate."""
    stream, now = io.StringIO(), [0.0]
    monkeypatch.setattr("embershard.cluster.progress.time.monotonic", lambda: now[0])
    with ProgressReporter(stream, interval=5.0) as progress:
        count = progress.counter("byte")
        for now[0], done in ((0.0, 10_000_000), (4.0, 20_000_000), (8.0, 26_000_000), (10.0, 30_000_000)):
            count(done, 386_000_000)
        rows = progress.counter("row")
        for now[0], done in ((20.0, 0), (27.5, 3_000_000)):
            rows(done, 4_000_000)
    assert stream.getvalue().splitlines() == [
        "byte 10.00 MB/386.00 MB",
        "byte 26.00 MB/386.00 MB  2.00 MB/s  3:00 left",
        "row 0/4,000,000",
        "row 3,000,000/4,000,000  400,000 rows/s  0:02 left",
    ]


def test_aligned_columns() -> None:
    rows = [{"name": "a", "rows": 12345, "ratio": 1.5}, {"name": "bcd", "rows": 7, "ratio": None}]
    assert aligned(rows, ["name", "rows", "ratio"]) == ["name    rows  ratio", "a     12,345  1.5", "bcd        7  -"]


def test_readable_bytes() -> None:
    assert [readable_bytes(n) for n in (12, 1500, 2_161_000_000, 96_140_000_000)] == [
        "12 B",
        "1.50 kB",
        "2.16 GB",
        "96.14 GB",
    ]
