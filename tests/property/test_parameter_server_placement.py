"""Placement and initial values: invariants 1 (layout does not matter) and 5 (patterned ids spread)."""

import sys
from pathlib import Path

import numpy as np
import pytest
from embershard.parameter_server import kernels
from embershard.parameter_server.blocks import BlockMap
from embershard.parameter_server.requests import PullRequest
from embershard.parameter_server.shard import Shard
from embershard.parameter_server.tables import Layout, Optimizer, TableSpec
from hypothesis import given, settings
from hypothesis import strategies as st

sys.path.insert(0, str(Path(__file__).parents[1] / "oracles"))
import parameter_server_reference as reference

keys = st.integers(0, 2**64 - 1)


@settings(max_examples=40, deadline=None)
@given(st.integers(1, 3000), keys)
def test_permute_is_a_bijection(n: int, key: int) -> None:
    positions = {int(kernels.permute(row, n, np.uint64(key))) for row in range(n)}
    assert positions == set(range(n))


@settings(max_examples=50, deadline=None)
@given(st.integers(1, 2**48), keys, st.data())
def test_unpermute_undoes_permute(n: int, key: int, data: st.DataObject) -> None:
    row = data.draw(st.integers(0, n - 1))
    position = int(kernels.permute(row, n, np.uint64(key)))
    assert 0 <= position < n
    assert int(kernels.unpermute(position, n, np.uint64(key))) == row


@settings(max_examples=30, deadline=None)
@given(st.integers(1, 2000), st.integers(1, 300), keys)
def test_every_row_has_a_place_of_its_own(n: int, blocks: int, key: int) -> None:
    seen = []
    for block in range(blocks):
        rows = np.empty(kernels.share_rows(block, blocks, n, np.uint64(key)), np.int64)
        assert len(rows) <= -(-n // blocks)
        kernels.rows_of_share(block, blocks, n, np.uint64(key), rows)
        seen += rows.tolist()
    assert sorted(seen) == list(range(n))


def read_all(shards: list[Shard], name: str) -> np.ndarray:
    """A whole table, through pulls."""
    layout = shards[0].layout
    ref = layout.ref(name)
    slab = layout.slabs[ref.slab]
    rows = np.arange(slab.tables[ref.table].rows)
    found, inverse = kernels.locate(
        slab, np.array([ref.table], np.int32), np.array([0, len(rows)]), rows, shards[0].block_map.rank()
    )
    values = np.full((len(rows), slab.width), np.nan, np.float32)
    for shard in shards:
        part, where = found.select(shard.block_map.owned_by(shard.number)[found.blocks])
        (done,) = shard.pull(PullRequest([part]), None, 0.0)
        values[where] = done.reply.rows[0]
    return values[inverse]


@settings(max_examples=15, deadline=None)
@given(
    st.integers(1, 4),
    st.integers(10, 60),
    st.lists(st.integers(1, 90), max_size=3),
    st.integers(0, 3),
    st.sampled_from(["sgd", "adam"]),
)
def test_initial_rows_do_not_depend_on_the_layout(
    shards: int, blocks_per_shard: int, others: list[int], place: int, kind: str
) -> None:
    """Whatever the blocks, the shards, the other tables, their order, and the optimizer."""
    table = TableSpec(name="kept", rows=75, width=2, optimizer=Optimizer(kind=kind))
    specs = [TableSpec(name=f"other-{i}", rows=rows, width=2) for i, rows in enumerate(others)]
    specs.insert(place, table)
    blocks = blocks_per_shard * shards
    block_map = BlockMap.initial(blocks, ("",) * shards)
    members = [Shard(i, Layout(blocks, 5)) for i in range(shards)]
    for member in members:
        member.set_block_map(block_map)
        member.create_tables(specs)
    expected = np.stack([reference.initial_row(table, row, 5) for row in range(75)])
    np.testing.assert_array_equal(read_all(members, "kept"), expected)


@pytest.mark.parametrize("blocks", [256, 100])
@pytest.mark.parametrize("pattern", ["multiples of the blocks", "multiples of 4096", "a range", "one residue"])
def test_patterned_ids_load_the_shards_evenly(blocks: int, pattern: str) -> None:
    """max/mean <= 1.1 over 4 shards."""
    count = 40_000
    ids = {
        "multiples of the blocks": np.arange(count) * blocks,
        "multiples of 4096": np.arange(count) * 4096,
        "a range": np.arange(count) + 10**7,
        "one residue": np.arange(count) * 1024 + 77,
    }[pattern]
    (slab,) = Layout(blocks, 0).add([TableSpec(name=pattern, rows=4096 * count, width=1)])
    block_map = BlockMap.initial(blocks, ("",) * 4)
    found, _ = kernels.locate(slab, np.zeros(1, np.int32), np.array([0, count]), ids, block_map.rank())
    load = np.bincount(block_map.owners[found.blocks], weights=found.counts, minlength=4)
    assert load.sum() == count
    assert load.max() / load.mean() <= 1.1


def test_small_tables_do_not_gather_in_one_block() -> None:
    """300 tables of one row over 4 shards."""
    (slab,) = Layout(256, 0).add([TableSpec(name=f"t{i}", rows=1, width=1) for i in range(300)])
    block_map = BlockMap.initial(256, ("",) * 4)
    tables = np.arange(300, dtype=np.int32)
    found, _ = kernels.locate(slab, tables, np.arange(301), np.zeros(300, np.int64), block_map.rank())
    load = np.bincount(block_map.owners[found.blocks], weights=found.counts, minlength=4)
    assert load.max() <= 1.5 * 300 / 4
