"""The rules of the house that a tool can check: layers, relative imports, file sizes."""

import ast
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
ROOMS = {
    "datasets": set(),
    "parameter_server": set(),
    "workers": {"datasets", "parameter_server"},
    "cluster": {"datasets", "parameter_server", "workers"},
}
MAX_LINES = 400


def sources() -> list[Path]:
    inside = [path for room in ROOMS for path in (ROOT / room).rglob("*.py")]
    return sorted(path for path in [*ROOT.glob("*.py"), *inside] if "_pb2" not in path.name)


def imported_rooms(path: Path, text: str) -> list[tuple[int, str]]:
    """(line, room) of every import of another part of the package; an absolute import of ourselves is `absolute`."""
    package = path.relative_to(ROOT).parent.parts
    found = []
    for node in ast.walk(ast.parse(text)):
        if isinstance(node, ast.Import):
            names = [alias.name.split(".")[0] for alias in node.names]
            found += [(node.lineno, "absolute") for name in names if name == "embershard" or name in ROOMS]
        elif isinstance(node, ast.ImportFrom) and node.level == 0:
            first = (node.module or "").split(".")[0]
            if first == "embershard" or first in ROOMS:
                found.append((node.lineno, "absolute"))
        elif isinstance(node, ast.ImportFrom):
            base = package[: len(package) - node.level + 1]
            targets = (
                [base + tuple((node.module or "").split("."))] if node.module else [(*base, a.name) for a in node.names]
            )
            found += [(node.lineno, target[0]) for target in targets if target and target[0] in ROOMS]
    return found


def back_edges(path: Path, text: str) -> list[str]:
    room = path.relative_to(ROOT).parts[0]
    allowed = ROOMS.get(room, set(ROOMS)) | {room}
    return [
        f"{path.relative_to(ROOT)}:{line} imports {name}"
        for line, name in imported_rooms(path, text)
        if name not in allowed
    ]


def test_arrows_point_down_and_imports_are_relative() -> None:
    assert [edge for path in sources() for edge in back_edges(path, path.read_text())] == []


@pytest.mark.parametrize(
    ("file", "text"),
    [
        ("datasets/stream.py", "from ..parameter_server import tables"),
        ("datasets/stream.py", "from ..parameter_server.tables import TableSpec"),
        ("datasets/stream.py", "from .. import workers"),
        ("parameter_server/shard.py", "def f():\n    from ..workers.trainer import train"),
        ("workers/embeddings/base.py", "from ...cluster.config import RunConfig"),
        ("workers/trainer.py", "from embershard.datasets import stream"),
        ("cluster/cli.py", "import datasets"),
    ],
)
def test_the_check_sees_a_back_edge(file: str, text: str) -> None:
    assert back_edges(ROOT / file, text)


@pytest.mark.parametrize("path", sources(), ids=lambda path: str(path.relative_to(ROOT)))
def test_files_stay_short(path: Path) -> None:
    assert len(path.read_text().splitlines()) <= MAX_LINES


def test_every_package_is_declared() -> None:
    """A package that pyproject.toml does not list works in the checkout and is missing from the wheel."""
    declared = set(tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["setuptools"]["packages"])
    there = {
        ".".join(("embershard", *path.parent.relative_to(ROOT).parts))
        for room in ROOMS
        for path in (ROOT / room).rglob("__init__.py")
    }
    assert declared == there | {"embershard"}


def test_no_stray_top_level_modules(tmp_path: Path) -> None:
    """A top-level `cluster` would overwrite other people's (`datasets` may well be somebody's already)."""
    code = "import importlib.util, sys; print([name for name in sys.argv[1:] if importlib.util.find_spec(name)])"
    names = sorted(set(ROOMS) - {"datasets"})
    found = subprocess.run(
        [sys.executable, "-I", "-c", code, *names], cwd=tmp_path, capture_output=True, text=True, check=True
    )
    assert found.stdout.strip() == "[]"
