"""`embershard doctor`: versions, limits, and what will not work on this machine."""

from __future__ import annotations

import os
import platform
import resource
import shutil
import socket
import tempfile
from collections.abc import Callable
from dataclasses import asdict, dataclass
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Literal

import typer

from .cli_options import Debug, Json, print_json
from .formatting import readable_bytes

PACKAGES = ("embershard", "torch", "ray", "numpy", "numba", "pyarrow", "grpcio", "safetensors", "fsspec", "pydantic")
OPEN_FILES = 4096
SHARED_MEMORY_BYTES = 128 << 20
MEMORY_BYTES = 4 << 30
DISK_BYTES = 2 << 30
PROXIES = ("http_proxy", "https_proxy", "grpc_proxy")  # gRPC reads them in lower case
PROXY_EXEMPTIONS = ("no_grpc_proxy", "no_proxy")


@dataclass(frozen=True)
class Finding:
    """level `fail`: embershard cannot run here; `warn`: some things will not work or be slow."""

    name: str
    level: Literal["ok", "warn", "fail"]
    value: str
    advice: str = ""


def doctor(json: Json = False, debug: Debug = False) -> None:
    """Check versions, limits and devices, and say what will not work here. Exit 1 if training cannot.

    \b
    Examples:
      embershard doctor
      embershard doctor --json
    """
    findings = examine()
    for finding in findings:
        print(f"{finding.level:<5} {finding.name:<14} {finding.value}")
        if finding.level != "ok":
            print(f"{'':<20} {finding.advice}")
    failed = [finding.name for finding in findings if finding.level == "fail"]
    if json:
        print_json({"ok": not failed, "findings": [asdict(finding) for finding in findings]})
    if failed:
        raise typer.Exit(1)


def examine() -> list[Finding]:
    """All findings; a check that itself breaks is a finding, not an error."""
    findings = [_package(name) for name in PACKAGES]
    checks: tuple[Callable[[], Finding], ...] = (
        _python, _cpus, _memory, _gpus, _open_files, _shared_memory, _temporary, _kernel_cache, _loopback, _tls, _token,
    )  # fmt: skip
    for check in checks:
        try:
            findings.append(check())
        except Exception as error:
            name = check.__name__.strip("_").replace("_", " ")
            findings.append(Finding(name, "warn", f"not known: {error}", "this check could not be made here"))
    return findings


def _package(name: str) -> Finding:
    try:
        return Finding(name, "ok", version(name))
    except PackageNotFoundError:
        return Finding(name, "fail", "missing", f"pip install {name}")


def _python() -> Finding:
    return Finding("python", "ok", f"{platform.python_version()} on {platform.system()} {platform.machine()}")


def _cpus() -> Finding:
    usable = len(os.sched_getaffinity(0))
    if usable < 2:
        return Finding("cpus", "warn", str(usable), "shards and the worker will share one core; use cluster.shards=1")
    return Finding("cpus", "ok", str(usable))


def _memory() -> Finding:
    total = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    limit = _container_limit()
    usable = min(total, limit) if limit else total
    if usable < MEMORY_BYTES:
        return Finding(
            "memory", "warn", readable_bytes(usable), "Ray, 2 shards and a worker want about 3 GB beside the tables"
        )
    return Finding("memory", "ok", readable_bytes(usable))


def _container_limit() -> int | None:
    for file in ("/sys/fs/cgroup/memory.max", "/sys/fs/cgroup/memory/memory.limit_in_bytes"):
        path = Path(file)
        if path.is_file() and (text := path.read_text().strip()).isdigit():
            return int(text)
    return None


def _gpus() -> Finding:
    import torch

    if not torch.cuda.is_available():
        return Finding("gpu", "ok", "none; training uses the CPU")
    names = [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())]
    return Finding("gpu", "ok", ", ".join(names))


def _open_files() -> Finding:
    soft, _ = resource.getrlimit(resource.RLIMIT_NOFILE)
    if soft < OPEN_FILES:
        return Finding("open files", "warn", str(soft), f"Ray wants more: ulimit -n {OPEN_FILES * 16}")
    return Finding("open files", "ok", str(soft))


def _shared_memory() -> Finding:
    size = shutil.disk_usage("/dev/shm").free
    if size < SHARED_MEMORY_BYTES:
        advice = "Ray falls back to a slower folder; in a container: --shm-size=512m"
        return Finding("shared memory", "warn", readable_bytes(size), advice)
    return Finding("shared memory", "ok", readable_bytes(size))


def _temporary() -> Finding:
    folder = tempfile.gettempdir()
    free = shutil.disk_usage(folder).free
    with tempfile.NamedTemporaryFile():
        pass
    if free < DISK_BYTES:
        return Finding("temp folder", "warn", f"{folder}, {readable_bytes(free)} free", "set TMPDIR to a larger disk")
    return Finding("temp folder", "ok", f"{folder}, {readable_bytes(free)} free")


def _kernel_cache() -> Finding:
    from ..parameter_server.jit import CACHED

    if not CACHED:
        advice = "kernels are compiled anew in every process; set NUMBA_CACHE_DIR to a folder that can be written"
        return Finding("kernel cache", "warn", "no writable folder", advice)
    return Finding("kernel cache", "ok", "writable")


def _loopback() -> Finding:
    """Shards listen on loopback; a proxy or firewall that swallows it is hard to guess from a timeout."""
    with socket.create_server(("127.0.0.1", 0)) as server:
        server.settimeout(2)
        with socket.create_connection(server.getsockname(), timeout=2):
            server.accept()[0].close()
    proxies = [name for name in PROXIES if os.environ.get(name)]
    exempt = ",".join(os.environ.get(name, "") for name in PROXY_EXEMPTIONS)
    if proxies and "127.0.0.1" not in exempt:
        return Finding("loopback", "warn", f"{proxies[0]} is set", "export no_proxy=127.0.0.1,localhost for gRPC")
    return Finding("loopback", "ok", "127.0.0.1 answers")


def _tls() -> Finding:
    from ..parameter_server.security import Certificates
    from ..parameter_server.store import SecurityError

    try:
        found = Certificates.of_environment()
    except SecurityError as error:
        return Finding("tls", "fail", str(error), "see docs/security.md")
    if found is None:
        return Finding("tls", "ok", "off: rows between machines can be read on their way; RAY_USE_TLS=1 encrypts them")
    return Finding("tls", "ok", f"on and mutual, with {found.certificate}")


def _token() -> Finding:
    from ..parameter_server.security import token_source
    from ..parameter_server.store import SecurityError

    try:
        return Finding("token", "ok", f"every call to a shard must show it: {token_source()}")
    except SecurityError as error:
        return Finding("token", "fail", str(error), "see docs/security.md")
