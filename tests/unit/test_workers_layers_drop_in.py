"""Every layer with torch.nn.EmbeddingBag's arguments: torch's answers over its vectors, or a line that says why not."""

from __future__ import annotations

import inspect
import itertools
import pickle
from typing import Any

import embershard as es
import pytest
import torch
from embershard.workers.embeddings.base import EmbeddingError
from embershard.workers.embeddings.layers_arguments import Common
from embershard.workers.embeddings.planning import METHODS

N, D = 60, 6
LAYERS: dict[str, dict[str, Any]] = {
    "Full": {},
    "Hash": {"hashed_rows": 7},
    "QR": {"remainder_rows": 7},
    "QRPath": {"remainder_rows": 7},
    "MEmCom": {"hashed_rows": 9},
    "DoubleHash": {"hashed_rows": 8},
    "MLET": {"inner_dim": 9},
    "Narrow": {"inner_dim": 2},
    "MemRec": {"token_rows": 13},
}
every_layer = pytest.mark.parametrize("name", LAYERS)


def layer(name: str, *arguments: Any, **more: Any) -> Any:
    return getattr(es.nn, name)(N, D, *arguments, **LAYERS[name], **more)


def inputs(last: bool) -> list[tuple[torch.Tensor, ...]]:
    """1-D and 2-D, of both integer types, with empty bags first, between and last, and without anything."""
    flat = torch.tensor([5, 1, 5, 5, 58, 0, 59, 3, 5, 17])
    begins = torch.tensor([0, 0, 2, 2, 4, 9, 10][: None if last else -1])
    nothing = torch.empty(0, dtype=torch.int64)
    found = [(flat, begins), (flat.view(2, 5),), (nothing.view(0, 3),), (nothing, torch.zeros(3, dtype=torch.int64))]
    return found + [tuple(one.int() for one in arguments) for arguments in found]


def test_every_method_is_here() -> None:
    assert {layer(name).method.feature.method for name in LAYERS} == set(METHODS)


@every_layer
def test_torchs_arguments_in_torchs_order(name: str) -> None:
    """Answers are those of torch's module over the layer's vectors, of every combination."""
    assert set(list(inspect.signature(torch.nn.EmbeddingBag).parameters)[2:]) <= set(Common.__annotations__)
    vectors = layer(name, mode="sum")(torch.arange(N).unsqueeze(1)).detach()
    by_name = layer(
        name, mode="max", include_last_offset=True, padding_idx=-2, max_norm=None, sparse=False, norm_type=1.0
    )
    assert (by_name.mode, by_name.include_last_offset, by_name.padding_idx) == ("max", True, N - 2)
    for mode, padding, last in itertools.product(("sum", "mean", "max"), (None, -2), (False, True)):
        arguments = (None, 2.0, False, mode, False, None, last, padding, "cpu", torch.float32)
        ours, theirs = layer(name, *arguments), torch.nn.EmbeddingBag(N, D, *arguments)
        with torch.no_grad():
            theirs.weight.copy_(vectors)
        for given in inputs(last):
            torch.testing.assert_close(ours(*given), theirs(*given), atol=1e-6, rtol=1e-6)


@every_layer
def test_weights_per_sample_and_their_gradient(name: str) -> None:
    ours, theirs = layer(name, mode="sum", padding_idx=5), torch.nn.EmbeddingBag(N, D, mode="sum", padding_idx=5)
    with torch.no_grad():
        theirs.weight.copy_(layer(name, mode="sum")(torch.arange(N).unsqueeze(1)))
    for input, *offsets in inputs(False)[:2]:
        weights = torch.linspace(-1, 2, input.numel()).view(input.shape)
        given = [weights.clone().requires_grad_() for _ in range(2)]
        found, expected = (
            module(input, *offsets, per_sample_weights=own) for module, own in zip((ours, theirs), given, strict=True)
        )
        torch.testing.assert_close(found, expected, atol=1e-6, rtol=1e-6)
        found.square().sum().backward()
        expected.square().sum().backward()
        torch.testing.assert_close(given[0].grad, given[1].grad, atol=1e-6, rtol=1e-5)


@every_layer
def test_pickled_and_without_precision(name: str) -> None:
    made = layer(name)
    ids = torch.arange(N).view(10, 6)
    assert torch.equal(pickle.loads(pickle.dumps(made))(ids), made(ids))
    for dtype in (torch.float16, torch.bfloat16):
        moved = pickle.loads(pickle.dumps(made)).to(dtype)(ids)
        assert moved.dtype == dtype
        torch.testing.assert_close(moved.float(), made(ids), atol=0.02, rtol=0.05)


REFUSED = {"max_norm": 1.0, "scale_grad_by_freq": True, "sparse": True, "_weight": torch.zeros(N, D)}


@every_layer
@pytest.mark.parametrize("argument", REFUSED)
def test_what_cannot_be_honoured_is_one_line(name: str, argument: str) -> None:
    if (name, argument) == ("Full", "_weight"):
        return
    with pytest.raises(EmbeddingError, match=rf"^{argument}: .*leave it out") as found:
        layer(name, **{argument: REFUSED[argument]})
    assert "\n" not in str(found.value)


@every_layer
def test_ids_that_are_no_whole_numbers(name: str) -> None:
    for given in (torch.tensor([[1.5, 2.0]]), torch.tensor([[True]])):
        with pytest.raises(EmbeddingError, match=r"^input and offsets: int64 or int32, not torch\."):
            layer(name)(given)
    with pytest.raises(EmbeddingError, match=r"not torch\.float32"):
        layer(name)(torch.tensor([1, 2]), torch.tensor([0.0, 1.5]))


def test_one_vector_per_sample_takes_one_id_per_feature() -> None:
    made = es.nn.MemRecSample(["a", "b"], D, token_rows=13)
    ids = torch.tensor([[1, 2**20], [3, 4]])
    for gradients in (True, False):
        with torch.set_grad_enabled(gradients):
            assert torch.equal(made(ids.int()), made(ids))
            for wrong in (ids.new_ones(2, 3), ids.new_ones(2, 1), ids.new_ones(2)):
                with pytest.raises(EmbeddingError, match=r"^input: one id per feature, \[B, 2\], not \[2"):
                    made(wrong)
            with pytest.raises(EmbeddingError, match=r"int64 or int32, not torch\.float32"):
                made(ids.float())
            for dtype, near in ((torch.float64, 1e-6), (torch.float16, 2e-3)):
                other = pickle.loads(pickle.dumps(made)).to(dtype)(ids)
                assert other.dtype == dtype
                torch.testing.assert_close(other.float(), made(ids), atol=near, rtol=0)


def test_full_takes_a_table_and_the_state_of_torchs_module() -> None:
    theirs = torch.nn.EmbeddingBag(N, D, mode="sum")
    ids = torch.arange(N).view(10, 6)
    assert torch.equal(es.nn.Full(N, D, mode="sum", _weight=theirs.weight.detach())(ids), theirs(ids))
    with pytest.raises(EmbeddingError, match=r"^_weight: has \[6, 60\], not \[60, 6\]$"):
        es.nn.Full(N, D, _weight=torch.zeros(D, N))
    ours = torch.nn.Sequential(es.nn.Full(N, D, mode="sum"))
    saved = torch.nn.Sequential(theirs).state_dict()
    ours.load_state_dict(saved)
    assert torch.equal(ours(ids), theirs(ids)) and list(saved) == ["0.weight"]
    ours.load_state_dict(ours.state_dict())


@pytest.mark.parametrize(
    ("name", "sizes", "message"),
    [
        ("QR", {}, "method qr needs one of remainder_rows, moduli, ratio, found none"),
        ("MEmCom", {}, "method memcom needs either hashed_rows or ratio"),
        ("Hash", {"hashed_rows": 0}, "hashed_rows: Input should be greater than 0, found 0"),
        ("DoubleHash", {"hashed_rows": 3, "tables": 3}, "method double_hash has one or two tables, not tables=3"),
        (
            "MEmCom",
            {"ratio": 7},
            "method memcom cannot be 7 times smaller than 60 rows of dim 6: set ratio to 5.454 or less, raise "
            "embedding_dim, or take Full",
        ),
    ],
)
def test_errors_speak_of_the_layers_own_arguments(name: str, sizes: dict[str, Any], message: str) -> None:
    with pytest.raises(EmbeddingError) as found:
        getattr(es.nn, name)(N, D, **sizes)
    assert str(found.value) == message
