"""Pushes stay within the ledger's window, however long one of them has to wait."""

import numpy as np
import pytest
from embershard.parameter_server.kernels import locate
from embershard.parameter_server.local import LocalStore
from embershard.parameter_server.sharded import MAX_OPEN_PUSHES
from embershard.parameter_server.store import StoreTimeout
from embershard.parameter_server.tables import Initializer, Optimizer, TableSpec

TABLE = TableSpec(
    name="t",
    rows=400,
    width=1,
    initializer=Initializer(kind="constant", scale=0.0),
    optimizer=Optimizer(kind="sgd"),
)


def test_no_push_runs_ahead_of_one_that_waits() -> None:
    """The others are answered at once, so it is not their number that counts."""
    with LocalStore(blocks=40, timeout=1.0) as store:
        store.create_tables([TABLE])
        (slab,) = store.layout.slabs
        part, _ = locate(slab, np.zeros(1, np.int32), np.array([0, 400]), np.arange(400), store.block_map.rank())
        sealed, others = part.select(part.blocks == 7)[0], part.select(part.blocks != 7)[0]
        store.members[0].begin_move(7, "move")
        store.members[0].changes_of(7, "move", seal=True)
        ones = np.ones((400, 1), np.float32)
        waiting = store.push([sealed], [ones[: len(sealed.index)]], [1.0])
        for _ in range(MAX_OPEN_PUSHES - 1):
            store.push([others], [ones[: len(others.index)]], [1.0]).result()
        assert not waiting.done()
        store.push([others], [ones[: len(others.index)]], [1.0]).result()
        assert waiting.done()  # it has failed by its deadline, and only then could the next one be sent
        with pytest.raises(StoreTimeout):
            waiting.result()
