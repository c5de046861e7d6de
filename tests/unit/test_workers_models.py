"""DCN-v2: its formula, its published size, and a network that is built with it."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
import torch
from embershard.datasets.schema import Batch
from embershard.parameter_server.store import Store
from embershard.parameter_server.tables import Optimizer
from embershard.workers.embeddings.planning import EmbeddingConfig
from embershard.workers.models import dlrm
from embershard.workers.models.build import ModelConfig, build_model
from embershard.workers.models.dcn_v2 import CrossLayer, DCNv2
from embershard.workers.network import Network, NetworkSpec

sys.path.insert(0, str(Path(__file__).parents[1] / "oracles"))
from workers_cases import CARDINALITIES, DENSE, batches, schema


@pytest.mark.parametrize("rank", [None, 2])
def test_cross_layer_is_the_published_formula(rank: int | None) -> None:
    layer = CrossLayer(5, rank, torch.Generator().manual_seed(0)).double()
    torch.nn.init.normal_(layer.bias)
    x0, x = torch.randn(3, 5, dtype=torch.float64), torch.randn(3, 5, dtype=torch.float64)
    w = layer.factors[0] if rank is None else layer.factors[1] @ layer.factors[0]
    for b in range(3):
        expected = x0[b] * (w @ x[b] + layer.bias) + x[b]
        torch.testing.assert_close(layer(x0, x)[b], expected)


def test_mlperf_size() -> None:
    """DLRM-DCNv2 of MLPerf: 171,392 + 10,627,200 + 5,245,953 dense parameters."""
    model = DCNv2(13, 26 * 128, 128, bottom=[512, 256], top=[1024, 1024, 512, 256], layers=3, rank=512)
    parts = [model.bottom, model.cross, model.top]
    assert [sum(p.numel() for p in part.parameters()) for part in parts] == [171_392, 10_627_200, 5_245_953]


def test_the_first_cross_layer_reads_its_input_twice() -> None:
    """Without the top, two layers written out by hand."""
    model = DCNv2(0, 6, 3, bottom=[], top=[], layers=2, rank=None, seed=1)
    vectors = torch.randn(4, 2, 3)
    x0 = vectors.reshape(4, 6)
    x1 = x0 * (x0 @ model.cross[0].factors[0].t()) + x0
    x2 = x0 * (x1 @ model.cross[1].factors[0].t()) + x1
    expected = x2 @ model.top[0].weight.t() + model.top[0].bias
    torch.testing.assert_close(model(torch.empty(4, 0), vectors), expected.squeeze(1))
    torch.testing.assert_close(model(torch.empty(4, 0), x0), expected.squeeze(1))  # one vector per sample


def test_a_dlrm_that_was_traced_before_it_was_called_still_calculates() -> None:
    """As `embershard export` does, in a process that has not trained."""
    dlrm._pairs.cache_clear()
    model = build_model(ModelConfig(bottom=[8], top=[8]), dense=2, features=3, dim=4, seed=0)
    arguments = (torch.ones(2, 2), torch.ones(2, 3, 4))
    torch.export.export(model, arguments)
    with torch.no_grad():
        assert type(model(*arguments)) is torch.Tensor


def test_a_dlrm_with_one_vector_alone_reads_it() -> None:
    model = build_model(ModelConfig(top=[8]), dense=0, features=1, dim=4, seed=0)
    vectors = torch.randn(3, 1, 4, generator=torch.Generator().manual_seed(0), requires_grad=True)
    logits = model(torch.empty(3, 0), vectors)
    assert logits.shape == (3,) and len(set(logits.tolist())) == 3
    logits.sum().backward()
    assert vectors.grad is not None and bool((vectors.grad != 0).any())


def test_seed_decides_the_weights() -> None:
    config = ModelConfig(name="dcn_v2", bottom=[4], top=[4], cross_rank=2)
    a, b, c = (build_model(config, dense=2, features=3, dim=4, seed=seed).state_dict() for seed in (1, 1, 2))
    assert all(torch.equal(a[name], b[name]) for name in a)
    assert not torch.equal(a["cross.0.factors.0"], c["cross.0.factors.0"])


def test_a_network_with_dcn_v2() -> None:
    model = ModelConfig(name="dcn_v2", bottom=[8], top=[8])
    spec = NetworkSpec.plan(schema(), EmbeddingConfig(dim=4), model, Optimizer(), 0)
    batch: Batch = batches(1, 16)[0]
    with Store.open(blocks=20) as store:
        network = Network(spec, store, torch.device("cpu"))
        assert isinstance(network.model, DCNv2)
        assert network.model.cross[0].bias.shape == (4 * (1 + len(CARDINALITIES)),)
        logits = network(torch.from_numpy(batch.dense), network.embeddings.prefetch(batch.ids))
        assert logits.shape == (16,) and batch.dense.shape[1] == DENSE
        logits.sum().backward()
