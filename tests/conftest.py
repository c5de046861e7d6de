"""Shared by all tests: one local Ray cluster for the whole test run, created when the first test asks for it."""

import os
from collections.abc import Iterator

import pytest


@pytest.fixture(scope="session")
def ray_address() -> Iterator[str]:
    """Address of a one-node Ray cluster with 8 (logical) CPUs that tests and the commands they start share."""
    os.environ["RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO"] = "0"
    os.environ["RAY_USAGE_STATS_ENABLED"] = "0"
    import ray

    ray.init(
        address="local",
        num_cpus=8,
        namespace="tests",
        include_dashboard=False,
        log_to_driver=False,
        logging_level="ERROR",
        object_store_memory=128 << 20,
    )
    yield ray.get_runtime_context().gcs_address
    ray.shutdown()


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    """Seconds per kind of test: their budgets are separate."""
    seconds: dict[str, float] = {}
    for outcome in ("passed", "failed", "error"):
        for report in terminalreporter.stats.get(outcome, []):
            kind = report.nodeid.split("/")[1]
            seconds[kind] = seconds.get(kind, 0.0) + getattr(report, "duration", 0.0)
    if len(seconds) > 1:
        terminalreporter.write_line("seconds: " + ", ".join(f"{kind} {total:.0f}" for kind, total in seconds.items()))
