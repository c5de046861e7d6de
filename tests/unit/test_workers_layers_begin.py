"""Where QR and MEmCom begin, and what training can tell apart: what the papers say of them, on the layers alone."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from embershard.workers.embeddings import layers as nn

N, D = 60, 6


def test_memcom_begins_with_the_vectors_of_a_full_table_which_ids_of_a_row_share() -> None:
    n = 20_000
    made = nn.MEmCom(n, 16, hashed_rows=1000, bias=True, mode="sum")
    with torch.no_grad():
        vectors = made(torch.arange(n).unsqueeze(1))
    assert torch.equal(vectors, vectors[:1000].repeat(20, 1))
    assert vectors.var().item() == pytest.approx(1 / (3 * n), rel=0.05)
    assert made.hashed.abs().max().item() == pytest.approx(made.weight[0].item(), rel=0.01)


def test_memcom_with_weights_of_one_is_the_hashing_trick() -> None:
    made = nn.MEmCom(N, D, hashed_rows=9, bias=True, mode="sum")
    with torch.no_grad():
        made.weight.fill_(1)
    ids = torch.tensor([[4], [13], [4], [58]])
    plain = torch.nn.Embedding.from_pretrained(made.hashed.detach().clone(), freeze=False)
    expected = plain(ids[:, 0] % 9)
    out = made(ids)
    assert torch.equal(out, expected)
    weights = torch.randn(4, D, generator=torch.Generator().manual_seed(3))
    (out * weights).sum().backward()
    (expected * weights).sum().backward()
    assert torch.equal(made.hashed.grad, plain.weight.grad)


def test_memcom_in_float32_is_the_formula_bit_for_bit_in_any_order() -> None:
    made = nn.MEmCom(N, D, hashed_rows=9, bias=True, mode="sum")
    with torch.no_grad():
        for parameter in (made.weight, made.bias):
            parameter.normal_(generator=torch.Generator().manual_seed(3))
    u, v, b = (p.detach().numpy() for p in (made.hashed, made.weight, made.bias))
    ids = np.random.default_rng(0).permutation(N)
    out = made(torch.from_numpy(ids).unsqueeze(1)).detach().numpy()
    assert out.tobytes() == (v[ids] * u[ids % 9] + b[ids]).tobytes()


@pytest.mark.parametrize(("bias", "rank"), [(False, 1), (True, 2)])
def test_memcom_tells_ids_of_one_row_apart_once_trained(bias: bool, rank: int) -> None:
    made = nn.MEmCom(N, D, hashed_rows=9, bias=bias, mode="sum", dtype=torch.float64)
    target = torch.randn(N, D, generator=torch.Generator().manual_seed(3), dtype=torch.float64)
    ids = torch.arange(N).unsqueeze(1)
    sgd = torch.optim.SGD(made.parameters(), lr=0.05)
    for _ in range(20):
        sgd.zero_grad()
        (made(ids) - target).square().sum().backward()
        sgd.step()
    bucket = made(ids[4::9]).detach()
    assert len(torch.unique(made.weight.detach()[4::9])) == len(bucket) == len(torch.unique(bucket, dim=0))
    assert torch.linalg.matrix_rank(bucket, rtol=1e-9) == rank


@pytest.mark.parametrize("partitions", [2, 3])
@pytest.mark.parametrize("operation", ["mult", "add", "concat"])
def test_qr_begins_with_the_spread_of_a_full_table_and_tells_ids_apart(operation: str, partitions: int) -> None:
    n = 50_000
    made = nn.QR(n, 12, remainder_rows=36, partitions=partitions, operation=operation, mode="sum")
    with torch.no_grad():
        vectors = made(torch.arange(n).unsqueeze(1))
    # Few hundred distinct parts stand behind these moments, so they scatter by some percent.
    assert vectors.var().item() == pytest.approx(1 / (3 * n), rel=0.25)
    assert abs(vectors.mean().item()) < 0.2 * vectors.std().item()
    assert len(torch.unique(vectors, dim=0)) == n
