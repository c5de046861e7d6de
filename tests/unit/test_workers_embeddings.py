"""The collection as anybody's loop uses it: vectors, bags, several forwards, widths, methods, and its errors."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from embershard.datasets.schema import Ids
from embershard.parameter_server.store import Store
from embershard.parameter_server.tables import Optimizer, TableError
from embershard.workers.embeddings.base import EmbeddingError, Feature, Lookup, Method, RowMap
from embershard.workers.embeddings.collection import EmbeddingBagCollection
from embershard.workers.embeddings.planning import METHODS

SGD = Optimizer(kind="sgd")


@pytest.fixture
def store() -> Any:
    with Store.open(shards=3, blocks=40, seed=1) as store:
        yield store


def features(**more: Any) -> list[Feature]:
    return [
        Feature(name="user", cardinality=50, dim=4, **more),
        Feature(name="item", cardinality=200, dim=4, **more),
        Feature(name="day", cardinality=7, dim=4, **more),
    ]


def table(embeddings: EmbeddingBagCollection, name: str) -> torch.Tensor:
    """All vectors of a one-width `full` collection's feature, through single-id lookups."""
    feature = next(f for f in embeddings.features if f.name == name)
    n = feature.cardinality or 0
    ids = {f.name: np.arange(n) if f.name == name else np.zeros(n, np.int64) for f in embeddings.features}
    with torch.no_grad():
        return embeddings(ids)[:, embeddings.names.index(name)].clone()


def test_vectors_are_the_rows_and_step_applies_the_summed_gradient(store: Any) -> None:
    embeddings = EmbeddingBagCollection(features(), store=store, optimizer=SGD, learning_rate=0.5)
    before = {name: table(embeddings, name) for name in embeddings.names}
    rng = np.random.default_rng(0)
    ids = {"user": rng.integers(0, 50, 9), "item": np.array([5] * 9), "day": rng.integers(0, 7, 9)}
    out = embeddings(ids)
    weights = torch.from_numpy(rng.standard_normal((9, 3, 4), dtype=np.float32))
    for f, name in enumerate(embeddings.names):
        assert torch.equal(out[:, f], before[name][ids[name]])
    (out * weights).sum().backward()
    embeddings.step()
    for f, name in enumerate(embeddings.names):
        expected = before[name].index_add(0, torch.from_numpy(ids[name]), weights[:, f], alpha=-0.5)
        torch.testing.assert_close(table(embeddings, name), expected)


def test_several_forwards_before_one_step_add_up(store: Any) -> None:
    # Adagrad is not linear: one update of the summed gradient differs from one per forward.
    adagrad = Optimizer(kind="adagrad", initial_accumulator=0.25)
    embeddings = EmbeddingBagCollection(features(), store=store, optimizer=adagrad, learning_rate=0.1)
    before = table(embeddings, "item")
    first, second = [3, 4, 4, 9], [4, 150, 3, 3]
    for ids, weight in ((first, 1.0), (second, 2.0)):
        zeros = np.zeros(4, np.int64)
        (weight * embeddings({"user": zeros, "item": np.array(ids), "day": zeros})).sum().backward()
    embeddings.step()
    grad = torch.zeros_like(before)
    for i in first:
        grad[i] += 1
    for i in second:
        grad[i] += 2
    expected = before - 0.1 * grad / ((0.25 + grad.square()).sqrt() + 1e-8)
    torch.testing.assert_close(table(embeddings, "item"), expected)


def test_one_ticket_forwarded_twice_counts_twice_and_no_grad_not_at_all(store: Any) -> None:
    embeddings = EmbeddingBagCollection(features()[:1], store=store, optimizer=SGD, learning_rate=1.0)
    before = table(embeddings, "user")
    ticket = embeddings.prefetch({"user": np.array([7, 8])})
    (embeddings(ticket).sum() + embeddings(ticket).sum()).backward()
    with torch.no_grad():
        embeddings({"user": np.array([9])})
    embeddings.step()
    after = table(embeddings, "user")
    torch.testing.assert_close(after[7:9], before[7:9] - 2)
    assert torch.equal(after[9], before[9])
    pushes = store.counters.pushes
    embeddings.step()  # nothing was forwarded since
    assert store.counters.pushes == pushes


def weighted(rng: np.random.Generator) -> tuple[Ids, dict[str, tuple[np.ndarray, np.ndarray, np.ndarray]]]:
    """Six samples' bags of three features in another order than the collection's, and each feature's own part."""
    parts = {}
    for name, n in (("day", 7), ("item", 200), ("user", 50)):
        offsets = np.concatenate([[0], np.cumsum(rng.integers(0, 4, 6))])
        parts[name] = (rng.integers(0, n, offsets[-1]), offsets, rng.standard_normal(offsets[-1]).astype(np.float32))
    values, offsets, weights = (list(part) for part in zip(*parts.values(), strict=True))
    ends = np.cumsum([0, *(own[-1] for own in offsets)])
    joined = np.concatenate([np.zeros(1, np.int64), *(own[1:] + end for own, end in zip(offsets, ends, strict=False))])
    return Ids(tuple(parts), np.concatenate(values), joined, np.concatenate(weights)), parts


@pytest.mark.parametrize("method", ["full", "memcom"])
def test_weights_of_bags_multiply_vectors(store: Any, method: str) -> None:
    sizes = {} if method == "full" else {"rows": 3, "threshold": 0}
    embeddings = EmbeddingBagCollection(features(method=method, **sizes), store=store, optimizer=SGD, learning_rate=1.0)
    before = {name: table(embeddings, name) for name in embeddings.names}
    ids, parts = weighted(np.random.default_rng(4))
    out = embeddings(ids)
    for f, name in enumerate(embeddings.names):
        values, offsets, weights = map(torch.from_numpy, parts[name])
        expected = torch.nn.functional.embedding_bag(
            values, before[name], offsets, mode="sum", per_sample_weights=weights, include_last_offset=True
        )
        torch.testing.assert_close(out[:, f], expected)
    out.sum().backward()
    embeddings.step()
    if method == "full":
        values, _, weights = parts["item"]
        grad = np.zeros((200, 4), np.float32)
        np.add.at(grad, values, weights[:, None])
        torch.testing.assert_close(table(embeddings, "item"), before["item"] - torch.from_numpy(grad))


def test_weights_of_bags_are_refused_where_their_meaning_would_be_open(store: Any) -> None:
    embeddings = EmbeddingBagCollection(features(pooling="mean"), store=store)
    with pytest.raises(EmbeddingError, match=r"the weights of a bag .* set embedding.pooling=sum"):
        embeddings(weighted(np.random.default_rng(4))[0])


@pytest.mark.parametrize("pooling", ["sum", "mean"])
def test_bags_equal_torch_embedding_bag(store: Any, pooling: str) -> None:
    embeddings = EmbeddingBagCollection(features(pooling=pooling), store=store, optimizer=SGD, learning_rate=1.0)
    before = {name: table(embeddings, name) for name in embeddings.names}
    rng = np.random.default_rng(2)
    ids, expected, modules = {}, [], {}
    for name, n in (("day", 7), ("item", 200), ("user", 50)):  # another order than the features'
        sizes = rng.integers(0, 4, 6)
        offsets = np.concatenate([[0], np.cumsum(sizes)])
        ids[name] = (rng.integers(0, n, offsets[-1]), offsets)
        modules[name] = torch.nn.EmbeddingBag.from_pretrained(
            before[name].clone(), freeze=False, mode=pooling, include_last_offset=True
        )
    for name in embeddings.names:
        values, offsets = ids[name]
        expected.append(modules[name](torch.from_numpy(values), torch.from_numpy(offsets)))
    weights = torch.from_numpy(rng.standard_normal((6, 3, 4), dtype=np.float32))
    (torch.stack(expected, 1) * weights).sum().backward()
    out = embeddings(ids)
    torch.testing.assert_close(out, torch.stack(expected, 1))
    (out * weights).sum().backward()
    embeddings.step()
    for name in embeddings.names:
        torch.testing.assert_close(table(embeddings, name), before[name] - modules[name].weight.grad)


def test_other_widths_give_a_dict_and_the_same_numbers(store: Any) -> None:
    mixed = [Feature(name="a", cardinality=9, dim=4), Feature(name="b", cardinality=9, dim=2)]
    embeddings = EmbeddingBagCollection(mixed, store=store, optimizer=SGD, learning_rate=1.0)
    ids = {"a": np.array([1, 2]), "b": np.array([3, 3])}
    before = embeddings(ids)
    assert {name: tuple(v.shape) for name, v in before.items()} == {"a": (2, 4), "b": (2, 2)}
    (before["a"].sum() + before["b"].sum()).backward()
    embeddings.step()
    after = embeddings(ids)
    torch.testing.assert_close(after["a"], before["a"] - 1)
    torch.testing.assert_close(after["b"], before["b"] - 2)


class Scaled(Method):
    """A method with two tables, a dense parameter and a composition, as `memcom` has; here only to be composed."""

    options = frozenset()

    def __init__(self, feature: Feature, optimizer: Optimizer) -> None:
        from embershard.parameter_server.tables import TableSpec

        tables = [
            TableSpec(name=f"{feature.name}.rows", rows=5, width=feature.dim, optimizer=optimizer),
            TableSpec(name=f"{feature.name}.weight", rows=50, width=1, optimizer=optimizer),
        ]
        limit = feature.cardinality
        lookups = [Lookup(0, RowMap("index", 5)), Lookup(1, RowMap("index", 50, limit=limit))]
        super().__init__(feature, tables, lookups)
        self.gain = torch.nn.Parameter(torch.full((feature.dim,), 2.0))

    def compose(self, rows: Any) -> torch.Tensor:
        return rows[0] * rows[1] * self.gain


def test_a_method_of_two_tables_composes_per_id_before_pooling(store: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(METHODS, "scaled", Scaled)
    # A composed feature stands first, so the output has to be put in the features' order.
    mixed = [Feature(name="s", cardinality=50, dim=4, method="scaled"), *features()[:1]]
    embeddings = EmbeddingBagCollection(mixed, store=store, optimizer=SGD, learning_rate=1.0)
    assert [tuple(p.shape) for p in embeddings.parameters()] == [(4,)]
    bags = {"s": (np.array([3, 8, 12]), np.array([0, 2, 3])), "user": (np.array([1, 1]), np.array([0, 1, 2]))}
    ticket = embeddings.prefetch(bags)
    ids = np.array([3, 8, 12])
    parts = {part.slab: i for i, part in enumerate(ticket.parts)}
    rows = ticket.rows()
    wide, narrow = (
        rows[parts[store.layout.ref(name).slab]][
            ticket.inverse[parts[store.layout.ref(name).slab]][slice(-3, None)]
        ].detach()
        for name in ("s.rows", "s.weight")
    )
    assert torch.equal(wide[0], wide[1])  # 3 and 8 share a row (mod 5)
    expected = wide * narrow * 2
    out = embeddings(ticket)
    torch.testing.assert_close(out[0, 0], expected[0] + expected[1])
    torch.testing.assert_close(out[1, 0], expected[2])
    assert torch.equal(out[:, 1], torch.stack([table_row(embeddings, 1), table_row(embeddings, 1)]))
    out.sum().backward()
    embeddings.step()
    after = embeddings(bags)
    assert len(ids) == 3 and not torch.equal(after[:, 0], out[:, 0])
    assert next(embeddings.parameters()).grad is not None


def table_row(embeddings: EmbeddingBagCollection, row: int) -> torch.Tensor:
    with torch.no_grad():
        return embeddings({"s": np.array([0]), "user": np.array([row])})[0, 1]


def test_hashed_features_take_any_id_and_share_rows(store: Any) -> None:
    wanted = [
        Feature(name="h", method="hash", rows=3, dim=4),
        Feature(name="u", distinct=10, dim=4),
    ]
    embeddings = EmbeddingBagCollection(wanted, store=store)
    ids = np.array([-1, 0, 2**62, 5, 7, 11, 13, 17], np.int64)
    out = embeddings({"h": ids, "u": ids}).detach()
    assert len(torch.unique(out[:, 0], dim=0)) == 3
    assert store.layout.find("h.hashed").rows == 3 and store.layout.find("u.full").rows == 20


def test_layout_does_not_matter() -> None:
    """Initial vectors depend on (seed, table, row) alone: not on shards, blocks, or the tables beside."""
    ids = {"user": np.array([0, 7, 49]), "item": np.array([1, 2, 199]), "day": np.array([6, 0, 3])}
    with Store.open(shards=1, blocks=16, seed=9) as a, Store.open(shards=4, blocks=64, seed=9) as b:
        whole = EmbeddingBagCollection(features(), store=a)(ids)
        alone = EmbeddingBagCollection(features()[1:2], store=b)(ids)
        assert torch.equal(whole[:, 1:2], alone)


@pytest.mark.parametrize(
    ("ids", "message"),
    [
        ({"user": [50]}, r"feature 'user': id 50 lies outside its cardinality \[0, 50\).*out_of_range=modulo"),
        ({"user": [-2]}, r"feature 'user': id -2 lies outside"),
        ({"user": [-1]}, r"feature 'user': a missing id \(-1\).*set data.missing_id"),
        ({"item": [0]}, r"the batch has no ids for feature 'user': it holds item"),
    ],
)
def test_wrong_ids_are_errors_that_say_what_to_do(store: Any, ids: dict[str, list[int]], message: str) -> None:
    embeddings = EmbeddingBagCollection(features()[:1], store=store)
    with pytest.raises(EmbeddingError, match=message):
        embeddings({name: np.array(values) for name, values in ids.items()})


def test_out_of_range_modulo_wraps(store: Any) -> None:
    embeddings = EmbeddingBagCollection(features(out_of_range="modulo")[:1], store=store)
    out = embeddings({"user": np.array([3, 53, -47])})
    assert torch.equal(out[0], out[1]) and torch.equal(out[0], out[2])


def test_a_name_twice_or_another_shape_is_an_error(store: Any) -> None:
    with pytest.raises(EmbeddingError, match="each name once"):
        EmbeddingBagCollection([*features(), *features()], store=store)
    EmbeddingBagCollection(features(), store=store)
    with pytest.raises(TableError, match=r"'user\.full'"):
        EmbeddingBagCollection([Feature(name="user", cardinality=51, dim=4)], store=store)


def test_an_empty_batch_passes_through(store: Any) -> None:
    embeddings = EmbeddingBagCollection(features(), store=store)
    none = np.empty(0, np.int64)
    out = embeddings(Ids.from_dict(dict.fromkeys(("user", "item", "day"), none)))
    assert out.shape == (0, 3, 4)
    out.sum().backward()
    embeddings.step()
