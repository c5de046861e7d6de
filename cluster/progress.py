"""Progress of a run on stderr: a bar on a terminal, otherwise a line per interval."""

from __future__ import annotations

import sys
import time
from collections.abc import Callable, Mapping
from types import TracebackType
from typing import Any, TextIO

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TaskID, TextColumn, TimeRemainingColumn

from .formatting import readable_bytes

LINE_INTERVAL = 5.0  # seconds between lines where there is no terminal


class ProgressReporter:
    """`note` says what is going on, `advance` where training stands. Use as a context manager."""

    def __init__(self, stream: TextIO | None = None, *, interval: float = LINE_INTERVAL) -> None:
        self._console = Console(file=stream or sys.stderr, highlight=False, soft_wrap=True)
        self._interval = interval
        self._last_line = float("-inf")
        self._bar: Progress | None = None
        self._task: TaskID | None = None

    def __enter__(self) -> ProgressReporter:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.finish()

    def note(self, text: str) -> None:
        """One line of news, above the bar where there is one."""
        self._console.print(text, markup=False)

    def advance(self, record: Mapping[str, Any]) -> None:
        """Training: step, and where known steps_total, loss, samples_per_second."""
        self._show("step", record["step"], record.get("steps_total"), _numbers(record))

    def counter(self, unit: str) -> Callable[[int, int], None]:
        """A callback (done, total) for work that is not training, which shows its rate and the time left. unit: row or
        byte.
        """
        begin, before = time.monotonic(), None

        def count(done: int, total: int) -> None:
            nonlocal begin, before
            if before is None:  # what an earlier start had done counts for no rate
                begin, before = time.monotonic(), done
            self._show(unit, done, total, _pace(unit, done - before, total - done, time.monotonic() - begin))

        return count

    def _show(self, unit: str, done: int, total: int | None, numbers: str) -> None:
        if self._console.is_terminal:
            self._draw(done, total, numbers)
        elif time.monotonic() - self._last_line >= self._interval:
            self._last_line = time.monotonic()
            of = f"/{_amount(unit, total)}" if total else ""
            self.note(f"{unit} {_amount(unit, done)}{of}" + (f"  {numbers}" if numbers else ""))

    def finish(self) -> None:
        if self._bar is not None:
            self._bar.stop()
            self._bar = None

    def _draw(self, done: int, total: int | None, numbers: str) -> None:
        if self._bar is None:
            columns = (BarColumn(), MofNCompleteColumn(), TimeRemainingColumn(), TextColumn("{task.description}"))
            self._bar = Progress(*columns, console=self._console, transient=True)
            self._task = self._bar.add_task("", total=total)
            self._bar.start()
        assert self._task is not None
        self._bar.update(self._task, completed=done, total=total, description=numbers)


def _numbers(record: Mapping[str, Any]) -> str:
    parts = []
    if (loss := record.get("loss")) is not None:
        parts.append(f"loss {loss:.4f}")
    if (auc := record.get("auc")) is not None:
        parts.append(f"AUC {auc:.4f}")
    if (ndcg := record.get("ndcg_at_10")) is not None:
        parts.append(f"nDCG@10 {ndcg:.4f}")
    if (rate := record.get("samples_per_second")) is not None:
        parts.append(f"{rate:,.0f} samples/s")
    return "  ".join(parts)


def _amount(unit: str, count: float) -> str:
    return readable_bytes(count) if unit == "byte" else f"{count:,.0f}"


def _pace(unit: str, done: int, left: int, seconds: float) -> str:
    """The rate and the time left; nothing before anything was done."""
    if not done or not seconds:
        return ""
    rate = done / seconds
    minutes, remaining = divmod(round(left / rate), 60)
    return f"{_amount(unit, rate)}{'' if unit == 'byte' else f' {unit}s'}/s  {minutes}:{remaining:02d} left"
