"""Routing: every row of a call reaches exactly the owner of its block, in order, however the blocks are dealt."""

import numpy as np
from embershard.parameter_server.requests import RowSet
from embershard.parameter_server.routing import split
from hypothesis import given, settings
from hypothesis import strategies as st


@settings(max_examples=60, deadline=None)
@given(
    owners=st.lists(st.integers(0, 3), min_size=4, max_size=24),
    counts=st.lists(st.integers(1, 5), min_size=4, max_size=24),
    keep=st.lists(st.booleans(), min_size=24, max_size=24),
)
def test_every_row_reaches_its_owner(owners, counts, keep):
    blocks = np.array([b for b in range(min(len(owners), len(counts))) if keep[b]], np.uint16)
    sizes = np.array([counts[b] for b in blocks], np.uint32)
    index = np.arange(int(sizes.sum()), dtype=np.uint32) + 1000
    shares = split([RowSet(0, index, blocks, sizes)], np.array(owners, np.uint16))
    seen = np.zeros(len(index), int)
    block_of_row = np.repeat(blocks, sizes)
    for shard, (share,) in shares.items():
        rows = index[share.where]
        assert rows.tolist() == share.rows.index.tolist()
        assert {owners[b] for b in share.rows.blocks} == {shard}
        assert np.repeat(share.rows.blocks, share.rows.counts).tolist() == block_of_row[share.where].tolist()
        seen[share.where] += 1
    assert (seen == 1).all()
