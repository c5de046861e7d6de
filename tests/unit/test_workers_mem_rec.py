"""MEM-REC: sizes, hashes, vectors per sample and per feature against counts of bins, and what it refuses."""

from __future__ import annotations

import itertools
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from embershard.datasets.schema import Ids
from embershard.parameter_server.requests import Clock
from embershard.parameter_server.store import Store
from embershard.parameter_server.tables import Optimizer
from embershard.workers.embeddings.base import EmbeddingError, Feature
from embershard.workers.embeddings.collapse import table_pieces
from embershard.workers.embeddings.collection import EmbeddingBagCollection
from embershard.workers.embeddings.gather import sample_sums
from embershard.workers.embeddings.lookups import SlabLookups
from embershard.workers.embeddings.mem_rec import TOKEN, WEIGHT, MemRec
from embershard.workers.embeddings.planning import EmbeddingConfig, EmbeddingSize, plan_features
from embershard.workers.learner import Learner
from embershard.workers.models.build import ModelConfig, build_model
from embershard.workers.network import Network, NetworkSpec
from embershard.workers.optimizers import DenseConfig, OptimizerConfig, SparseConfig

sys.path.insert(0, str(Path(__file__).parents[1] / "oracles"))
from mem_rec_reference import bins, counts, gradients, vector
from workers_cases import batches, network, schema

SGD = Optimizer(kind="sgd")
D = 4
# Sums of the cardinalities: MLPerf Terabyte v1, DLRM-DCNv2 (research notes, sections 6.3 and 6.4).
TERABYTE_ROWS, DCN_V2_ROWS = 187_767_399, 204_184_588


def feature(name: str, **more: Any) -> Feature:
    options = {"method": "mem_rec", "dim": D, "token_rows": 11, "weight_rows": 7, "scope": "sample"} | more
    return Feature(name=name, **options)


def collection(store: Store, *features: Feature) -> EmbeddingBagCollection:
    return EmbeddingBagCollection(features, store=store, optimizer=SGD, learning_rate=0.5)


def whole(store: Store, table: str) -> np.ndarray:
    return np.concatenate(list(table_pieces(store, table))).astype(np.float64)


def released(names: int, **more: Any) -> list[MemRec]:
    options = {"dim": 128, "token_rows": 75_000, "weight_rows": None} | more
    return [MemRec(feature(f"c{i}", **options), SGD) for i in range(names)]


def test_sizes_depend_on_neither_vocabulary_nor_features() -> None:
    size = EmbeddingSize.of(released(26))
    assert size.parameters == 9_675_000 and size.bytes == 38_700_000
    assert EmbeddingSize.of(released(27)).parameters == size.parameters
    assert EmbeddingSize.of(released(26, cardinality=10**9)).parameters == size.parameters
    for rows, ratio in ((TERABYTE_ROWS, 2484), (DCN_V2_ROWS, 2701)):
        one = released(1, cardinality=rows)
        assert round(EmbeddingSize.of(one).ratio) == ratio


def planned(cardinalities: tuple[int, ...], **options: Any) -> EmbeddingSize:
    features = plan_features(schema(cardinalities), EmbeddingConfig(method="mem_rec", dim=D, **options))
    return EmbeddingSize.of([MemRec(f, SGD) for f in features])


def test_a_ratio_or_a_budget_sizes_the_tables_that_all_features_share() -> None:
    # 1000 ids of width 4: 4000 numbers; a row of both tables is 5.
    assert planned((900, 100), ratio=4).parameters == 1000
    assert planned((900, 100), ratio=4, weight_rows=40).parameters == 1000
    assert planned((900, 100), ratio=4, weight_hashes=0).parameters == 1000
    assert planned((900, 100), ratio=4.001).parameters == 995
    assert planned((900, 100), bytes=4003).bytes == 4000
    with pytest.raises(EmbeddingError, match=r"'c0': method mem_rec cannot do with 4 numbers: .* it needs 5 or more"):
        planned((900, 100), ratio=1000)
    with pytest.raises(EmbeddingError, match=r"'c1': method mem_rec shares .* need one embedding.token_rows or one e"):
        planned((900, 100), ratio=4, features={"c1": {"ratio": 5}})
    with pytest.raises(EmbeddingError, match=r"'c0': method mem_rec shares .* need one embedding.token_rows or one e"):
        planned((900, 100))


def test_the_dlrm_around_it_concatenates() -> None:
    config = ModelConfig(bottom=[512, 256], top=[1024, 1024, 512, 256])
    model = build_model(config, dense=13, features=26, dim=128, seed=0, per_sample=True)
    assert model.top[0].in_features == 256
    dense = sum(p.numel() for p in model.parameters())
    assert dense == 171_392 + 1_969_153
    plain = 171_392 + 2_197_505 + 128 * TERABYTE_ROWS
    assert round(plain / (dense + 9_675_000)) == 2034
    z = torch.randn(3, 128)
    torch.testing.assert_close(
        model(torch.zeros(3, 13), z), model.top(torch.cat([model.bottom(torch.zeros(3, 13)), z], 1))[:, 0]
    )


@pytest.mark.parametrize(("hashes", "weight_hashes"), list(itertools.product((1, 2, 4), (0, 1, 2))))
def test_a_sample_is_alpha_times_the_sum_of_its_tokens(hashes: int, weight_hashes: int) -> None:
    features = [feature(name, hashes=hashes, weight_hashes=weight_hashes) for name in ("a", "b")]
    # Sample 0 holds an id twice, sample 2 nothing of feature b.
    own = {"a": [[5, 5, 9], [2**40], [1]], "b": [[5], [7, -3], []]}
    ids = {
        name: (np.array([i for bag in bags for i in bag]), np.cumsum([0, *map(len, bags)]))
        for name, bags in own.items()
    }
    with Store.open(shards=2, blocks=20, seed=2) as store:
        embeddings = collection(store, *features)
        methods = list(embeddings.methods)
        token, weight = whole(store, TOKEN), whole(store, WEIGHT)[:, 0] if weight_hashes else None
        out = embeddings(ids).detach().numpy()
        assert out.shape == (3, D)
        for b in range(3):
            read = [[r for m, name in zip(methods, own, strict=True) for r in bins(m, t, own[name][b])] for t in (0, 1)]
            psi = None if weight is None else counts(7, read[1])
            np.testing.assert_allclose(out[b], vector(token, weight, counts(11, read[0]), psi), atol=1e-6)


def test_one_id_per_feature_equals_bags_of_one() -> None:
    ids = {"a": np.arange(6), "b": np.arange(6) * 3}
    with Store.open(blocks=20) as store:
        embeddings = collection(store, feature("a"), feature("b"))
        bags = {name: (values, np.arange(7)) for name, values in ids.items()}
        assert torch.equal(embeddings(ids), embeddings(bags))
        assert embeddings({"a": np.empty(0, np.int64), "b": np.empty(0, np.int64)}).shape == (0, D)


def test_gradients_equal_the_closed_form_with_collisions_inside_a_sample() -> None:
    """In float64: the sums and products that the collection runs, on bins that repeat."""
    rng = np.random.default_rng(3)
    method = MemRec(feature("a", hashes=2, weight_hashes=2), SGD)
    read = [rng.integers(0, rows, (6, 5)).astype(np.int32) for rows in (11, 7)]  # 6 lookups of 5 samples
    assert any(len(np.unique(read[0][:, b])) < 6 for b in range(5))
    flat, offsets = [own.reshape(-1) for own in read], np.arange(31)
    tables = [torch.tensor(rng.standard_normal((n, w)), requires_grad=True) for n, w in ((11, D), (7, 1))]
    grad = rng.standard_normal((5, D))
    z = method.compose_sample([sample_sums(t, own, offsets, 6) for t, own in zip(tables, flat, strict=True)])
    (z * torch.from_numpy(grad)).sum().backward()
    token, weight = (t.detach().numpy() for t in tables)
    expected = [
        gradients(token, weight[:, 0], counts(11, read[0][:, b]), counts(7, read[1][:, b]), grad[b]) for b in range(5)
    ]
    assert tables[0].grad is not None and tables[1].grad is not None
    np.testing.assert_allclose(tables[0].grad, sum(e[0] for e in expected), atol=1e-10)
    np.testing.assert_allclose(tables[1].grad[:, 0], sum(e[1] for e in expected), atol=1e-10)


def test_a_step_over_the_store_is_that_gradient() -> None:
    ids = {"a": np.array([5, 6]), "b": np.array([1, 1])}
    g = np.array([[1.0, -2.0, 0.5, 3.0], [0.25, 1.0, -1.0, 2.0]])
    with Store.open(shards=3, blocks=40) as store:
        embeddings = collection(store, feature("a"), feature("b"))
        token, weight = whole(store, TOKEN), whole(store, WEIGHT)[:, 0]
        (embeddings(ids) * torch.from_numpy(g.astype(np.float32))).sum().backward()
        embeddings.step()
        expected = [token.copy(), weight.copy()]
        for b in range(2):
            read = [
                [r for m, name in zip(embeddings.methods, ids, strict=True) for r in bins(m, t, [int(ids[name][b])])]
                for t in (0, 1)
            ]
            for own, change in zip(
                expected, gradients(token, weight, counts(11, read[0]), counts(7, read[1]), g[b]), strict=True
            ):
                own -= 0.5 * change
        np.testing.assert_allclose(whole(store, TOKEN), expected[0], atol=1e-6)
        np.testing.assert_allclose(whole(store, WEIGHT)[:, 0], expected[1], atol=1e-6)


def rows_read(method: MemRec, ids: np.ndarray) -> np.ndarray:
    """[lookups, N] by the kernel that training uses."""
    slab = SlabLookups(0, [method.feature], [(0, lookup.table, lookup) for lookup in method.lookups])
    return slab.map(Ids.from_dict({method.feature.name: ids}), np.zeros(1, np.int64))[1].reshape(-1, len(ids))


def test_bins_are_part_of_the_checkpoint_format() -> None:
    """The same on every machine, in every process: these numbers never change."""
    method = MemRec(feature("c1", token_rows=75_000, weight_rows=None), SGD)
    assert rows_read(method, np.array([0, 1, 2**40])).tolist() == [[66559, 33806, 52703], [62261, 12374, 13392]]


def test_keys_are_whole_ids_of_one_feature() -> None:
    a, b = (MemRec(feature(name, token_rows=10**9, weight_rows=10**9), SGD) for name in ("a", "b"))
    ids = np.arange(2000)
    read = rows_read(a, np.concatenate([ids, ids + 65_536, ids + 2**48]))
    assert all(len(np.unique(own)) == 6000 for own in read)
    assert not (rows_read(b, ids) == rows_read(a, ids)).any()  # nor is a feature an offset of another's ids
    assert not np.isin(rows_read(b, ids)[0], read[0]).any()


def test_bins_are_uniform_and_the_two_tables_unrelated() -> None:
    rows, n = 50, 20_000
    token, weight = rows_read(MemRec(feature("a", token_rows=rows, weight_rows=rows), SGD), np.arange(n))
    for own in (token, weight):
        chi2 = ((np.bincount(own, minlength=rows) - n / rows) ** 2 / (n / rows)).sum()
        assert 23 < chi2 < 86  # 49 degrees of freedom: 0.1 % on either side
    pairs = np.bincount(token * rows + weight, minlength=rows**2)
    chi2 = ((pairs - n / rows**2) ** 2 / (n / rows**2)).sum()
    assert abs(chi2 - (rows**2 - 1)) < 3.3 * (2 * (rows**2 - 1)) ** 0.5


def test_collisions_are_as_many_as_theory_says() -> None:
    ids = np.arange(30_000)
    large = rows_read(MemRec(feature("a", token_rows=20_000), SGD), ids)[0]
    assert len(np.unique(large)) == pytest.approx(20_000 * (1 - np.exp(-1.5)), rel=0.01)
    small = rows_read(MemRec(feature("a", token_rows=6, weight_rows=4, hashes=2), SGD), ids)
    left, right = small[:, :15_000], small[:, 15_000:]
    assert (left == right).all(0).mean() == pytest.approx(1 / (6 * 6 * 4), rel=0.2)


def test_the_order_of_features_does_not_matter_and_their_names_do() -> None:
    names, ids = ("a", "b", "c"), np.array([3, 1, 4, 1, 5])
    values = {name: ids * (i + 1) for i, name in enumerate(names)}
    with Store.open(blocks=20) as store:
        first = collection(store, *map(feature, names))(values)
        other = collection(store, *map(feature, names[::-1]))(values)
        torch.testing.assert_close(first, other, atol=1e-6, rtol=1e-5)
        renamed = collection(store, *map(feature, ("a", "b", "d")))(values | {"d": values["c"]})
        assert not torch.isclose(first, renamed).all(1).any()


@pytest.mark.parametrize("hashes", [1, 2])
def test_scope_field_gives_one_vector_per_feature_of_the_same_tables(hashes: int) -> None:
    options = {"scope": "field", "hashes": hashes, "weight_hashes": hashes}
    ids = {"a": (np.array([5, 5, 9, 1]), np.array([0, 3, 4])), "b": (np.array([5, 2]), np.array([0, 1, 2]))}
    with Store.open(shards=2, blocks=20, seed=4) as store:
        embeddings = collection(store, feature("a", **options), feature("b", **options))
        assert embeddings.output == "feature"
        assert (whole(store, WEIGHT) == 1 / hashes).all()  # alpha begins as 1
        embeddings(ids).square().sum().backward()
        embeddings.step()
        token, weight = whole(store, TOKEN), whole(store, WEIGHT)[:, 0]
        assert (weight != 1 / hashes).any()
        out = embeddings(ids).detach().numpy()
        assert out.shape == (2, 2, D)
        for f, (name, (values, offsets)) in enumerate(ids.items()):
            for b in range(2):
                expected = np.zeros(D)
                for i in values[offsets[b] : offsets[b + 1]].tolist():
                    phi, psi = (counts(n, bins(embeddings.methods[f], t, [i])) for t, n in ((0, 11), (1, 7)))
                    expected += vector(token, weight, phi, psi)
                np.testing.assert_allclose(out[b, f], expected, atol=1e-6, err_msg=name)


@pytest.mark.parametrize("scope", ["sample", "field"])
def test_trained_in_sync_is_the_same_for_any_number_of_shards(scope: str) -> None:
    results = []
    config = OptimizerConfig(sparse=SparseConfig(learning_rate=0.1), dense=DenseConfig(learning_rate=0.1))
    for shards in (1, 2, 3):
        with Store.open(shards=shards, blocks=40, seed=5) as store:
            net = network(store, method="mem_rec", token_rows=31, scope=scope)
            store.begin(1, 1, 0)
            learner = Learner(net, config, total_steps=6)
            before = whole(store, WEIGHT)
            for step, batch in enumerate(batches(6, 32), 1):
                clock = Clock(1, step, sync=True)
                learner.step(batch, net.embeddings.prefetch(batch.ids, clock), clock)
            net.embeddings.drain()
            assert (whole(store, WEIGHT) != before).any()
            results.append([whole(store, TOKEN), whole(store, WEIGHT), *(p.detach().numpy() for p in net.parameters())])
    for one, *others in zip(*results, strict=True):
        assert all(np.array_equal(one, other) for other in others)


@pytest.mark.parametrize(
    ("features", "message"),
    [
        ([feature("a", token_rows=None)], r"feature 'a': method mem_rec needs embedding.token_rows"),
        ([feature("a", ratio=2)], r"feature 'a': method mem_rec needs embedding.token_rows.* and no ratio beside it"),
        ([feature("a", pooling="mean")], r"feature 'a': .* scope=sample adds .* set embedding.pooling=sum"),
        (
            [feature("a"), feature("b", token_rows=12)],
            r"feature 'b': table mem_rec.token would be 12 x 4, .* share it as 11 x 4: give all .* the same dim and si",
        ),
        (
            [feature("a"), Feature(name="b", cardinality=9, dim=D)],
            r"feature 'b': method full has a vector of its own, while method mem_rec .* use it for every feature, or s",
        ),
        (
            [feature("a"), feature("b", hashes=3)],
            r"feature 'b': .* needs the same embedding.hashes and embedding.weight_hashes",
        ),
    ],
)
def test_what_cannot_be_says_what_can(features: list[Feature], message: str) -> None:
    with Store.open(blocks=20) as store, pytest.raises(EmbeddingError, match=message):
        collection(store, *features)
        assert not list(store.layout.tables)


def test_an_id_beyond_its_cardinality_is_an_error_or_wraps() -> None:
    with Store.open(blocks=20) as store:
        with pytest.raises(EmbeddingError, match=r"feature 'a': id 9 lies outside its cardinality \[0, 9\)"):
            collection(store, feature("a", cardinality=9))({"a": np.array([9])})
        wrapped = collection(store, feature("a", cardinality=9, out_of_range="modulo"))
        assert torch.equal(wrapped({"a": np.array([9])}), wrapped({"a": np.array([0])}))


def test_models_state_whether_they_take_one_vector_per_sample(monkeypatch: pytest.MonkeyPatch) -> None:
    config = EmbeddingConfig(dim=D, method="mem_rec", token_rows=11, scope="sample")
    batch = batches(1, 5)[0]
    for name in ("dlrm", "dcn_v2"):
        model = ModelConfig(name=name, bottom=[3], top=[3])
        spec = NetworkSpec.plan(schema(), config, model, SGD, 0)
        with Store.open(blocks=20) as store:
            net = Network(spec, store, torch.device("cpu"))
            assert net(torch.from_numpy(batch.dense), net.embeddings.prefetch(batch.ids)).shape == (5,)
            monkeypatch.setattr(type(net.model), "accepts", frozenset({"feature"}))
            message = rf"feature 'c0': method mem_rec gives one vector per sample, which model {name} cannot take"
            with pytest.raises(EmbeddingError, match=message):
                Network(spec, store, torch.device("cpu"))
