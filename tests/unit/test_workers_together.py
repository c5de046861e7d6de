"""Features of one method in one call: the same bits as one by one."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from embershard.datasets.schema import Ids
from embershard.parameter_server.store import Store
from embershard.parameter_server.tables import Optimizer
from embershard.workers.embeddings.base import Feature
from embershard.workers.embeddings.collapse import table_pieces
from embershard.workers.embeddings.collection import EmbeddingBagCollection
from embershard.workers.embeddings.gather import distinct_rows

SGD = Optimizer(kind="sgd")
N, D = 30, 4
METHODS = {
    "mlet": {"inner_dim": 8},
    "narrow": {"inner_dim": 2},
    "memcom": {"rows": 7, "bias": True, "threshold": 0},
    "qr": {"rows": 7, "threshold": 0},
    "double_hash": {"rows": 7, "threshold": 0},
}


@pytest.mark.parametrize(("method", "options"), METHODS.items(), ids=METHODS)
def test_features_composed_together_equal_those_composed_alone(method: str, options: dict[str, Any]) -> None:
    """Bit by bit, vectors and gradients, one id per sample and bags, beside other methods and poolings."""
    rng = np.random.default_rng(1)
    names = ("a", "b", "c", "d")
    one = Ids.from_dict({name: rng.integers(0, N, 7) for name in names})
    sizes = {name: rng.integers(0, 4, 7) for name in names}
    bags = Ids.from_dict(
        {n: (rng.integers(0, N, sizes[n].sum()), np.concatenate([[0], np.cumsum(sizes[n])])) for n in names}
    )
    for ids in (one, bags):
        with Store.open(blocks=20) as store, Store.open(blocks=20) as other:
            parts = [
                Feature(name="a", cardinality=N, dim=D, method=method, **options),
                Feature(name="b", cardinality=N, dim=D),
                Feature(name="c", cardinality=N, dim=D, method=method, **options),
                Feature(name="d", cardinality=N, dim=D, method=method, pooling="mean", **options),
            ]
            together = EmbeddingBagCollection(parts, store=store, optimizer=SGD)
            assert [group.features for group in together._groups] == [(1,), (0, 2), (3,)]
            weights = torch.randn(7, 4, D, generator=torch.Generator().manual_seed(0))
            out = together(ids)
            (out * weights).sum().backward()
            together.step()
            for f, part in enumerate(parts):
                alone = EmbeddingBagCollection([part], store=other, optimizer=SGD)
                own = alone(ids)
                assert torch.equal(own[:, 0], out[:, f])
                (own[:, 0] * weights[:, f]).sum().backward()
                alone.step()
                for mine, theirs in zip(alone.methods[0].parameters(), together.methods[f].parameters(), strict=True):
                    assert torch.equal(mine.grad, theirs.grad)
                for table in alone.methods[0].tables:
                    mine, theirs = (np.concatenate(list(table_pieces(s, table.name))) for s in (other, store))
                    assert np.array_equal(mine, theirs)


def test_distinct_rows_are_numbered_as_they_first_occur() -> None:
    rng = np.random.default_rng(0)
    for size in (0, 1, 50):
        inverse = rng.integers(0, 20, size).astype(np.int32)
        firsts, number = distinct_rows(inverse, 20)
        assert firsts.tolist() == sorted(np.unique(inverse, return_index=True)[1])
        assert np.array_equal(inverse[firsts][number], inverse)
        assert firsts.dtype == number.dtype == np.int32
        # Another numbering of the rows, as another layout has it: nothing changes.
        moved = rng.permutation(20).astype(np.int32)[inverse]
        again = distinct_rows(moved, 20)
        assert np.array_equal(again[0], firsts) and np.array_equal(again[1], number)
