"""docs/settings.md lists every setting as the code has it. To write it anew: python tests/unit/test_docs_settings.py"""

from __future__ import annotations

import typing
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from embershard.cluster.config import RunConfig
from pydantic import BaseModel

PAGE = Path(__file__).resolve().parents[2] / "docs" / "settings.md"
HEAD = """# Settings

Every setting of a run, with its default. They stand in a YAML file (`section: {key: value}`), in the environment
(`EMBERSHARD_SECTION__KEY`) or on the command line (`train.epochs=2`), each overriding the one before. An unknown key
is an error that suggests the nearest one. Relative paths are taken from the current folder.
"""


def render() -> str:
    parts = [HEAD]
    for name, field in RunConfig.model_fields.items():
        section = model_in(field.annotation)
        rows = list(settings(section, f"{name}.")) if section else [(name, text(field.default), field.description)]
        lines = [f"| `{key}` | `{value}` | {(what or '').replace('|', 'or')} |" for key, value, what in rows]
        parts.append("\n".join([f"## {name}", "", "| setting | default | what |", "|---|---|---|", *lines, ""]))
    return "\n".join(parts)


def settings(model: type[BaseModel], above: str) -> Iterator[tuple[str, str, str | None]]:
    for name, field in model.model_fields.items():
        inner = model_in(field.annotation)
        if inner is None:
            yield above + name, text(field.get_default(call_default_factory=True)), field.description
        elif typing.get_origin(field.annotation) is dict:
            keys = ", ".join(f"`{key}`" for key in inner.model_fields)
            yield f"{above}{name}.NAME.KEY", "", f"{field.description}: {keys}"
        else:
            yield from settings(inner, f"{above}{name}.")


def model_in(annotation: Any) -> type[BaseModel] | None:
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        return annotation
    return next(filter(None, map(model_in, typing.get_args(annotation))), None)


def text(value: Any) -> str:
    if isinstance(value, (list, tuple)):
        return "[" + ", ".join(map(str, value)) + "]"
    if value is None or isinstance(value, bool):
        return {None: "null", True: "true", False: "false"}[value]
    return str(value)


def test_the_page_is_current() -> None:
    assert PAGE.read_text() == render(), "write it anew: python tests/unit/test_docs_settings.py"


if __name__ == "__main__":
    PAGE.write_text(render())
