"""Checkpoints that somebody damaged, or wrote to do harm: an error of one line, and nothing of it is loaded."""

from __future__ import annotations

import json
import shutil
import tracemalloc
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from embershard.parameter_server import checkpoint, files, restore
from embershard.parameter_server.blocks import BlockMap
from embershard.parameter_server.checkpoint import CheckpointError
from embershard.parameter_server.shard import Shard
from embershard.parameter_server.tables import Layout, TableSpec
from hypothesis import given, settings
from hypothesis import strategies as st

BLOCKS = 10
NAMES = {"t": "t"}
NUMBERS = [-1, 0, 3, 2**31, 2**63, 10**30]
WEIRD = [*NUMBERS, None, "", "../../x", "/etc/passwd", "a" * 5000, [], {}, [[]], {"t": 1}, 1.5, True, float("nan")]


@pytest.fixture(scope="module")
def shard() -> Shard:
    shard = Shard(0, Layout(BLOCKS))
    shard.set_block_map(BlockMap.initial(BLOCKS, ("here",)))
    shard.create_tables([TableSpec(name="t", rows=30, width=2)])
    return shard


@pytest.fixture(scope="module")
def saved(shard: Shard, tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("hostile") / "step-1"
    blocks = restore.write_blocks(shard.mark(), str(directory))
    dense = checkpoint.write_dense(str(directory), {"w": np.arange(3.0)})
    checkpoint.commit(str(directory), shard.layout, 1, blocks, dense, {"cursor": [1]})
    return directory


def content(shard: Shard) -> list[bytes]:
    return [shard.export_block(block)["t/weight"].tobytes() for block in range(BLOCKS)]


@settings(max_examples=40, deadline=None)
@given(st.data())
def test_any_changed_byte_is_noticed(saved: Path, shard: Shard, data: Any) -> None:
    path = data.draw(st.sampled_from(sorted(path for path in saved.rglob("*") if path.is_file())), label="file")
    original = path.read_bytes()
    at = data.draw(st.integers(0, len(original) - 1), label="byte")
    changed = original[:at] + data.draw(st.binary(max_size=4)) + original[at + data.draw(st.integers(0, 3)) :]
    try:
        path.write_bytes(changed)
        problems = checkpoint.verify(str(saved))
        if path.name == files.MANIFEST:  # JSON may change without meaning anything else
            assert problems or checkpoint.read_manifest(str(saved)).files
        else:
            assert bool(problems) == (changed != original)
        assert all("\n" not in problem and str(saved) in problem for problem in problems)
    finally:
        path.write_bytes(original)


def places(value: Any) -> Iterator[tuple[Any, Any]]:
    """Every (container, key) within a JSON value."""
    for key, inner in list(value.items() if isinstance(value, dict) else enumerate(value)):
        yield value, key
        if isinstance(inner, dict | list):
            yield from places(inner)


@settings(max_examples=80, deadline=None)
@given(st.data())
def test_a_manifest_written_to_do_harm(saved: Path, shard: Shard, data: Any) -> None:
    """Its digest is right, and what it says is not."""
    manifest = saved / files.MANIFEST
    original, before = manifest.read_text(), content(shard)
    described = json.loads(original)
    del described["digest"]
    for _ in range(data.draw(st.integers(1, 2))):
        container, key = data.draw(st.sampled_from(list(places(described))), label="place")
        container[key] = data.draw(st.sampled_from(WEIRD), label="value")
    try:
        files.write_signed(str(saved), files.MANIFEST, described)
        try:
            restore.check_load(shard, str(saved), NAMES)
        except CheckpointError as error:
            assert str(saved) in str(error)
        assert content(shard) == before
    finally:
        manifest.write_text(original)


def test_a_stated_size_costs_no_memory(saved: Path, tmp_path: Path) -> None:
    directory = Path(shutil.copytree(saved, tmp_path / "step-1"))
    entry = checkpoint.read_manifest(str(directory)).files[0].model_copy(update={"bytes": 1 << 40})
    tracemalloc.start()
    try:
        with pytest.raises(CheckpointError, match=f"not {1 << 40}"):
            checkpoint.read_block(str(directory), entry)
        assert tracemalloc.get_traced_memory()[1] < 1 << 20
    finally:
        tracemalloc.stop()
