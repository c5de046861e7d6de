"""Runs contenders in turn, each in a process of its own, and compares them round by round."""

from __future__ import annotations

import json
import os
import platform
import socket
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from .errors import RunFailed

CONTENDER_SECONDS = 600
TEXT_ROWS = 500_000
HUGGING_FACE = ["datasets==5.2.0", "dill", "pandas", "xxhash", "multiprocess", "huggingface-hub", "httpx", "tqdm"]
TORCHREC = ["torchrec==1.8.0", "torchmetrics==1.0.3", "tensordict", "iopath", "pyre-extensions", "tqdm"]


@dataclass(frozen=True)
class Contender:
    """One side of a comparison. prefix: what its readings are called; command: module and arguments for Python.

    environment: variables that its process has besides this one's.
    """

    prefix: str
    command: tuple[str, ...]
    python: str = sys.executable
    environment: Mapping[str, str] = field(default_factory=dict)


@dataclass
class Comparison:
    """Readings of all rounds: contender.name -> one value a round."""

    readings: dict[str, list[float]] = field(default_factory=dict)

    def add(self, prefix: str, readings: Mapping[str, float]) -> None:
        for name, value in readings.items():
            self.readings.setdefault(f"{prefix}.{name}", []).append(value)

    def summary(self, wanted: Mapping[str, tuple[str, str]]) -> dict[str, Any]:
        """Medians; a ratio is the median of the rounds' own ratios, with the smallest and largest beside it.

        wanted: name -> (reading above, reading below); left out where one of the two contenders did not run.

        Raises:
            RunFailed: a contender that ran has not read what is wanted of it.
        """
        ratios, spread = {}, {}
        ran = {_contender_of(reading) for reading in self.readings}
        for name, sides in wanted.items():
            if not ran.issuperset(map(_contender_of, sides)):
                continue
            if missing := [side for side in sides if side not in self.readings]:
                raise RunFailed(f"bench: {missing[0]} was not read, so there is no {name}")
            each = [a / b for a, b in zip(*(self.readings[side] for side in sides), strict=True)]
            ratios[name], spread[name] = statistics.median(each), [min(each), max(each)]
        return {
            "machine": machine(),
            "readings": {name: statistics.median(values) for name, values in self.readings.items()},
            "ratios": ratios,
            "ratio_spread": spread,
        }


def _contender_of(reading: str) -> str:
    return reading.rpartition(".")[0]


def machine() -> dict[str, Any]:
    """What the readings were taken on."""
    import torch

    model = next(
        (line.split(":")[1].strip() for line in Path("/proc/cpuinfo").read_text().splitlines() if "model name" in line),
        platform.processor(),
    )
    gpu = torch.cuda.get_device_name() if torch.cuda.is_available() else None
    cores = len(os.sched_getaffinity(0))
    return {"cpu": model, "cores": cores, "gpu": gpu, "python": platform.python_version(), "torch": torch.__version__}


def run_rounds(
    contenders: Sequence[Contender], wanted: Mapping[str, tuple[str, str]], rounds: int, tell: Callable[[str], None]
) -> dict[str, Any]:
    """All contenders once per round, in turn, so that a machine that drifts drifts for all of them; `wanted` and what
    is returned: see `Comparison.summary`.

    Every second round the other way round: what a contender leaves behind (memory to be freed, files to be written)
    falls to another one.

    Raises:
        RunFailed: a contender failed; names it and shows its last line. Or the first round lacks what is wanted.
    """
    comparison = Comparison()
    summary: dict[str, Any] = {}
    for number in range(rounds):
        for contender in contenders if number % 2 == 0 else reversed(contenders):
            comparison.add(contender.prefix, _measure(contender))
            tell(f"round {number + 1}/{rounds}: {contender.prefix}")
        summary = comparison.summary(wanted)
    return summary


def _measure(contender: Contender) -> dict[str, float]:
    # -P: from a checkout, `datasets` in the current folder would be taken for Hugging Face's.
    command = [contender.python, "-P", "-m", *contender.command]
    environment = {**os.environ, **contender.environment}
    try:
        done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=CONTENDER_SECONDS)
    except subprocess.TimeoutExpired:
        raise RunFailed(f"bench: contender {contender.prefix} was not done after {CONTENDER_SECONDS} s") from None
    if done.returncode:
        last = (done.stderr.strip().splitlines() or ["no output"])[-1]
        raise RunFailed(f"bench: contender {contender.prefix} failed: {last}")
    readings: dict[str, float] = json.loads(done.stdout.strip().splitlines()[-1])
    return readings


def _contender(prefix: str, module: str, name: str, **arguments: Any) -> Contender:
    return Contender(prefix, (f"embershard.{module}", name, json.dumps(arguments)))


def _beside_shards(prefix: str, **arguments: Any) -> Contender:
    """Our training over shards, with the threads of a worker of `embershard train`."""
    from .worker_group import thread_settings

    command = ("embershard.workers.bench", "ours", json.dumps(arguments))
    return Contender(prefix, command, environment=thread_settings())


def bench_kernels(rounds: int, peers: bool, tell: Callable[[str], None]) -> dict[str, Any]:
    """Kernels on one thread beside torch and FBGEMM, and as a share of the machine's random-read limit."""
    module = "parameter_server.bench"
    contenders = [_contender("ours", module, "ours_unique"), _contender("torch", module, "torch_unique")]
    wanted = {"unique_over_torch": ("ours.unique", "torch.unique")}
    for width in (1, 16, 64, 128):
        names = ["ours", "torch", *(["fbgemm"] if peers and width % 4 == 0 else [])]
        contenders += [_contender(f"{name}.d{width}", module, name, width=width) for name in names]
        ours = f"ours.d{width}"
        wanted[f"gather_d{width}_of_random_read"] = (f"{ours}.gather", f"{ours}.random_read")
        for peer in names[1:]:
            for kernel in ("gather", "sgd", "adagrad", "adam" if peer == "torch" else "rowwise_adagrad"):
                wanted[f"{kernel}_d{width}_over_{peer}"] = (f"{ours}.{kernel}", f"{peer}.d{width}.{kernel}")
    return run_rounds(contenders, wanted, rounds, tell)


def bench_moves(rounds: int, gigabytes: float, blocks: int, tell: Callable[[str], None]) -> dict[str, Any]:
    """A shard leaves while a worker trains, with and without journals, beside the raw socket."""
    contenders, wanted = _moves(gigabytes, blocks)
    return run_rounds(contenders, wanted, rounds, tell)


def _moves(gigabytes: float, blocks: int) -> tuple[list[Contender], dict[str, tuple[str, str]]]:
    size = {"gigabytes": gigabytes, "blocks": blocks}
    leaving = _contender("moves", "cluster.move_bench", "leave", **size)
    journal = _contender("moves_journal", "cluster.move_bench", "leave", **size, journal=True)
    raw = _contender("socket", "parameter_server.rpc_bench", "socket", width=64, ready=True)
    below = "socket.pull_65536k_gbps"
    wanted = {"moves_over_raw_socket": ("moves.gbps", below), "moves_journal_over_raw": ("moves_journal.gbps", below)}
    return [leaving, journal, raw], wanted


def bench_rpc(rounds: int, tell: Callable[[str], None]) -> dict[str, Any]:
    """The transport beside a raw socket and bare gRPC; real pulls and pushes beside the socket loop with a kernel.

    With RAY_USE_TLS, also over mutual TLS beside plain (docs/security.md).
    """
    from ..parameter_server.security import Certificates

    module, contenders, wanted = "parameter_server.rpc_bench", [], {}
    sizes = ("64k", "256k", "1024k", "4096k", "16384k", "65536k")
    for kind, widths, names in (
        ("transport", (64,), ("grpc", "bare", "socket")),
        ("real", (16, 64, 128), ("grpc", "socket")),
    ):
        for width in widths:
            label = kind if kind == "transport" else f"{kind}.d{width}"
            for name in names:
                arguments = {"width": width, "ready": kind == "transport"}
                contenders.append(_contender(f"{name}.{label}", module, name, **arguments))
            for peer in names[1:]:
                for reading in (f"{direction}_{size}" for direction in ("pull", "push") for size in sizes):
                    ratio = f"{label.replace('.', '_')}_{reading}_over_{peer}"
                    wanted[ratio] = (f"grpc.{label}.{reading}_gbps", f"{peer}.{label}.{reading}_gbps")
    if Certificates.of_environment() is not None:
        contenders.append(_contender("mtls.real.d16", module, "grpc", width=16, ready=False, mtls=True))
        for reading in (f"{direction}_{size}" for direction in ("pull", "push") for size in sizes):
            wanted[f"real_d16_{reading}_mtls_over_plain"] = (
                f"mtls.real.d16.{reading}_gbps",
                f"grpc.real.d16.{reading}_gbps",
            )
    return run_rounds(contenders, wanted, rounds, tell)


def bench_stream(
    rounds: int, path: str | None, rows: int, with_peers: bool, tell: Callable[[str], None]
) -> dict[str, Any]:
    """A shuffled epoch beside bare pyarrow decoding into numpy, one decoding thread each; without `path` on `rows`
    generated rows of Criteo Kaggle's cardinalities. And a conversion of TEXT_ROWS rows beside pyarrow.csv.

    with_peers: also Ray Data, and Hugging Face datasets in an environment built for it.
    """
    from ..datasets.bench import write_text
    from ..datasets.synthetic import KAGGLE, generate

    module, rate = "datasets.bench", "rows_per_second"
    wanted = {
        f"ours_over_{peer}": (f"ours.{rate}", f"{peer}.{rate}") for peer in ("pyarrow", "ray_data", "hugging_face")
    }
    wanted["convert_over_pyarrow_csv"] = (f"convert.{rate}", f"pyarrow_csv.{rate}")
    with tempfile.TemporaryDirectory() as folder:
        if path is None:
            path = str(Path(folder, "log"))
            tell(f"generating {rows:,} rows")
            generate(path, rows=rows, cardinalities=KAGGLE)
        text = Path(folder, "text.tsv")
        write_text(text, TEXT_ROWS)
        contenders = [_contender(name, module, name, path=path) for name in ("ours", "pyarrow")]
        contenders += [_contender(name, module, name, text=str(text)) for name in ("convert", "pyarrow_csv")]
        if with_peers:
            contenders.append(_contender("ray_data", module, "ray_data", path=path))
            command = (f"embershard.{module}", "hugging_face", json.dumps({"path": path}))
            contenders.append(Contender("hugging_face", command, _python_beside("Hugging Face", HUGGING_FACE, tell)))
        return run_rounds(contenders, wanted, rounds, tell)


def bench_train(
    rounds: int, peers: bool, with_torchrec: bool, dim: int, batch: int, steps: int, tell: Callable[[str], None]
) -> dict[str, Any]:
    """DLRM on Criteo Kaggle's cardinalities, tables capped at a million rows, two torch threads for everybody."""
    from ..workers.bench import write_batches

    module, rate = "workers.bench", "samples_per_second"
    variants = {f"ours_{n}_{how}": (n, how) for n in (2, 1, 4) for how in ("bounded", "sync")}
    wanted = {
        f"{ours}_over_{peer}": (f"{ours}.{rate}", f"{peer}.{rate}")
        for ours in (*variants, "ours_local")
        for peer in ("fbgemm", "torchrec", "torch_adagrad", "dense")
    }
    wanted |= {f"ours_over_{peer}": (f"ours_2_bounded.{rate}", f"{peer}.{rate}") for peer in ("fbgemm", "torchrec")}
    wanted["mlet_over_single_layer"] = (f"mlet_local.{rate}", f"ours_local.{rate}")
    wanted["ours_over_torch_adagrad"] = (f"ours_2_bounded.{rate}", f"torch_adagrad.{rate}")
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder, "batches.npz")
        write_batches(path, batch=batch, steps=steps, row_cap=1_000_000)
        common: dict[str, Any] = {"path": str(path), "dim": dim, "threads": 2}
        contenders = [
            _beside_shards(prefix, shards=shards, consistency=consistency, **common)
            for prefix, (shards, consistency) in variants.items()
        ]
        contenders.append(_contender("ours_local", module, "ours", shards=0, consistency="bounded", **common))
        mlet = {"shards": 0, "consistency": "bounded", "collapsed": max(1, dim // 4)}
        contenders.append(_contender("mlet_local", module, "ours", **mlet, **common))
        contenders += [_contender(name, module, name, **common) for name in ("dense", "torch_adagrad")]
        if peers:
            contenders.append(_contender("fbgemm", module, "fbgemm", **common))
        if with_torchrec:
            arguments = json.dumps({"path": str(path), "dim": dim, "port": _free_port()})
            command = ("embershard.workers.torchrec_bench", arguments)
            contenders.append(Contender("torchrec", command, _python_beside("TorchRec", TORCHREC, tell)))
        return run_rounds(contenders, wanted, rounds, tell)


def bench_durability(
    rounds: int, dim: int, batch: int, steps: int, gigabytes: float, tell: Callable[[str], None]
) -> dict[str, Any]:
    """What it costs that nothing is lost: a journal, checkpoints in the background and, with RAY_USE_TLS, mutual TLS
    beside training without them; a shard that is killed; `gigabytes` that move."""
    from ..parameter_server.security import Certificates
    from ..workers.bench import write_batches

    variants: dict[str, dict[str, bool]] = {
        "none": {},
        "journal": {"journal": True},
        "checkpoints": {"checkpoints": True},
    }
    if Certificates.of_environment() is not None:
        variants["mtls"] = {"mtls": True}
    moving, wanted = _moves(gigabytes, blocks=32)
    rate = "samples_per_second"
    wanted |= {f"{name}_over_none": (f"{name}.{rate}", f"none.{rate}") for name in [*variants][1:]}
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder, "batches.npz")
        write_batches(path, batch=batch, steps=steps, row_cap=1_000_000)
        common: dict[str, Any] = {"path": str(path), "dim": dim, "threads": 2, "shards": 2, "consistency": "bounded"}
        training = [_beside_shards(name, **common, **how) for name, how in variants.items()]
        killed = _contender("killed", "cluster.kill_bench", "killed")
        return run_rounds([*training, killed, *moving], wanted, rounds, tell)


def _free_port() -> int:
    with socket.create_server(("127.0.0.1", 0)) as listener:
        return int(listener.getsockname()[1])


def _python_beside(name: str, packages: Sequence[str], tell: Callable[[str], None]) -> str:
    """The Python of an environment that sees this one's packages and adds others, the first without what it asks for
    (TorchRec's wheel asks for FBGEMM's CUDA build)."""
    cache = Path(os.environ.get("XDG_CACHE_HOME", Path.home() / ".cache"), "embershard", packages[0].replace("==", "-"))
    python = cache / "bin" / "python"
    ready = cache / "ready"
    if ready.exists():
        return str(python)
    tell(f"building an environment for {name} in {cache}")
    here = next(path for path in sys.path if path.endswith("site-packages"))
    try:
        subprocess.run([sys.executable, "-m", "venv", "--clear", str(cache)], check=True, capture_output=True)
        site = next(cache.glob("lib/python*/site-packages"))
        # A site folder, not a path alone: an editable installation is found by the .pth file in it.
        (site / "beside.pth").write_text(f"import site; site.addsitedir({here!r})\n")
        install = [str(python), "-m", "pip", "install", "--quiet"]
        subprocess.run([*install, "--no-deps", packages[0]], check=True, capture_output=True, text=True)
        subprocess.run([*install, *packages[1:]], check=True, capture_output=True, text=True)
    except subprocess.CalledProcessError as error:
        last = (str(error.stderr).strip().splitlines() or ["no output"])[-1]
        raise RunFailed(f"bench: the environment for {name} could not be built in {cache}: {last}") from None
    ready.touch()
    return str(python)
