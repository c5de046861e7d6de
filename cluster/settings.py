"""Settings from three places, low to high: a YAML file, EMBERSHARD_SECTION__KEY in the environment, key=value.

Knows nothing of what the settings mean: `resolve` takes any pydantic model. Whatever is wrong becomes one line that
says where the value was given, and for an unknown key the nearest one that exists.
"""

from __future__ import annotations

import difflib
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, TypeVar, get_args

import yaml
from pydantic import BaseModel, ValidationError

from .errors import ConfigError

ENVIRONMENT_PREFIX = "EMBERSHARD_"
# Read where they are needed, and never part of a configuration that is saved or shown.
NOT_SETTINGS = {"EMBERSHARD_TOKEN", "EMBERSHARD_TOKEN_FILE", "EMBERSHARD_FAILPOINTS"}

M = TypeVar("M", bound=BaseModel)
KeyPath = tuple[str, ...]


def resolve(model: type[M], file: Path | None, environment: Mapping[str, str], assignments: Sequence[str]) -> M:
    """The model from a YAML file, then the environment, then key=value strings.

    Raises:
        ConfigError: unreadable YAML, an unknown key, a value of the wrong type, a missing one.
    """
    values: dict[str, Any] = {}
    sources: dict[KeyPath, str] = {}
    if file is not None:
        for path, value in _leaves(read_yaml(file)):
            _put(values, sources, path, value, str(file))
    for path, value, source in [*_from_environment(model, environment), *map(_parse_assignment, assignments)]:
        _put(values, sources, path, value, source)
    for path, source in sources.items():
        _check_known(model, path, source)
    try:
        return model.model_validate(values)
    except ValidationError as error:
        raise ConfigError(_describe(error, sources)) from None


def read_yaml(file: Path) -> dict[str, Any]:
    """A YAML mapping. Raises ConfigError: missing, not YAML, or not a mapping."""
    try:
        content = yaml.safe_load(file.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise ConfigError(f"{file}: no such run or configuration file") from None
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"{file}: cannot be read: {error}") from None
    except yaml.YAMLError as error:
        mark = getattr(error, "problem_mark", None)
        where = f" line {mark.line + 1}" if mark else ""
        raise ConfigError(f"{file}:{where} not YAML: {getattr(error, 'problem', None) or error}") from None
    if content is None:
        return {}
    if not isinstance(content, dict) or not all(isinstance(key, str) for key in content):
        raise ConfigError(f"{file}: expected sections such as `data:` and `train:` at the top level")
    return content


def _leaves(tree: Mapping[str, Any], above: KeyPath = ()) -> Iterator[tuple[KeyPath, Any]]:
    for key, value in tree.items():
        path = (*above, str(key))
        if isinstance(value, dict) and value:
            yield from _leaves(value, path)
        elif value is not None or above:  # `train:` with nothing under it says nothing
            yield path, value


def _parse_assignment(text: str) -> tuple[KeyPath, Any, str]:
    key, equals, value = text.partition("=")
    if not equals or not key.strip(".") or ".." in key:
        raise ConfigError(f"{text!r}: expected key=value, for example train.epochs=2")
    return tuple(key.strip().split(".")), _scalar(value, text), "command line"


def _from_environment(model: type[BaseModel], environment: Mapping[str, str]) -> list[tuple[KeyPath, Any, str]]:
    found = []
    for name in sorted(environment):
        if name.startswith(ENVIRONMENT_PREFIX) and name not in NOT_SETTINGS:
            segments = name[len(ENVIRONMENT_PREFIX) :].split("__")
            found.append((_fold_case(model, segments), _scalar(environment[name], name), f"environment {name}"))
    return found


def _fold_case(model: type[BaseModel], segments: Sequence[str]) -> KeyPath:
    """Environment variables are upper case, our keys lower case; names that users chose (features) stay as they are."""
    path: list[str] = []
    at: type[BaseModel] | None = model
    chosen = False  # the next segment is a key of a mapping
    for segment in segments:
        path.append(segment if chosen or at is None else segment.lower())
        if chosen or at is None:
            chosen = False
            continue
        field = at.model_fields.get(path[-1])
        at = _model_in(field.annotation) if field else None
        chosen = field is not None and _is_mapping(field.annotation)
    return tuple(path)


def _scalar(text: str, where: str) -> Any:
    try:
        return yaml.safe_load(text) if text else ""
    except yaml.YAMLError:
        raise ConfigError(f"{where}: {text!r} is not a YAML value; quote it") from None


def _put(values: dict[str, Any], sources: dict[KeyPath, str], path: KeyPath, value: Any, source: str) -> None:
    at = values
    for key in path[:-1]:
        if not isinstance(at.get(key), dict):
            at[key] = {}
        at = at[key]
    if isinstance(value, dict):
        at.setdefault(path[-1], {})
        for below, leaf in _leaves(value):
            _put(values, sources, path + below, leaf, source)
    else:
        at[path[-1]] = value
        sources[path] = source


def _model_in(annotation: Any) -> type[BaseModel] | None:
    """The model that an annotation names: `M`, `M | None`, `dict[str, M]`."""
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        return annotation
    return next(filter(None, map(_model_in, get_args(annotation))), None)


def _is_mapping(annotation: Any) -> bool:
    return getattr(annotation, "__origin__", annotation) is dict or any(map(_is_mapping, get_args(annotation)))


def _check_known(model: type[BaseModel], path: KeyPath, source: str) -> None:
    at: type[BaseModel] | None = model
    i = 0
    while i < len(path) and at is not None:
        field = at.model_fields.get(path[i])
        if field is None:
            raise ConfigError(f"{source}: unknown key {'.'.join(path)!r}{_nearest(model, at, path, i)}")
        if _is_mapping(field.annotation):
            at, i = _model_in(field.annotation), i + 2
            if at is None:  # a mapping of plain values: any key goes
                return
        else:
            at, i = _model_in(field.annotation), i + 1
    if i < len(path):
        raise ConfigError(f"{source}: unknown key {'.'.join(path)!r}: {'.'.join(path[:i])} is a value, not a section")


def _nearest(root: type[BaseModel], at: type[BaseModel], path: KeyPath, i: int) -> str:
    near = difflib.get_close_matches(path[i], list(at.model_fields), 1, 0.6)
    if near:
        return f"; did you mean {'.'.join((*path[:i], near[0]))!r}?"
    everywhere = dict(_keys(root))
    if path[-1] in everywhere:  # the right key in the wrong section, or in none
        return f"; did you mean {everywhere[path[-1]]!r}?"
    return f"; {'.'.join(path[:i]) or 'the top level'} takes {', '.join(at.model_fields)}"


def _keys(model: type[BaseModel], above: str = "") -> Iterator[tuple[str, str]]:
    for name, field in model.model_fields.items():
        yield name, above + name
        inner = _model_in(field.annotation)
        if inner is not None and not _is_mapping(field.annotation):
            yield from _keys(inner, f"{above}{name}.")


def _describe(error: ValidationError, sources: Mapping[KeyPath, str]) -> str:
    first, *others = error.errors()
    path = tuple(str(part) for part in first["loc"])
    while path and path not in sources:  # pydantic adds parts for unions and list items
        path = path[:-1]
    path = path or tuple(str(part) for part in first["loc"])
    source = sources.get(path)
    message = first["msg"].removeprefix("Value error, ")
    given = (
        ""
        if first["type"] == "missing" or not path or isinstance(first["input"], dict)
        else f", got {first['input']!r}"
    )
    name = ".".join(path)
    more = f" (and {len(others)} more)" if others else ""
    return f"{source + ': ' if source else ''}{name + ': ' if name else ''}{message}{given}{more}"
