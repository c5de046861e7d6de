"""What the death of a shard costs: one of two is killed while a run trains. Prints its readings as JSON.

python -m embershard.cluster.kill_bench killed '{"rows": 100000}'
"""

from __future__ import annotations

import itertools
import json
import os
import signal
import sys
import tempfile
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import ray

from ..datasets.synthetic import generate
from .config import RunConfig
from .launch import Trainer
from .ray_session import ray_session
from .run_folder import read_metrics, read_run
from .shard_group import NAME, shard_name

WITHIN_SECONDS = 240.0
STEPS = 30  # before the kill, and after it


def killed(rows: int = 100_000) -> dict[str, float]:
    """Seconds from `kill -9` of a shard with a journal to the end of the first step that needed it again.

    A run with one worker over two shards on a Ray of its own, without TLS, on a generated log of `rows` rows.

    Raises:
        TimeoutError: the run does not come to its first steps, or not to those after the kill.
    """
    os.environ.pop("RAY_USE_TLS", None)
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        generate(str(folder / "log"), rows=rows)
        config = RunConfig.load(
            None,
            f"data.path={folder / 'log'}",
            f"run.dir={folder / 'run'}",
            "store.durability=journal",
            "train.epochs=1000",
            "train.max_steps=3000",  # it ends, whatever happens
            "train.log_every=1",
        )
        with ray_session(None, "kill-bench", WITHIN_SECONDS), ThreadPoolExecutor(1) as background:
            seconds = background.submit(_kill_and_stop, config.run_dir)
            summary = Trainer(config).fit()
            return {"seconds_to_first_step": seconds.result(), "steps_redone": summary["steps_redone"]}


def _kill_and_stop(run: Path) -> float:
    _wait_until(lambda: len(_step_times(run)) >= STEPS, "the first steps")
    namespace = read_run(run)["namespace"]
    try:
        shard = ray.get_actor(shard_name(1), namespace=namespace)
        process = ray.get(shard.__ray_call__.remote(lambda _: os.getpid()), timeout=WITHIN_SECONDS)
        before = len(_step_times(run))
        when = time.time()
        os.kill(process, signal.SIGKILL)
        _wait_until(lambda: len(_step_times(run)) >= before + STEPS, "steps after the kill")
    finally:
        ray.get_actor(NAME, namespace=namespace).request_stop.remote()
    # Steps whose calls were answered before the kill may still end after it; the longest wait is that for the shard.
    times = _step_times(run)
    waits = [(end - begin, end) for begin, end in itertools.pairwise(times) if end > when]
    return max(waits)[1] - when


def _step_times(run: Path) -> list[float]:
    return [record["time"] for record in read_metrics(run) if "loss" in record]


def _wait_until(condition: Callable[[], Any], what: str) -> None:
    deadline = time.monotonic() + WITHIN_SECONDS
    while not condition():
        if time.monotonic() > deadline:
            raise TimeoutError(f"the run did not come to {what} within {WITHIN_SECONDS:g} s")
        time.sleep(0.1)


if __name__ == "__main__":
    print(json.dumps({"killed": killed}[sys.argv[1]](**json.loads(sys.argv[2]))))
