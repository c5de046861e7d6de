"""The runs of a comparison as Ray tasks, one CPU each, side by side."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import ray
from ray.exceptions import RayError

from ..workers.job import TrainingJob
from ..workers.trial import run_trial
from .compare import Cell
from .errors import RunFailed, is_user_error, one_line, root_cause


def in_tasks(cells: Sequence[Cell], blocks: int) -> Iterator[tuple[Cell, dict[str, Any]]]:
    """Each cell with its record, in the order in which they end. A Ray session must be open.

    Raises:
        RunFailed: a run failed; those under way are given up.
    """
    task = ray.remote(num_cpus=1, max_retries=0)(_trial)
    waiting = {task.remote(cell.job.model_dump_json(), blocks): cell for cell in cells}
    try:
        while waiting:
            done, _ = ray.wait(list(waiting), num_returns=1)
            cell = waiting.pop(done[0])
            try:
                record = ray.get(done[0])
            except RayError as error:
                cause = root_cause(error)
                raise RunFailed(f"{cell.name}: {one_line(cause)}", user_error=is_user_error(cause)) from error
            yield cell, record
    finally:
        for reference in waiting:
            ray.cancel(reference, force=True)


def _trial(job: str, blocks: int) -> dict[str, Any]:
    return run_trial(TrainingJob.model_validate_json(job), blocks)
