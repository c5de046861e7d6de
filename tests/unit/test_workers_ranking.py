"""Rankers over bags: losses against their formulas, bags against plain lists, and learning what was planted."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from embershard.parameter_server.store import Store
from embershard.workers.embeddings.base import EmbeddingError, Feature
from embershard.workers.models.ranking import pointwise_loss, ranknet_loss
from embershard.workers.ranking import Bags, HistoryRanker, RankingConfig, halves, ranking_ndcg, train_ranker
from hypothesis import given, settings
from hypothesis import strategies as st

ROWS, ITEMS, OTHERS = torch.tensor([0, 0, 2]), torch.tensor([1, 3, 0]), torch.tensor([2, 2, 1])


def test_losses_are_their_formulas() -> None:
    scores = torch.randn(3, 4, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    triples = list(zip(ROWS.tolist(), ITEMS.tolist(), OTHERS.tolist(), strict=True))
    softmax = [math.log(sum(math.exp(s) for s in scores[r])) - scores[r, i].item() for r, i, _ in triples]
    assert pointwise_loss(scores, ROWS, ITEMS).item() == pytest.approx(sum(softmax) / 3)
    pairs = [math.log(1 + math.exp(scores[r, j].item() - scores[r, i].item())) for r, i, j in triples]
    assert ranknet_loss(scores, ROWS, ITEMS, OTHERS).item() == pytest.approx(sum(pairs) / 3)


def test_ranknet_pushes_the_pair_apart_by_equal_amounts() -> None:
    """d loss / d s_i = -1 / (1 + exp(s_i - s_j)) = -d loss / d s_j."""
    scores = torch.tensor([[0.3, -0.2, 0.9]], requires_grad=True)
    ranknet_loss(scores, torch.tensor([0]), torch.tensor([1]), torch.tensor([2])).backward()
    slope = 1 / (1 + math.exp(-0.2 - 0.9))
    torch.testing.assert_close(scores.grad, torch.tensor([[0.0, -slope, slope]]))


PAIRS = st.lists(st.tuples(st.integers(0, 5), st.integers(0, 8)), max_size=40)


@settings(max_examples=25, deadline=None)
@given(PAIRS, st.lists(st.integers(0, 5), max_size=6), st.integers(0, 100))
def test_bags_equal_plain_sets(pairs: list[tuple[int, int]], people: list[int], seed: int) -> None:
    sets = [sorted({item for person, item in pairs if person == p}) for p in range(6)]
    columns = np.array(pairs, np.int64).reshape(-1, 2)
    bags = Bags.of_pairs(columns[:, 0], columns[:, 1], 6)
    assert [bag.tolist() for bag in np.split(bags.values, bags.offsets[1:-1])] == sets
    some = bags.of(np.array(people, np.int64))
    assert some.values.tolist() == [item for p in people for item in sets[p]] and len(some) == len(people)
    seen, hidden = ([bag.tolist() for bag in np.split(half.values, half.offsets[1:-1])] for half in halves(bags, seed))
    for whole, a, b in zip(sets, seen, hidden, strict=True):
        assert sorted(a + b) == whole and len(a) - len(b) in (0, 1)


def planted(people: int, seed: int) -> Bags:
    """Half of the people like items below 20 only, the others those above."""
    rng = np.random.default_rng(seed)
    side = rng.integers(0, 2, people)
    liked = rng.integers(0, 20, (people, 8)) + 20 * side[:, None]
    return Bags.of_pairs(np.repeat(np.arange(people), 8), liked.ravel(), people)


@pytest.mark.parametrize("loss", ["pointwise", "ranknet"])
@pytest.mark.parametrize(
    "options",
    [{}, {"method": "memcom", "rows": 8, "threshold": 1}, {"method": "mem_rec", "token_rows": 20, "scope": "sample"}],
    ids=["full", "memcom", "mem_rec-sample"],
)
def test_learns_what_people_like(loss: str, options: dict) -> None:
    config = RankingConfig(loss=loss, hidden=[16], epochs=6, batch_size=32)
    config.optimizer.sparse = config.optimizer.sparse.model_copy(update={"learning_rate": 0.02})
    config.optimizer.dense = config.optimizer.dense.model_copy(update={"learning_rate": 0.02})
    feature = Feature(name="history", cardinality=40, dim=8, **options)
    train, test = halves(planted(400, 1), 0), halves(planted(100, 2), 0)
    with Store.open(blocks=20, seed=3) as store:
        model = HistoryRanker(feature, 40, config, store, seed=0)
        before = ranking_ndcg(model, *test)
        last = train_ranker(model, *train, config, seed=0)
        after = ranking_ndcg(model, *test)
    assert after > before + 0.08, (before, after)
    assert last < (math.log(40) if loss == "pointwise" else math.log(2)) - 0.2


def test_what_was_seen_is_never_ranked() -> None:
    config = RankingConfig(hidden=[])
    with Store.open(blocks=20) as store:
        model = HistoryRanker(Feature(name="history", cardinality=3, dim=2), 3, config, store, seed=0)
        with torch.no_grad():
            for layer in model.ranker.layers:
                layer.weight.zero_()
                layer.bias.copy_(torch.tensor([3.0, 2.0, 1.0]))
        one = np.array([0, 1])
        assert ranking_ndcg(model, Bags(np.array([0]), one), Bags(np.array([1]), one), k=1) == 1
        nobody = Bags(np.array([0, 0]), np.array([0, 1, 2])), Bags(np.array([2]), np.array([0, 1, 1]))
        assert ranking_ndcg(model, *nobody, k=2) == pytest.approx(1 / math.log2(3))  # the second has nothing to find


def test_an_item_outside_is_an_error() -> None:
    with Store.open(blocks=20) as store:
        model = HistoryRanker(Feature(name="history", cardinality=3, dim=2), 3, RankingConfig(), store, seed=0)
        with pytest.raises(EmbeddingError, match="'history': id 3 lies outside"):
            model(Bags(np.array([3]), np.array([0, 1])))
