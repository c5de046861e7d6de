"""Rankers: losses against their formulas, other items by what is free, and training through the trainer itself."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from embershard.cluster.config import RunConfig
from embershard.datasets.files import load_schema
from embershard.datasets.histories import convert_histories
from embershard.datasets.schema import Batch, DataError, Ids
from embershard.datasets.stream import ParquetStream
from embershard.parameter_server.store import Store
from embershard.workers.embeddings.base import EmbeddingError
from embershard.workers.evaluate import answer, evaluate, open_network
from embershard.workers.export import export
from embershard.workers.export_lookup import compose, lookup, open_export, rows_of
from embershard.workers.metrics import RankingMetrics
from embershard.workers.models.build import ModelConfig
from embershard.workers.models.ranking import draw_others, pointwise_losses, ranknet_losses
from embershard.workers.network import Network
from embershard.workers.objectives import Ranking
from embershard.workers.trainer import train
from embershard.workers.trial import run_trial
from hypothesis import given, settings
from hypothesis import strategies as st

ROWS, ITEMS, OTHERS = torch.tensor([0, 0, 2]), torch.tensor([1, 3, 0]), torch.tensor([2, 2, 1])


def test_losses_are_their_formulas() -> None:
    scores = torch.randn(3, 4, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    triples = list(zip(ROWS.tolist(), ITEMS.tolist(), OTHERS.tolist(), strict=True))
    softmax = [math.log(sum(math.exp(s) for s in scores[r])) - scores[r, i].item() for r, i, _ in triples]
    assert pointwise_losses(scores, ROWS, ITEMS).tolist() == pytest.approx(softmax)
    pairs = [math.log(1 + math.exp(scores[r, j].item() - scores[r, i].item())) for r, i, j in triples]
    assert ranknet_losses(scores, ROWS, ITEMS, OTHERS).tolist() == pytest.approx(pairs)


def test_ranknet_pushes_the_pair_apart_by_equal_amounts() -> None:
    """d loss / d s_i = -1 / (1 + exp(s_i - s_j)) = -d loss / d s_j."""
    scores = torch.tensor([[0.3, -0.2, 0.9]], requires_grad=True)
    ranknet_losses(scores, torch.tensor([0]), torch.tensor([1]), torch.tensor([2])).sum().backward()
    slope = 1 / (1 + math.exp(-0.2 - 0.9))
    torch.testing.assert_close(scores.grad, torch.tensor([[0.0, -slope, slope]]))


@settings(max_examples=25, deadline=None)
@given(st.lists(st.sets(st.integers(0, 6)), min_size=1, max_size=4), st.integers(0, 100))
def test_other_items_are_those_nobody_told_of(known: list[set[int]], seed: int) -> None:
    """Of 7 items, drawn 60 times for each row: every free one, and no other."""
    keys = [row * 7 + item for row, items in enumerate(known) for item in items]
    rows = torch.arange(len(known)).repeat_interleave(60)
    torch.manual_seed(seed)
    drawn = draw_others(torch.tensor(keys * 2, dtype=torch.int64).flip(0), rows, len(known), 7).view(-1, 60)
    for items, own in zip(known, drawn.tolist(), strict=True):
        assert set(own) == (set(range(7)) - items or {-1})


def test_other_items_are_drawn_evenly() -> None:
    torch.manual_seed(0)
    drawn = draw_others(torch.tensor([1, 4]), torch.zeros(30_000, dtype=torch.int64), 1, 6)
    counts = np.bincount(drawn.numpy(), minlength=6)
    assert counts[[1, 4]].tolist() == [0, 0] and abs(counts[[0, 2, 3, 5]] - 7500).max() < 4 * math.sqrt(7500)


def batch(histories: list[list[int]], liked: list[list[int]]) -> Batch:
    bags = [*histories, *liked]
    offsets = np.concatenate([[0], np.cumsum([len(bag) for bag in bags])])
    ids = Ids(("history", "liked"), np.array([i for bag in bags for i in bag], np.int64), offsets)
    return Batch(np.ones(len(histories), np.float32), np.empty((len(histories), 0), np.float32), ids, len(histories))


def test_people_count_alike_however_much_they_like() -> None:
    rows = batch([[0], [1]], [[1, 2, 3], [0]])
    scores = torch.randn(2, 4, generator=torch.Generator().manual_seed(0))
    logs = scores.log_softmax(1)
    expected = -(logs[0, 1:].mean() + logs[1, 0])
    loss = Ranking(ModelConfig(name="pointwise", items=4)).loss(scores, torch.ones(2), rows)
    torch.testing.assert_close(loss, expected)


def test_ranknet_never_compares_with_what_is_liked() -> None:
    """One item is free; whoever likes all counts for nothing."""
    rows = batch([[0, 9], [0, 1], []], [[1, 2], [2, 3], []])  # 9: known, but beyond what is ranked
    scores = torch.tensor([[0.1, 0.2, 0.3, 0.4]] * 3)
    loss = Ranking(ModelConfig(name="ranknet", items=4)).loss(scores, torch.ones(3), rows)
    expected = (math.log(1 + math.exp(0.4 - 0.2)) + math.log(1 + math.exp(0.4 - 0.3))) / 2
    assert loss.item() == pytest.approx(expected)


def test_what_is_known_is_not_ranked_and_who_likes_nothing_is_left_out() -> None:
    objective = Ranking(ModelConfig(name="pointwise", items=3))
    scores = np.tile(np.array([3, 2, 1], np.float32), (300, 1))  # more rows than are ranked at once
    people = [([0], [1]), ([], [1]), ([2], [])] * 100
    found, wanted = objective.answers(scores, batch(*map(list, zip(*people, strict=True))))
    assert found[:3].tolist()[:2] == pytest.approx([1, 1 / math.log2(3)]) and wanted[:3].tolist() == [1, 1, 0]
    halves = [RankingMetrics(10), RankingMetrics(10)]
    for half, own in zip(halves, (slice(0, 100), slice(100, None)), strict=True):
        half.update(found[own], wanted[own])
    result = RankingMetrics(10).merge(halves).compute()
    assert result == {"ndcg_at_10": pytest.approx((1 + 1 / math.log2(3)) / 2), "samples": 200}
    assert RankingMetrics(10).compute() == {"ndcg_at_10": None, "samples": 0}


def test_an_item_beyond_the_ranked_ones_is_an_error() -> None:
    objective = Ranking(ModelConfig(name="pointwise", items=3))
    with pytest.raises(DataError, match=r"'liked': item 3 lies outside \[0, 3\)"):
        objective.loss(torch.zeros(1, 3), torch.ones(1), batch([[0]], [[3]]))


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Half of the people like items below 20 only, the others those above."""
    folder = tmp_path_factory.mktemp("histories")
    rng = np.random.default_rng(1)
    liked = rng.integers(0, 20, (500, 8)) + 20 * rng.integers(0, 2, (500, 1))
    text = "".join(f"{person},{item}\n" for person, items in enumerate(liked) for item in items)
    (folder / "log.csv").write_text("user,item\n" + text)
    convert_histories([str(folder / "log.csv")], str(folder / "out"))
    return folder / "out"


def job(data: Path, *more: str) -> Any:
    rates = ("optimizer.sparse.kind=adam", "optimizer.sparse.learning_rate=0.02", "optimizer.dense.kind=adam")
    paths = (f"data.path={data / 'train'}", f"data.eval_path={data / 'eval'}", "data.batch_size=32")
    small = ("model.top=[16]", "embedding.dim=8", "train.epochs=6", "optimizer.dense.learning_rate=0.02")
    return RunConfig.load(None, *paths, *rates, *small, *more).job()


@pytest.mark.parametrize("model", ["pointwise", "ranknet"])
@pytest.mark.parametrize(
    "options",
    [(), ("method=memcom", "rows=8", "threshold=1"), ("method=mem_rec", "token_rows=20", "scope=sample")],
    ids=["full", "memcom", "mem_rec-sample"],
)
def test_learns_what_people_like(data: Path, tmp_path: Path, model: str, options: tuple[str, ...]) -> None:
    asked = job(data, f"model.name={model}", *(f"embedding.{option}" for option in options))
    with Store.open(blocks=20) as store:
        summary = train(asked, store, directory=str(tmp_path))
    assert summary["eval"]["samples"] == load_schema(str(data / "eval")).rows
    # Four of at most 16 items on the right side; without learning sides about 0.14.
    assert summary["eval"]["ndcg_at_10"] > 0.24, summary["eval"]
    assert summary["train_loss"] < math.log(40 if model == "pointwise" else 2)
    again = evaluate(summary["checkpoint"], str(data / "eval"), batch_size=17)
    assert again["ndcg_at_10"] == pytest.approx(summary["eval"]["ndcg_at_10"], abs=1e-6)
    with pytest.raises(DataError, match="--predictions: model"):
        evaluate(summary["checkpoint"], str(data / "eval"), predictions=str(tmp_path / "p.parquet"))
    file = str(tmp_path / "model.safetensors")
    assert export(summary["checkpoint"], file, data=str(data / "eval"))["largest_difference"] < 1e-5
    with open_network(summary["checkpoint"]) as (network, _):
        stream = ParquetStream(str(data / "eval"), batch_size=32, schema=network.spec.data, shuffle=False)
        for trained, people in answer(network, stream.batches(0)):
            np.testing.assert_allclose(exported_scores(file, network, people), trained, rtol=1e-5, atol=1e-5)


def exported_scores(file: str, network: Network, people: Batch) -> np.ndarray:
    """Scores [B, items] by docs/export.md, of whole bags; only the model's layers are not the file's own."""
    described, tensors = open_export(file)
    values, offsets = people.ids["history"]
    rows = np.repeat(np.arange(people.rows), np.diff(offsets))

    def added(each: np.ndarray) -> np.ndarray:
        total = np.zeros((people.rows, *each.shape[1:]), np.float32)
        np.add.at(total, rows, each)
        return total

    if described["output"] == "feature":
        vectors = added(lookup(described, tensors, {"history": values}))
    else:
        read = described["features"][0]["lookups"]
        sums = [added(tensors[one["table"]][rows_of(values, one)]) for one in read]
        vectors = compose(described["compose"], {f"row{i}": one for i, one in enumerate(sums)}, tensors)
    weights = {
        name.removeprefix("dense/model."): torch.from_numpy(tensor)
        for name, tensor in tensors.items()
        if name.startswith("dense/model.")
    }
    inputs = (torch.from_numpy(people.dense), torch.from_numpy(vectors))
    scores: np.ndarray = torch.func.functional_call(network.model, weights, inputs).detach().numpy()
    return scores


def test_a_resumed_ranknet_run_draws_the_same_items(data: Path, tmp_path: Path) -> None:
    def run(folder: str, *more: str) -> Any:
        asked = job(data, "model.name=ranknet", "train.consistency=sync", "checkpoint.every=20", *more)
        with Store.open(blocks=20) as store:
            return train(asked, store, directory=str(tmp_path / folder))

    whole = run("whole", "train.max_steps=40")
    run("parts", "train.max_steps=20")
    assert run("parts", "train.max_steps=40")["eval"] == whole["eval"]


def test_a_comparison_weighs_the_input_embedding(data: Path) -> None:
    record = run_trial(job(data, "model.name=pointwise", "train.max_steps=3"), 20)
    assert record["embedding_bytes"] == 4 * 8 * 40
    assert record["validation"]["samples"] + record["test"]["samples"] == load_schema(str(data / "eval")).rows


@pytest.mark.parametrize(
    ("more", "says"),
    [
        (("model.target=bought",), "model.target: 'bought' is not a bag of the data; its bags are history, liked"),
        (("model.history=seen",), "model.history: 'seen' is not a bag"),
        (("embedding.features.liked.dim=4",), "embedding.features.liked: the dataset has no such categorical column"),
    ],
)
def test_wrong_columns(data: Path, tmp_path: Path, more: tuple[str, ...], says: str) -> None:
    with Store.open(blocks=20) as store, pytest.raises((DataError, EmbeddingError), match=says):
        train(job(data, "model.name=ranknet", *more), store, directory=str(tmp_path))


def test_own_parquet_says_how_many_items_there_are(tmp_path: Path) -> None:
    bags = pa.array([[0, 1], [2]], pa.list_(pa.int64()))
    pq.write_table(pa.table({"y": [1, 1], "seen": bags, "next": bags}), tmp_path / "own.parquet")
    columns = ("data.label=y", "data.dense=[]", "data.bags=[seen,next]", "model.history=seen", "model.target=next")
    asked = RunConfig.load(None, f"data.path={tmp_path}", *columns, "model.name=pointwise").job()
    with Store.open(blocks=20) as store, pytest.raises(DataError, match=r"model\.items: column .next. states no"):
        train(asked, store, directory=str(tmp_path / "run"))
    asked.model.items = 3
    with Store.open(blocks=20) as store:
        assert train(asked, store, directory=str(tmp_path / "run"))["steps"] == 1
