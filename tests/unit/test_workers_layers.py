"""The methods alone: torch.nn.EmbeddingBag's contract, readable oracles, and the same numbers as on a store."""

from __future__ import annotations

import copy
import io
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import embershard as es
import numpy as np
import pytest
import torch
from embershard.parameter_server.optimizers import apply
from embershard.parameter_server.store import Store
from embershard.parameter_server.tables import Optimizer
from embershard.workers.embeddings import layers as nn
from embershard.workers.embeddings.base import EmbeddingError, Feature, Lookup, RowMap
from embershard.workers.embeddings.collection import EmbeddingBagCollection
from embershard.workers.embeddings.lookups import SlabLookups
from embershard.workers.embeddings.torch_rows import map_rows
from hypothesis import given, settings
from hypothesis import strategies as st

sys.path.insert(0, str(Path(__file__).parents[1] / "oracles"))
from compressed_reference import composed, digits, memcom, path, pooled_then_combined, seeded_row

N, D = 60, 6

# Every layer with the options of the same feature on a store.
CASES: dict[str, tuple[Callable[..., nn.Layer], dict[str, Any]]] = {
    "full": (nn.Full, {}),
    "hash": (lambda n, d, **k: nn.Hash(n, d, hashed_rows=7, **k), {"rows": 7}),
    "qr": (lambda n, d, **k: nn.QR(n, d, remainder_rows=7, **k), {"rows": 7}),
    "qr add": (lambda n, d, **k: nn.QR(n, d, ratio=3, operation="add", **k), {"ratio": 3, "operation": "add"}),
    "qr concat": (
        lambda n, d, **k: nn.QR(n, d, moduli=(4, 5, 3), operation="concat", **k),
        {"moduli": (4, 5, 3), "operation": "concat"},
    ),
    "qr chinese": (
        lambda n, d, **k: nn.QR(n, d, remainder_rows=3, partitions=3, scheme="chinese_remainder", **k),
        {"rows": 3, "partitions": 3, "scheme": "chinese_remainder"},
    ),
    "qr_path": (lambda n, d, **k: nn.QRPath(n, d, moduli=(3, 4, 5), **k), {"moduli": (3, 4, 5)}),
    "qr_path hidden": (
        lambda n, d, **k: nn.QRPath(n, d, remainder_rows=4, inner_dim=3, **k),
        {"rows": 4, "inner_dim": 3},
    ),
    "memcom": (lambda n, d, **k: nn.MEmCom(n, d, hashed_rows=9, **k), {"rows": 9}),
    "memcom bias": (
        lambda n, d, **k: nn.MEmCom(n, d, hashed_rows=9, bias=True, hashing="seeded", **k),
        {"rows": 9, "bias": True, "hashing": "seeded"},
    ),
    "double_hash": (lambda n, d, **k: nn.DoubleHash(n, d, hashed_rows=8, **k), {"rows": 8}),
    "double_hash two": (
        lambda n, d, **k: nn.DoubleHash(n, d, hashed_rows=8, operation="concat", tables=2, **k),
        {"rows": 8, "operation": "concat", "partitions": 2},
    ),
}
every_case = pytest.mark.parametrize("case", CASES)


def layer(case: str, **more: Any) -> nn.Layer:
    return CASES[case][0](N, D, **more)


def reads_of(case: str, made: nn.Layer, ids: list[int]) -> list[tuple[str, list[int]]]:
    """(table, rows) of every lookup, worked out from the definitions alone."""
    key = Feature(name="embedding", seed=made.method.feature.seed).key
    if case == "full":
        return [("full", ids)]
    if case == "hash":
        return [("hashed", [seeded_row(i, key("hash"), 7) for i in ids])]
    if case.startswith("double_hash"):
        tables = ["hashed0", "hashed1" if case == "double_hash two" else "hashed0"]
        return [(t, [seeded_row(i, key(f"double_hash/{j}"), 8) for i in ids]) for j, t in enumerate(tables)]
    moduli = {"qr": (7, 9), "qr add": (4, 15), "qr concat": (4, 5, 3), "qr chinese": (3, 4, 5)}[case]
    rows = [digits(i, moduli, case == "qr chinese") for i in ids]
    return [(f"partition{j}", [row[j] for row in rows]) for j in range(len(moduli))]


@pytest.mark.parametrize("case", [case for case in CASES if not case.startswith("qr_path")])
def test_vectors_and_gradients_equal_the_oracle(case: str) -> None:
    made = layer(case, dtype=torch.float64, mode="sum")
    rng = np.random.default_rng(1)
    with torch.no_grad():  # away from V = 1 and B = 0
        for parameter in made.parameters():
            parameter.copy_(torch.from_numpy(rng.standard_normal(parameter.shape)))
    ids = [3, 3, 59, 12, 3 + 9, 0, 59, 41]  # repeated, and colliding within a batch
    grads = rng.standard_normal((len(ids), D))
    tables = {name: p.detach().numpy().copy() for name, p in made.named_parameters()}
    if case.startswith("memcom"):
        key = Feature(name="embedding").key("memcom")
        shared = [seeded_row(i, key, 9) if case == "memcom bias" else i % 9 for i in ids]
        expected, back = memcom(tables, ids, shared, grads)
    else:
        operation = {"qr": "mult", "qr chinese": "mult"}.get(case, "concat" if case[-3:] in ("cat", "two") else "add")
        expected, back = composed(tables, reads_of(case, made, ids), operation, grads)
    out = made(torch.tensor(ids).unsqueeze(1))
    np.testing.assert_allclose(out.detach().numpy(), expected, rtol=0, atol=1e-12)
    (out * torch.from_numpy(grads)).sum().backward()
    for name, parameter in made.named_parameters():
        np.testing.assert_allclose(parameter.grad.numpy(), back[name], rtol=0, atol=1e-10)


@pytest.mark.parametrize(("case", "moduli"), [("qr_path", (3, 4, 5)), ("qr_path hidden", (4, 15))])
def test_paths_equal_the_oracle(case: str, moduli: tuple[int, ...]) -> None:
    made = layer(case, dtype=torch.float64, mode="sum")
    generator = torch.Generator().manual_seed(5)
    with torch.no_grad():  # away from shifts of 0
        for parameter in made.parameters():
            parameter.normal_(generator=generator)
    ids = [3, 3, 59, 12, 0, 59, 41]
    grads = torch.randn(len(ids), D, generator=generator, dtype=torch.float64)
    tables = {name: p.detach().clone().requires_grad_() for name, p in made.named_parameters()}
    expected = torch.stack([path(tables, i, moduli) for i in ids])
    out = made(torch.tensor(ids).unsqueeze(1))
    torch.testing.assert_close(out, expected, rtol=1e-12, atol=1e-12)
    (out * grads).sum().backward()
    (expected * grads).sum().backward()
    for name, parameter in made.named_parameters():
        torch.testing.assert_close(parameter.grad, tables[name].grad, rtol=0, atol=1e-10)


@pytest.mark.parametrize("mode", ["sum", "mean", "max"])
@pytest.mark.parametrize("padding_idx", [None, 5, -2])
@pytest.mark.parametrize("last", [False, True])
def test_full_is_torchs_embedding_bag(mode: str, padding_idx: int | None, last: bool) -> None:
    ours = nn.Full(N, D, mode=mode, padding_idx=padding_idx, include_last_offset=last)
    theirs = torch.nn.EmbeddingBag(N, D, mode=mode, padding_idx=padding_idx, include_last_offset=last)
    with torch.no_grad():
        theirs.weight.copy_(ours.full)
    generator = torch.Generator().manual_seed(0)
    flat = torch.randint(0, N, (30,), generator=generator)
    flat[[2, 3, 11]] = 5 if padding_idx == 5 else N - 2
    offsets = torch.tensor([0, 0, 2, 4, 4, 17, 30] if last else [0, 0, 2, 4, 4, 17])
    for arguments in ((flat, offsets), (flat.view(5, 6),), (flat.int(), offsets.int())):
        expected, found = theirs(*arguments), ours(*arguments)
        torch.testing.assert_close(found, expected)
        weights = torch.randn(expected.shape, generator=generator)
        ours.zero_grad()
        theirs.zero_grad()
        (found * weights).sum().backward()
        (expected * weights).sum().backward()
        torch.testing.assert_close(ours.full.grad, theirs.weight.grad)
    assert (ours.num_embeddings, ours.embedding_dim, ours.mode) == (
        N,
        D,
        mode,
    ) and ours.padding_idx == theirs.padding_idx


def test_the_default_mode_is_torchs() -> None:
    assert layer("memcom").mode == torch.nn.EmbeddingBag(2, 2).mode == "mean"


@every_case
def test_bags_pool_what_was_composed(case: str) -> None:
    made = layer(case, mode="sum")
    flat, offsets = torch.tensor([1, 2, 2, 50, 9, 33, 1]), torch.tensor([0, 3, 3])
    vectors = made(flat.unsqueeze(1))
    bags = torch.stack([vectors[:3].sum(0), torch.zeros(D), vectors[3:].sum(0)])
    torch.testing.assert_close(made(flat, offsets), bags)
    weights = torch.linspace(-1, 2, 7)
    scaled = vectors * weights.unsqueeze(1)
    torch.testing.assert_close(
        made(flat, offsets, per_sample_weights=weights), torch.stack([scaled[:3].sum(0), bags[1], scaled[3:].sum(0)])
    )
    padded = CASES[case][0](N, D, mode="mean", padding_idx=2)
    torch.testing.assert_close(padded(flat, offsets)[0], vectors[0])


@pytest.mark.parametrize("operation", ["mult", "add", "concat"])
def test_qr_one_hot_equals_pooling_first_and_bags_do_not_for_mult(operation: str) -> None:
    made = nn.QR(N, D, remainder_rows=7, operation=operation, mode="sum", dtype=torch.float64)
    tables = [p.detach().numpy() for p in made.parameters()]
    for i in (0, 8, 59):
        np.testing.assert_array_equal(
            made(torch.tensor([[i]])).detach().numpy()[0], pooled_then_combined(tables, [[i % 7], [i // 7]], operation)
        )
    bag = [3, 17, 44]
    theirs = pooled_then_combined(tables, [[i % 7 for i in bag], [i // 7 for i in bag]], operation)
    same = np.allclose(made(torch.tensor([bag])).detach().numpy()[0], theirs, rtol=1e-12)
    assert same == (operation != "mult")


@every_case
def test_compiled_whole(case: str) -> None:
    made = layer(case, padding_idx=3)
    flat, offsets = torch.tensor([1, 2, 3, 50, 9]), torch.tensor([0, 2])
    torch._dynamo.reset()
    compiled = torch.compile(made, backend="aot_eager", fullgraph=True)
    expected = made(flat, offsets)
    expected.square().sum().backward()
    grads = {name: p.grad.clone() for name, p in made.named_parameters()}
    made.zero_grad()
    out = compiled(flat, offsets)
    out.square().sum().backward()
    assert torch.equal(out, expected)
    assert all(torch.equal(p.grad, grads[name]) for name, p in made.named_parameters())
    if case == "memcom":
        with pytest.raises(RuntimeError, match=r"an id lies outside \[0, num_embeddings\)"):
            compiled(torch.tensor([1, 2, N, 50, 9]), offsets)


@every_case
def test_state_copies_and_moves(case: str) -> None:
    first, second = layer(case), layer(case, seed=8)
    ids = torch.arange(N).view(10, 6)
    assert not torch.equal(first(ids), second(ids))
    buffer = io.BytesIO()
    torch.save(first.state_dict(), buffer)
    buffer.seek(0)
    third = layer(case)
    with torch.no_grad():
        for parameter in third.parameters():
            parameter.zero_()
    third.load_state_dict(torch.load(buffer, weights_only=True))
    assert torch.equal(first(ids), third(ids)) and torch.equal(first(ids), copy.deepcopy(first)(ids))
    if any(own.map.kind == "hash" for own in first.method.lookups):
        with pytest.raises(RuntimeError, match=r"hash_seeds: saved by a layer of another seed or name"):
            second.load_state_dict(first.state_dict())
    double = copy.deepcopy(first).to(torch.float64)
    assert double(ids).dtype == torch.float64
    torch.testing.assert_close(double(ids).float(), first(ids))
    born = layer(case, dtype=torch.bfloat16)(ids)
    assert born.dtype == torch.bfloat16
    meta = layer(case, device="meta")
    assert all(p.device.type == "meta" for p in meta.parameters())
    empty = meta.to_empty(device="cpu")
    empty.reset_parameters()
    assert torch.equal(empty(ids), first(ids))
    second.load_state_dict(layer(case, seed=8).state_dict())
    first.load_state_dict(empty.state_dict())


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@every_case
def test_on_a_gpu_the_same_vectors(case: str) -> None:
    made = layer(case, padding_idx=3)
    moved, born = copy.deepcopy(made).to("cuda"), layer(case, padding_idx=3, device="cuda")
    flat, offsets = torch.tensor([1, 2, 3, 50, 9]), torch.tensor([0, 2])
    for other in (moved, born):
        torch.testing.assert_close(other(flat.cuda(), offsets.cuda()).cpu(), made(flat, offsets))


@settings(max_examples=25, deadline=None)
@given(
    st.lists(st.integers(-(2**63), 2**63 - 1), min_size=1, max_size=20),
    st.one_of(
        st.builds(lambda m, s: RowMap("hash", m, seed=s), st.integers(1, 2**48), st.integers(0, 2**64 - 1)),
        st.builds(
            lambda m, s, n: RowMap("hash", m, limit=n, seed=s, wrap=True),
            st.integers(1, 2**48),
            st.integers(0, 2**64 - 1),
            st.integers(1, 2**48),
        ),
        st.builds(lambda m, d: RowMap("index", m, d), st.integers(1, 2**48), st.integers(1, 2**40)),
        st.builds(
            lambda m, d, n: RowMap("index", m, d, n, wrap=True),
            st.integers(1, 2**48),
            st.integers(1, 2**40),
            st.integers(1, 2**48),
        ),
    ),
)
def test_rows_in_torch_are_the_kernels_bit_for_bit(ids: list[int], row_map: RowMap) -> None:
    slab = SlabLookups(0, [Feature(name="a")], [(0, 0, Lookup(0, row_map))])
    _, expected = slab.map(es.Ids.from_dict({"a": np.array(ids, np.int64)}), np.array([0]))
    assert map_rows(row_map, torch.tensor(ids)).tolist() == expected.tolist()


def store_features(case: str, names: tuple[str, ...], **more: Any) -> list[Feature]:
    options = {"cardinality": N, "dim": D, "method": case.split()[0], **CASES[case][1], **more}
    # Tables as small as these would stay full.
    small = {} if case == "full" else {"threshold": 0}
    return [Feature(name=name, seed=4, **options, **small) for name in names]


@every_case
@pytest.mark.parametrize("kind", ["sgd", "rowwise_adagrad"])
def test_trained_alone_and_on_any_number_of_shards_the_same_bits(case: str, kind: str) -> None:
    """Two features of one method, in bags: vectors after every step and all tables at the end."""
    rng = np.random.default_rng(2)
    optimizer, steps = Optimizer(kind=kind), []
    for _ in range(4):
        sizes = rng.integers(0, 4, (2, 8))
        bags = {
            name: (rng.integers(0, N, own.sum()), np.concatenate([[0], np.cumsum(own)]))
            for name, own in zip("ab", sizes, strict=True)
        }
        steps.append((bags, torch.from_numpy(rng.standard_normal((8, 2, D), dtype=np.float32))))
    alone = [layer(case, mode="mean", include_last_offset=True, seed=4, name=name) for name in "ab"]
    state = {
        id(p): np.zeros((len(p), optimizer.state_width(p.shape[1])), np.float32)
        for own in alone
        for p in own.parameters()
    }
    expected = []
    for bags, target in steps:
        out = torch.stack([own(*map(torch.from_numpy, bags[name])) for name, own in zip("ab", alone, strict=True)], 1)
        expected.append(out.detach().clone())
        (out - target).square().sum().backward()
        for parameter in (p for own in alone for p in own.parameters()):
            rows, index = parameter.detach().numpy(), np.arange(len(parameter), dtype=np.uint32)
            apply(optimizer, rows, state[id(parameter)], index, parameter.grad.numpy(), 0.1)
            parameter.grad = None
    everything = {name: np.arange(N) for name in "ab"}
    with torch.no_grad():
        final = torch.stack([own(torch.arange(N).unsqueeze(1)) for own in alone], 1)
    for shards in (1, 2, 3):
        with Store.open(shards=shards, blocks=40, seed=4) as store:
            features = store_features(case, ("a", "b"), pooling="mean")
            embeddings = EmbeddingBagCollection(features, store=store, optimizer=optimizer, learning_rate=0.1)
            for (bags, target), before in zip(steps, expected, strict=True):
                out = embeddings(bags)
                assert torch.equal(out, before)
                (out - target).square().sum().backward()
                embeddings.step()
            with torch.no_grad():
                assert torch.equal(embeddings(everything), final)


@every_case
def test_ids_beyond_are_an_error_or_taken_modulo(case: str) -> None:
    for wrong in (N, -1, 2**40):
        with pytest.raises(EmbeddingError, match=rf"id {wrong} lies outside \[0, {N}\): .* out_of_range='modulo'"):
            layer(case)(torch.tensor([[3, wrong]]))
        with Store.open(blocks=40) as store, pytest.raises(EmbeddingError, match=r"out_of_range=modulo|missing id"):
            EmbeddingBagCollection(store_features(case, ("a",)), store=store)({"a": np.array([3, wrong])})
    wrapping = layer(case, out_of_range="modulo")
    ids = torch.tensor([[3 + 7 * N], [3 - N], [3]])
    assert torch.equal(wrapping(ids), wrapping(ids[2:]).expand(3, -1))
    with Store.open(blocks=40) as store:
        embeddings = EmbeddingBagCollection(store_features(case, ("a",), out_of_range="modulo"), store=store)
        out = embeddings({"a": ids[:, 0].numpy()})[:, 0]
        assert torch.equal(out, out[2:].expand(3, -1))


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: nn.MEmCom(N, D), "method memcom needs either"),
        (lambda: nn.MEmCom(N, D, ratio=7), "^method memcom cannot be 7 times smaller"),
        (lambda: nn.QR(N, D, moduli=(7, 8)), "tell only 56 ids apart"),
        (lambda: nn.Full(N, D, mode="median"), "mode: 'median' is none of sum, mean and max"),
        (lambda: nn.Full(0, D), "^num_embeddings: Input should be greater than 0, found 0$"),
        (lambda: nn.Hash(N, 5000, hashed_rows=4), "^embedding_dim: Input should be less than or equal to 4096, found"),
        (
            lambda: nn.QR(N, D, remainder_rows=4, operation="minus"),
            "^operation: 'minus' is none of mult, add and concat$",
        ),
        (lambda: nn.Full(N, D, padding_idx=N), "padding_idx: 60 lies outside the 60 ids"),
    ],
)
def test_layers_that_cannot_be(make: Callable[[], Any], message: str) -> None:
    with pytest.raises(EmbeddingError, match=message):
        make()


def test_shapes_that_do_not_go_together_are_torchs_errors() -> None:
    with pytest.raises(ValueError, match="offsets"):
        layer("qr")(torch.tensor([1, 2]))
    with pytest.raises(NotImplementedError, match="per_sample_weights"):
        layer("qr")(torch.tensor([[1, 2]]), per_sample_weights=torch.ones(1, 2))


def test_the_module_is_public() -> None:
    assert es.nn.MEmCom is nn.MEmCom and set(es.nn.__all__) >= {"Full", "Hash", "QR", "MEmCom", "DoubleHash"}
