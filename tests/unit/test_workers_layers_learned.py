"""MLET, narrow and MEM-REC alone: EmbeddingBag's contract, and the same bits as on a store."""

from __future__ import annotations

import copy
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import embershard as es
import numpy as np
import pytest
import torch
from embershard.parameter_server.optimizers import apply
from embershard.parameter_server.row_kernels import LINE
from embershard.parameter_server.store import Store
from embershard.parameter_server.tables import Optimizer
from embershard.workers.embeddings.base import EmbeddingError, Feature
from embershard.workers.embeddings.collection import EmbeddingBagCollection
from torch.nn import functional as F

sys.path.insert(0, str(Path(__file__).parents[1] / "oracles"))
from mem_rec_reference import bins, counts, vector

N, D = 60, 6
CASES: dict[str, tuple[Callable[..., Any], dict[str, Any]]] = {
    "mlet": (lambda n, d, **k: es.nn.MLET(n, d, inner_dim=9, **k), {"inner_dim": 9}),
    "narrow": (lambda n, d, **k: es.nn.Narrow(n, d, ratio=2, **k), {"ratio": 2}),
    "mem_rec": (
        lambda n, d, **k: es.nn.MemRec(n, d, token_rows=13, weight_rows=7, hashes=2, **k),
        {"token_rows": 13, "weight_rows": 7, "hashes": 2},
    ),
}
every_case = pytest.mark.parametrize("case", CASES)


def layer(case: str, **more: Any) -> Any:
    return CASES[case][0](N, D, **more)


def table_of(made: Any) -> torch.Tensor:
    """All N vectors, from the parameters by the book."""
    named = dict(made.named_parameters())
    if "method.projection" in named:
        return next(p for name, p in named.items() if name != "method.projection") @ named["method.projection"]
    phi, psi = (
        torch.tensor(
            np.array([counts(len(named[t]), bins(made.method, k, [i])) for i in range(N)]), dtype=torch.float32
        )
        for k, t in enumerate(("token", "weight"))
    )
    return (psi @ named["weight"]) * (phi @ named["token"])


@every_case
@pytest.mark.parametrize("mode", ["sum", "mean", "max"])
@pytest.mark.parametrize("padding_idx", [None, 3])
def test_bags_and_gradients_are_torchs_over_the_composed_vectors(case: str, mode: str, padding_idx: int | None) -> None:
    made = layer(case, mode=mode, padding_idx=padding_idx)
    ids, offsets = torch.tensor([1, 2, 3, 59, 9, 1, 3]), torch.tensor([0, 2, 2, 6])
    weights = torch.linspace(-1, 1, 7) if mode == "sum" else None
    out = made(ids, offsets, weights)
    target = torch.linspace(-2, 3, 4 * D).view(4, D)
    (out * target).sum().backward()
    found = {name: p.grad.clone() for name, p in made.named_parameters()}
    made.zero_grad()
    expected = F.embedding_bag(
        ids, table_of(made), offsets, mode=mode, per_sample_weights=weights, padding_idx=padding_idx
    )
    torch.testing.assert_close(out, expected)
    (expected * target).sum().backward()
    for name, p in made.named_parameters():
        torch.testing.assert_close(found[name], p.grad, atol=1e-6, rtol=1e-5)


@every_case
def test_compiled_copied_and_moved(case: str) -> None:
    made = layer(case, padding_idx=3)
    flat, offsets = torch.tensor([1, 2, 3, 50, 9]), torch.tensor([0, 2])
    torch._dynamo.reset()
    assert torch.equal(torch.compile(made, backend="aot_eager", fullgraph=True)(flat, offsets), made(flat, offsets))
    third = layer(case, padding_idx=3)
    with torch.no_grad():
        for parameter in third.parameters():
            parameter.zero_()
    third.load_state_dict(made.state_dict())
    assert torch.equal(third(flat, offsets), made(flat, offsets))
    double = copy.deepcopy(made).to(torch.float64)
    torch.testing.assert_close(double(flat, offsets).float(), made(flat, offsets))
    meta = layer(case, padding_idx=3, device="meta")
    assert all(p.device.type == "meta" for p in meta.parameters())
    born = meta.to_empty(device="cpu")
    with torch.no_grad():
        for parameter in born.parameters():
            parameter.fill_(7)
    born.reset_parameters()
    assert torch.equal(born(flat, offsets), made(flat, offsets))


def train_alone(
    made: torch.nn.Module, steps: list[Any], optimizer: Optimizer, rows: list[torch.Tensor]
) -> list[torch.Tensor]:
    """Vectors of every step; tables by the shards' own update, the projection by torch's SGD."""
    state = [np.zeros((len(p), optimizer.state_width(p.shape[1])), np.float32) for p in rows]
    others = [p for p in made.parameters() if not any(p is own for own in rows)]
    seen = []
    for inputs, target in steps:
        out = made(*inputs)
        seen.append(out.detach().clone())
        (out - target).square().sum().backward()
        for parameter, own in zip(rows, state, strict=True):
            index = np.arange(len(parameter), dtype=np.uint32)
            apply(optimizer, parameter.detach().numpy(), own, index, parameter.grad.numpy(), 0.1)
        with torch.no_grad():
            for parameter in others:
                parameter -= 0.05 * parameter.grad
        made.zero_grad()
    return seen


def train_on_store(
    features: list[Feature], steps: list[Any], optimizer: Optimizer, shards: int, squeeze: bool
) -> list[torch.Tensor]:
    seen = []
    with Store.open(shards=shards, blocks=40, seed=4) as store:
        embeddings = EmbeddingBagCollection(features, store=store, optimizer=optimizer, learning_rate=0.1)
        for ids, target in steps:
            out = embeddings(ids)
            out = out[:, 0] if squeeze else out
            seen.append(out.detach().clone())
            (out - target).square().sum().backward()
            embeddings.step()
            with torch.no_grad():
                for parameter in embeddings.parameters():
                    parameter -= 0.05 * parameter.grad
            embeddings.zero_grad()
    return seen


@every_case
@pytest.mark.parametrize("kind", ["sgd", "rowwise_adagrad"])
def test_trained_alone_and_on_any_number_of_shards_the_same_bits(case: str, kind: str) -> None:
    rng, optimizer = np.random.default_rng(2), Optimizer(kind=kind)
    alone, stored = [], []
    for _ in range(5):
        sizes = rng.integers(0, 4, 8)
        values, offsets = rng.integers(0, N, sizes.sum()), np.concatenate([[0], np.cumsum(sizes)])
        target = torch.from_numpy(rng.standard_normal((8, D), dtype=np.float32))
        alone.append(((torch.from_numpy(values), torch.from_numpy(offsets)), target))
        stored.append(({"a": (values, offsets)}, target))
    made = layer(case, mode="mean", include_last_offset=True, seed=4, name="a")
    rows = [p for name, p in made.named_parameters() if name != "method.projection"]
    expected = train_alone(made, alone, optimizer, rows)
    feature = Feature(name="a", method=case, cardinality=N, dim=D, seed=4, pooling="mean", **CASES[case][1])
    for shards in (1, 2, 3):
        found = train_on_store([feature], stored, optimizer, shards, squeeze=True)
        assert all(torch.equal(a, b) for a, b in zip(found, expected, strict=True))
    assert not torch.equal(expected[0], expected[-1])


def sample_layer(**more: Any) -> Any:
    options = {"token_rows": 13, "weight_rows": 7, "hashes": 2, "weight_hashes": 1, "seed": 4} | more
    return es.nn.MemRecSample(["a", "b", "c"], D, **options)


@pytest.mark.parametrize("weight_hashes", [0, 1, 2])
def test_one_vector_per_sample_equals_the_oracle_with_and_without_gradients(weight_hashes: int) -> None:
    made = sample_layer(weight_hashes=weight_hashes)
    ids = torch.from_numpy(np.random.default_rng(1).integers(-(2**62), 2**62, (9, 3)))
    ids[4] = ids[4, 0]
    trained = made(ids)
    with torch.no_grad():
        assert torch.equal(made(ids), trained)
    token = made.token.detach().numpy().astype(np.float64)
    weight = made.weight.detach().numpy()[:, 0].astype(np.float64) if weight_hashes else None
    for b in range(9):
        read = [
            [r for m, i in zip(made.methods, ids[b].tolist(), strict=True) for r in bins(m, t, [i])] for t in (0, 1)
        ]
        psi = counts(7, read[1]) if weight_hashes else None
        np.testing.assert_allclose(trained[b].detach(), vector(token, weight, counts(13, read[0]), psi), atol=1e-6)
    torch._dynamo.reset()
    torch.testing.assert_close(torch.compile(made, backend="aot_eager", fullgraph=True)(ids), trained)
    assert made(ids[:0]).shape == (0, D)


@pytest.mark.parametrize("dim", [64, 150])
def test_wide_vectors_per_sample_are_the_same_bits_without_gradients(dim: int) -> None:
    """Widths at which rows are added in blocks of columns, with and without a rest."""
    made = es.nn.MemRecSample([f"c{f}" for f in range(5)], dim, token_rows=300, hashes=2)
    ids = torch.from_numpy(np.random.default_rng(1).integers(0, 10**6, (33, 5)))
    trained = made(ids).detach()
    with torch.no_grad():
        assert torch.equal(made(ids), trained)
    assert trained.count_nonzero() == trained.numel()
    assert made.token.data_ptr() % LINE == 0  # a row of 64 numbers lies in four cache lines, not across five


@pytest.mark.parametrize("kind", ["sgd", "rowwise_adagrad"])
def test_one_vector_per_sample_trained_alone_and_on_shards_the_same_bits(kind: str) -> None:
    rng, optimizer = np.random.default_rng(3), Optimizer(kind=kind)
    alone, stored = [], []
    for _ in range(5):
        ids = rng.integers(0, 20, (8, 3))
        target = torch.from_numpy(rng.standard_normal((8, D), dtype=np.float32))
        alone.append(((torch.from_numpy(ids),), target))
        stored.append(({name: ids[:, f].copy() for f, name in enumerate("abc")}, target))
    made = sample_layer()
    expected = train_alone(made, alone, optimizer, [made.token, made.weight])
    options = {"token_rows": 13, "weight_rows": 7, "hashes": 2, "scope": "sample"}
    features = [Feature(name=name, method="mem_rec", dim=D, seed=4, **options) for name in "abc"]
    for shards in (1, 2, 3):
        found = train_on_store(features, stored, optimizer, shards, squeeze=False)
        assert all(torch.equal(a, b) for a, b in zip(found, expected, strict=True))


def test_mlet_collapses_to_torchs_embedding_bag() -> None:
    made = layer("mlet", mode="sum", padding_idx=3)
    served = made.collapse()
    assert isinstance(served, torch.nn.EmbeddingBag) and list(served.state_dict()) == ["weight"]
    assert served.weight.shape == (N, D)
    flat, offsets = torch.tensor([1, 2, 3, 50, 9]), torch.tensor([0, 2])
    torch.testing.assert_close(served(flat, offsets), made(flat, offsets), atol=1e-6, rtol=0)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: es.nn.MLET(9, 4, inner_dim=3), r"mlet .* is 3"),
        (lambda: es.nn.Narrow(9, 4), r"narrow needs either"),
        (
            lambda: es.nn.MemRecSample(["a", "a"], 4, token_rows=3),
            r"features: at least one, each name once; found a, a",
        ),
    ],
)
def test_layers_that_cannot_be(make: Callable[[], Any], message: str) -> None:
    with pytest.raises(EmbeddingError, match=message):
        make()
