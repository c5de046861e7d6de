"""Shards in processes of their own, ended with the test."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parent))
from shards import Shards


@pytest.fixture
def shards(tmp_path: Path) -> Iterator[Callable[..., Shards]]:
    """Makes `Shards`, with a generation begun."""
    made: list[Shards] = []

    def make(count: int, spare: int = 0) -> Shards:
        made.append(Shards(tmp_path, count, spare))
        made[-1].begin()
        return made[-1]

    yield make
    for one in made:
        one.close()
