"""`import embershard`: the public names exist, and importing it is cheap."""

import ast
import subprocess
import sys
from pathlib import Path

import embershard
import pytest


@pytest.mark.parametrize("name", embershard.__all__)
def test_every_public_name_resolves(name: str) -> None:
    assert getattr(embershard, name) is not None


def test_type_checkers_see_the_same_names() -> None:
    """What is imported lazily must also stand under TYPE_CHECKING, or editors know nothing of it."""
    tree = ast.parse(Path(embershard.__file__).read_text())
    block = next(node for node in tree.body if isinstance(node, ast.If) and ast.unparse(node.test) == "TYPE_CHECKING")
    seen = {alias.name for node in block.body if isinstance(node, ast.ImportFrom) for alias in node.names}
    assert seen | {"__version__"} == set(embershard.__all__) == {*embershard._PUBLIC, "__version__"}


def test_what_a_notebook_completes_are_the_public_names() -> None:
    assert dir(embershard) == sorted(embershard.__all__)


def test_unknown_names_are_attribute_errors() -> None:
    with pytest.raises(AttributeError, match="no attribute 'Trainr'"):
        _ = embershard.Trainr


@pytest.mark.parametrize(
    ("statement", "absent"),
    [
        ("import embershard", ["torch", "ray", "numpy"]),
        ("import embershard.cluster.cli", ["torch", "ray", "numba"]),
        ("import embershard.parameter_server.server", ["torch", "ray"]),  # a shard stays small
    ],
)
def test_imports_are_light(statement: str, absent: list[str]) -> None:
    code = f"import sys; {statement}; print([name for name in {absent!r} if name in sys.modules])"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True).stdout.strip() == "[]"
