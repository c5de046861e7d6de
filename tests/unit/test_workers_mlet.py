"""MLET and narrow: the product against its algebra, over the store, collapsed, and what they refuse."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from embershard.parameter_server.requests import Clock
from embershard.parameter_server.store import Store
from embershard.parameter_server.tables import Optimizer
from embershard.workers.embeddings.base import EmbeddingError, Feature
from embershard.workers.embeddings.collapse import collapse, table_pieces
from embershard.workers.embeddings.collection import EmbeddingBagCollection
from embershard.workers.embeddings.mlet import MLET
from embershard.workers.embeddings.planning import EmbeddingSize, build_method
from embershard.workers.embeddings.projected import Projected
from embershard.workers.learner import Learner
from embershard.workers.optimizers import DenseConfig, OptimizerConfig, SparseConfig

sys.path.insert(0, str(Path(__file__).parents[1] / "oracles"))
from mlet_reference import gradients, sgd_change
from workers_cases import CARDINALITIES, DIM, batches, network

SGD = Optimizer(kind="sgd")
N, K, D = 30, 8, 4


def feature(name: str = "item", method: str = "mlet", **more: Any) -> Feature:
    sizes = {"mlet": {"inner_dim": K}, "narrow": {"inner_dim": 2}}.get(method, {})
    return Feature(name=name, cardinality=N, dim=D, method=method, **(sizes | more))


def collection(store: Store, *features: Feature, rate: float = 0.5) -> EmbeddingBagCollection:
    return EmbeddingBagCollection(features, store=store, optimizer=SGD, learning_rate=rate)


def whole(store: Store, table: str) -> np.ndarray:
    return np.concatenate(list(table_pieces(store, table)))


def projection(embeddings: EmbeddingBagCollection, number: int = 0) -> torch.nn.Parameter:
    method = embeddings.methods[number]
    assert isinstance(method, Projected)
    return method.projection


# Criteo Kaggle's and MLPerf Terabyte's cardinalities (research notes, sections 6.1 and 6.3).
KAGGLE_ROWS, TERABYTE_ROWS = 33_762_577, 187_767_399


def test_parameters_are_those_of_both_layers_and_the_collapsed_table_is_of_width_d() -> None:
    method = build_method(Feature(name="a", cardinality=KAGGLE_ROWS, dim=16, method="mlet", inner_dim=64), SGD)
    assert [(t.rows, t.width) for t in method.tables] == [(KAGGLE_ROWS, 64)]
    assert method.parameter_count == KAGGLE_ROWS * 64 + 64 * 16
    assert round(4 * KAGGLE_ROWS * 64 / 1e9, 2) == 8.64 and round(4 * KAGGLE_ROWS * 128 / 1e9, 2) == 17.29
    large = build_method(Feature(name="b", cardinality=TERABYTE_ROWS, dim=128, method="mlet", inner_dim=256), SGD)
    assert round(EmbeddingSize.of([large]).bytes / 1e9, 1) == 192.3
    narrow = build_method(Feature(name="c", cardinality=1000, dim=16, method="narrow", ratio=5), SGD)
    assert [(t.rows, t.width) for t in narrow.tables] == [(1000, 3)]
    assert narrow.parameter_count == 3000 + 3 * 16


@pytest.mark.parametrize(("method", "inner"), [("mlet", 64), ("narrow", 4)])
def test_vectors_begin_with_the_variance_of_the_single_layer_table(method: str, inner: int) -> None:
    n = 4000
    large = Feature(name="v", cardinality=n, dim=16, method=method, inner_dim=inner)
    with Store.open(seed=3) as store:
        embeddings = collection(store, large)
        with torch.no_grad():
            vectors = embeddings({"v": np.arange(n)})
    assert abs(vectors.mean()) < 2e-4
    # The projection's own few entries scatter more than the rows do.
    assert vectors.var().item() == pytest.approx(1 / (3 * n), rel=0.1 if method == "mlet" else 0.35)


def test_vectors_and_gradients_equal_the_dense_product() -> None:
    ids = np.array([3, 7, 3, 29, 0, 3])
    with Store.open(shards=3, blocks=30, seed=1) as store:
        embeddings = collection(store, feature())
        w1, w2 = whole(store, "item.factor"), projection(embeddings).detach().numpy().copy()
        ticket = embeddings.prefetch({"item": ids})
        out = embeddings(ticket)
        torch.testing.assert_close(out[:, 0], torch.from_numpy(w1[ids] @ w2))
        weights = np.random.default_rng(0).standard_normal(out.shape).astype(np.float32)
        (out * torch.from_numpy(weights)).sum().backward()
        g = np.zeros((N, D))
        np.add.at(g, ids, weights[:, 0])
        d1, d2 = gradients(w1.astype(np.float64), w2.astype(np.float64), g)
        np.testing.assert_allclose(projection(embeddings).grad, d2, atol=1e-6)
        assert len(ticket.parts[0].index) == 4  # row-sparse: only the batch's rows take part
        embeddings.step()
        np.testing.assert_allclose(whole(store, "item.factor"), w1 - 0.5 * d1, atol=1e-6)


def exact_step(rate: float) -> tuple[np.ndarray, ...]:
    """W1, W2 before, G, W1, W2 after one SGD step of MLET's own composition in float64; rows 20 and on are absent."""
    rng = np.random.default_rng(5)
    method = MLET(feature(), SGD).double()
    w1 = torch.tensor(rng.standard_normal((N, K)), requires_grad=True)
    ids, weights = torch.from_numpy(rng.integers(0, 20, 25)), torch.from_numpy(rng.standard_normal((25, D)))
    before = w1.detach().numpy().copy(), method.projection.detach().numpy().copy()
    (method.compose_all([method], [w1[ids]], [0, 25]) * weights).sum().backward()
    assert w1.grad is not None and method.projection.grad is not None
    with torch.no_grad():
        w1 -= rate * w1.grad
        method.projection -= rate * method.projection.grad
    g = np.zeros((N, D))
    np.add.at(g, ids.numpy(), weights.numpy())
    return *before, g, w1.detach().numpy(), method.projection.detach().numpy()


def test_one_sgd_step_changes_every_row_as_the_algebra_says() -> None:
    w1, w2, g, after1, after2 = exact_step(0.1)
    change = after1 @ after2 - w1 @ w2
    np.testing.assert_allclose(change, sgd_change(w1, w2, g, 0.1), atol=1e-12)
    absent = np.arange(20, N)
    assert np.array_equal(after1[absent], w1[absent]) and np.abs(change[absent]).min() > 1e-6


def test_the_difference_of_the_grams_drifts_at_second_order() -> None:
    def drift(rate: float) -> float:
        w1, w2, _, after1, after2 = exact_step(rate)
        return float(np.abs((after1.T @ after1 - after2 @ after2.T) - (w1.T @ w1 - w2 @ w2.T)).max())

    assert drift(0.01) / drift(0.005) == pytest.approx(4, rel=1e-6)


def test_absent_rows_move_over_the_store_and_stay_with_a_single_layer() -> None:
    with Store.open(shards=2, blocks=30) as store:
        embeddings = collection(store, feature(), feature("plain", "full"))
        sgd = torch.optim.SGD(embeddings.parameters(), lr=0.5)
        everything = {"item": np.arange(N), "plain": np.arange(N)}
        with torch.no_grad():
            before = embeddings(everything)
        factor = whole(store, "item.factor")
        embeddings({"item": np.array([1, 2]), "plain": np.array([1, 2])}).square().sum().backward()
        embeddings.step()
        sgd.step()
        with torch.no_grad():
            moved = (embeddings(everything) != before).any(2)
        absent = np.setdiff1d(np.arange(N), [1, 2])
        assert moved[absent, 0].all() and not moved[absent, 1].any() and moved[[1, 2]].all()
        assert np.array_equal(whole(store, "item.factor")[absent], factor[absent])


def test_an_empty_batch_gives_no_vectors_and_zero_gradients() -> None:
    with Store.open(blocks=20) as store:
        embeddings = collection(store, feature("a"), feature("b"))
        out = embeddings({"a": np.empty(0, np.int64), "b": np.empty(0, np.int64)})
        assert out.shape == (0, 2, D)
        out.sum().backward()
        assert not projection(embeddings, 1).grad.any()


def trained(shards: int, kind: str = "rowwise_adagrad") -> tuple[list[np.ndarray], Any, Store]:
    store = Store.open(shards=shards, blocks=40, seed=5)
    net = network(store, sparse=kind, method="mlet", inner_dim=8)
    store.begin(1, 1, 0)
    config = OptimizerConfig(sparse=SparseConfig(kind=kind, learning_rate=0.1), dense=DenseConfig(learning_rate=0.1))
    learner = Learner(net, config, total_steps=6)
    for step, batch in enumerate(batches(6, 32), 1):
        clock = Clock(1, step, sync=True)
        learner.step(batch, net.embeddings.prefetch(batch.ids, clock), clock)
    net.embeddings.drain()
    tables = [whole(store, f"c{i}.factor") for i in range(len(CARDINALITIES))]
    return tables + [p.detach().numpy() for p in net.parameters()], net, store


def test_trained_in_sync_is_the_same_for_any_number_of_shards() -> None:
    (one, _, a), (two, _, b), (three, _, c) = trained(1), trained(2), trained(3)
    with a, b, c:
        for mine, *others in zip(one, two, three, strict=True):
            assert all(np.array_equal(mine, other) for other in others)


def test_collapsed_tables_give_the_same_logits_and_need_no_projection() -> None:
    _, net, store = trained(3)
    with store:
        collapsed = []
        for f, n in enumerate(CARDINALITIES):
            pieces = list(collapse(store, net.embeddings.methods[f], rows=7))
            assert [len(piece) for piece in pieces] == [7] * (n // 7) + [n % 7] * (n % 7 > 0)
            table = np.concatenate(pieces)
            assert table.shape == (n, DIM) and table.dtype == np.float32
            exact = whole(store, f"c{f}.factor").astype(np.float64) @ projection(net.embeddings, f).detach().numpy()
            np.testing.assert_allclose(table, exact, atol=1e-6)
            np.testing.assert_allclose(next(collapse(store, net.embeddings.methods[f])), table, atol=1e-6)
            collapsed.append(torch.from_numpy(table))
        batch = batches(1, 50, seed=4)[0]
        ids = batch.ids.values.reshape(len(CARDINALITIES), -1)
        vectors = torch.stack([table[own] for table, own in zip(collapsed, ids, strict=True)], 1)
        dense = torch.from_numpy(batch.dense)
        with torch.no_grad():
            logits = net(dense, net.embeddings.prefetch(batch.ids))
            torch.testing.assert_close(net.model(dense, vectors), logits, atol=1e-5, rtol=0)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"inner_dim": 3}, r"feature 'item': method mlet .* is 3: set embedding.inner_dim=16, or .*method=narrow"),
        ({"inner_dim": None}, r"feature 'item': method mlet .* is missing: set embedding.inner_dim=16"),
        ({"ratio": 2.0}, r"feature 'item': method mlet takes no ratio"),
        ({"method": "narrow", "inner_dim": None}, r"narrow needs either embedding.inner_dim or embedding.ratio"),
        ({"method": "narrow", "inner_dim": 4}, r"narrow has rows of fewer floats than dim \(4\), not 4: .* mlet"),
        ({"method": "narrow", "inner_dim": None, "ratio": 1.0}, r"fewer floats than dim \(4\), not 4"),
        ({"method": "narrow", "inner_dim": None, "ratio": 4.5}, r"at dim 4 embedding.ratio is at most 4, not 4.5"),
    ],
)
def test_what_cannot_be_says_what_can(options: dict[str, Any], message: str) -> None:
    with pytest.raises(EmbeddingError, match=message):
        build_method(feature(**options), SGD)
