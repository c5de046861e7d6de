"""Layers with `store=`: the same bits as the layer alone, for any number of shards, in bags as torch gives them."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import embershard as es
import numpy as np
import pytest
import torch
from embershard.parameter_server.optimizers import apply
from embershard.parameter_server.store import Store
from embershard.parameter_server.tables import Optimizer
from embershard.workers.embeddings.base import EmbeddingError

N, D = 60, 6
CASES: dict[str, Callable[..., Any]] = {
    "full": lambda **k: es.nn.Full(N, D, **k),
    "hash": lambda **k: es.nn.Hash(N, D, hashed_rows=7, **k),
    "qr": lambda **k: es.nn.QR(N, D, remainder_rows=7, **k),
    "qr_path": lambda **k: es.nn.QRPath(N, D, moduli=(3, 4, 5), **k),
    "memcom": lambda **k: es.nn.MEmCom(N, D, hashed_rows=9, bias=True, **k),
    "double_hash": lambda **k: es.nn.DoubleHash(N, D, hashed_rows=8, **k),
    "mlet": lambda **k: es.nn.MLET(N, D, inner_dim=9, **k),
    "narrow": lambda **k: es.nn.Narrow(N, D, inner_dim=3, **k),
    "mem_rec": lambda **k: es.nn.MemRec(N, D, token_rows=11, weight_rows=5, **k),
}


def bags(rng: np.random.Generator) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """ids [N], offsets [8] and a target; some bags are empty, and id 5 is left out."""
    sizes = rng.integers(0, 5, 8)
    ids = rng.integers(0, N, sizes.sum())
    ids[::4] = 5
    offsets = np.cumsum(sizes) - sizes
    return torch.from_numpy(ids), torch.from_numpy(offsets), torch.randn(8, D, generator=torch.manual_seed(len(ids)))


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("mode", ["sum", "mean"])
def test_trained_alone_and_on_a_store_the_same_bits(case: str, mode: str) -> None:
    rng, optimizer = np.random.default_rng(2), Optimizer(kind="adagrad")
    steps = [bags(rng) for _ in range(4)]
    # Beside rows that bags leave out a matrix product may round otherwise.
    padding = None if case in ("mlet", "narrow") else 5
    alone = CASES[case](mode=mode, padding_idx=padding, seed=4, name="a")
    tables = [p for name, p in alone.named_parameters() if not name.startswith("method.")]
    states = [np.zeros((len(p), optimizer.state_width(p.shape[1])), np.float32) for p in tables]
    dense = [p for name, p in alone.named_parameters() if name.startswith("method.")]
    sgd = torch.optim.SGD(dense, 0.1) if dense else None
    expected = []
    for ids, offsets, target in steps:
        out = alone(ids, offsets)
        expected.append(out.detach().clone())
        (out - target).square().sum().backward()
        for parameter, state in zip(tables, states, strict=True):
            index = np.arange(len(parameter), dtype=np.uint32)
            apply(optimizer, parameter.detach().numpy(), state, index, parameter.grad.numpy(), 0.1)
            parameter.grad = None
        if sgd:
            sgd.step()
            sgd.zero_grad()
    everything = torch.arange(N).unsqueeze(1)
    assert not torch.equal(expected[0], expected[-1])
    for shards in (1, 3):
        with Store.open(shards=shards, blocks=40, seed=4) as store:
            made = CASES[case](mode=mode, padding_idx=padding, seed=4, name="a", store=store, optimizer=optimizer)
            assert len(list(made.parameters())) == len(dense)
            sgd = torch.optim.SGD(made.parameters(), 0.1) if dense else None
            for (ids, offsets, target), before in zip(steps, expected, strict=True):
                out = made(ids, offsets)
                assert torch.equal(out, before)
                (out - target).square().sum().backward()
                made.step(0.1)
                if sgd:
                    sgd.step()
                    sgd.zero_grad()
            with torch.no_grad():
                assert torch.equal(made(everything), alone(everything))


def test_bags_of_one_length_weights_and_ends_are_those_of_torch() -> None:
    ids = torch.tensor([[1, 2, 5], [5, 5, 7]])
    weights = torch.tensor([[0.5, 2.0, 9.0], [9.0, 9.0, -1.0]])
    with Store.open(blocks=40) as store:
        made = es.nn.Full(N, D, mode="sum", padding_idx=5, include_last_offset=True, store=store)
        alone = es.nn.Full(N, D, mode="sum", padding_idx=5, include_last_offset=True)
        with torch.no_grad():
            assert torch.equal(made(ids), alone(ids))
            torch.testing.assert_close(made(ids, None, weights), alone(ids, None, weights))
            flat, ends = ids.reshape(-1), torch.tensor([0, 1, 1, 6])
            assert torch.equal(made(flat, ends), alone(flat, ends))


@pytest.mark.parametrize(
    ("use", "message"),
    [
        (lambda store: es.nn.Full(N, D, store=store, mode="max"), "mode: a store pools by sum or mean"),
        (lambda store: es.nn.Full(N, D, store=store, seed=1), "seed: 1 beside the store's 0"),
        (lambda store: es.nn.Full(N, D, store=store, dtype=torch.float64), "leave device and dtype out"),
        (lambda store: es.nn.Full(N, D).step(), "step: this layer has no store"),
        (lambda store: es.nn.MLET(N, D, inner_dim=9, store=store).collapse(), "collapse: not of a layer on a store"),
        (
            lambda store: es.nn.Full(N, D, store=store, mode="sum")(
                torch.tensor([[1]]), None, torch.ones(1, 1, requires_grad=True)
            ),
            "per_sample_weights: have no gradient",
        ),
        (lambda store: es.nn.Full(N, D, store=store)(torch.tensor([1]), torch.tensor([1])), "offsets: must rise"),
        (lambda store: es.nn.Full(N, D, store=store)(torch.tensor([1])), "1 dimensions without offsets"),
        (lambda store: es.nn.Full(N, D, store=store)(torch.tensor([[N]])), f"id {N} lies outside"),
    ],
)
def test_what_cannot_be_is_said(use: Callable[[Any], object], message: str) -> None:
    with Store.open(blocks=40) as store, pytest.raises((EmbeddingError, ValueError), match=message):
        use(store)
