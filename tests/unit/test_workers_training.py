"""Steps on explicit batches against the plain torch reference, whatever the shards, the workers and the consistency."""

from __future__ import annotations

import sys
import threading
from concurrent.futures import Future
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from embershard.parameter_server.requests import Clock
from embershard.parameter_server.store import Store
from embershard.workers.embeddings.collapse import table_pieces
from embershard.workers.embeddings.gradients import GradientError
from embershard.workers.learner import Learner
from embershard.workers.network import Network, dense_tensors
from embershard.workers.optimizers import DenseConfig, OptimizerConfig, SparseConfig
from embershard.workers.pipeline import Pipeline

sys.path.insert(0, str(Path(__file__).parents[1] / "oracles"))
from workers_cases import CARDINALITIES, DENSE, DIM, HIDDEN, batches, network, share, tables
from workers_reference import ReferenceDLRM, ReferenceTrainer

STEPS, ROWS = 12, 32
DENSE_RATE, SPARSE_RATE = 0.2, 0.1


def optimizer(kind: str, dense: str = "sgd") -> OptimizerConfig:
    return OptimizerConfig(
        sparse=SparseConfig(kind=kind, learning_rate=SPARSE_RATE),
        dense=DenseConfig(kind=dense, learning_rate=DENSE_RATE),
    )


def run(net: Network, kind: str, *, lag: int = 0, sync: bool = False, rank: int = 0, workers: int = 1, **more) -> list:
    """Trains on the explicit batches; returns this worker's share of each step's loss."""
    learner = Learner(net, optimizer(kind, **more), total_steps=STEPS)
    own = [share(batch, rank, workers) for batch in batches(STEPS, ROWS)]
    pipeline = Pipeline(iter(own), net.embeddings, lambda s: Clock(1, s, rank, workers, lag, sync), depth=lag)
    losses = []
    for step in range(1, STEPS + 1):
        batch, ticket = pipeline.next(STEPS)
        clock = Clock(1, step, rank, workers, lag, sync)
        losses.append(learner.step(batch, ticket, clock, pipeline.settle).item())
    net.embeddings.drain()
    return losses


@pytest.mark.parametrize("shards", [1, 3])
@pytest.mark.parametrize("kind", ["sgd", "rowwise_adagrad"])
@pytest.mark.parametrize(("lag", "sync"), [(0, True), (1, False), (2, False)])
def test_equals_the_reference_step_by_step(kind: str, shards: int, lag: int, sync: bool) -> None:
    with Store.open(shards=shards, blocks=40, seed=5) as store:
        net = network(store, sparse=kind)
        store.begin(1, 1, 0)
        top = [DIM + len(CARDINALITIES) * (len(CARDINALITIES) + 1) // 2, HIDDEN, 1]
        state = {name.removeprefix("model."): p.detach().clone() for name, p in net.named_parameters()}
        model = ReferenceDLRM(tables(net.embeddings), [DENSE, HIDDEN, DIM], top, state)
        reference = ReferenceTrainer(model, kind, DENSE_RATE, SPARSE_RATE, lag)
        expected = [
            reference.step(
                torch.from_numpy(b.dense),
                torch.from_numpy(b.ids.values.reshape(len(CARDINALITIES), -1).T.copy()),
                torch.from_numpy(b.labels),
            )
            for b in batches(STEPS, ROWS)
        ]
        losses = run(net, kind, lag=lag, sync=sync)
        np.testing.assert_allclose(losses, expected, rtol=2e-5)
        for ours, theirs in zip(tables(net.embeddings), reference.current, strict=True):
            np.testing.assert_allclose(ours, theirs.numpy(), rtol=1e-4, atol=1e-6)
        for name, parameter in net.named_parameters():
            theirs = model.get_parameter(name.removeprefix("model."))
            np.testing.assert_allclose(parameter.detach().numpy(), theirs.detach().numpy(), rtol=1e-4, atol=1e-6)


def trained(shards: int, kind: str, lag: int, sync: bool) -> dict[str, np.ndarray]:
    with Store.open(shards=shards, blocks=80, seed=5) as store:
        net = network(store, sparse=kind)
        store.begin(1, 1, 0)
        run(net, kind, lag=lag, sync=sync, dense="adam")
        found = {f"table {i}": table for i, table in enumerate(tables(net.embeddings))}
        learner = torch.optim.SGD(net.parameters())
        return found | dense_tensors(net, learner)


@pytest.mark.parametrize(
    ("kind", "lag", "sync"), [("rowwise_adagrad", 0, True), ("adam", 0, True), ("adagrad", 1, False)]
)
def test_bit_identical_for_any_number_of_shards(kind: str, lag: int, sync: bool) -> None:
    one = trained(1, kind, lag, sync)
    for shards in (2, 3, 7):
        other = trained(shards, kind, lag, sync)
        assert one.keys() == other.keys()
        for name in one:
            assert one[name].tobytes() == other[name].tobytes(), f"{name} with {shards} shards"


def test_bounded_by_zero_steps_is_sync() -> None:
    bounded, sync = (trained(2, "adagrad", 0, sync) for sync in (False, True))
    assert bounded.keys() == sync.keys()
    assert all(bounded[name].tobytes() == sync[name].tobytes() for name in sync)


METHODS: dict[str, dict[str, Any]] = {
    "full": {},
    "qr": {"rows": 7, "threshold": 0},
    "memcom": {"rows": 7, "bias": True, "threshold": 0},
    "double_hash": {"rows": 7, "threshold": 0},
    "mlet": {"inner_dim": 8},
    "mem_rec": {"scope": "field", "token_rows": 13, "weight_rows": 11},
}


def vectors_trained(workers: int, rows: int, shards: int, method: str = "full") -> list[np.ndarray]:
    """Trains the tables alone, in `sync`: every worker pulls its rows and pushes them as their own gradient.

    Returns every row of every table, in row order.
    """
    with Store.open(shards=shards, blocks=40, seed=5) as first:
        stores = [first, *(first.attach() for _ in range(workers - 1))]
        nets = [network(store, sparse="rowwise_adagrad", method=method, **METHODS[method]) for store in stores]
        first.begin(1, workers, 0)
        problems: list[BaseException] = []

        def work(rank: int) -> None:
            try:
                embeddings = nets[rank].embeddings
                for step, batch in enumerate(batches(STEPS, rows), 1):
                    clock = Clock(1, step, rank, workers, 0, True)
                    out = embeddings(embeddings.prefetch(share(batch, rank, workers).ids, clock))
                    (out.square().sum() / batch.global_rows).backward()
                    embeddings.step(SPARSE_RATE, clock)
                embeddings.drain()
            except BaseException as error:
                problems.append(error)

        threads = [threading.Thread(target=work, args=(rank,)) for rank in range(workers)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert not problems
        return [np.concatenate(list(table_pieces(first, table.name))) for table in first.layout.tables]


@pytest.mark.parametrize("method", METHODS)
def test_sync_workers_equal_one_with_the_whole_batch(method: str) -> None:
    """Also where features share rows, as in MEM-REC, and where a method composes an id's vector of several."""
    one = vectors_trained(1, ROWS, 1, method)
    for workers, shards in ((2, 1), (2, 3), (3, 2)):
        for alone, together in zip(one, vectors_trained(workers, ROWS, shards, method), strict=True):
            np.testing.assert_allclose(together, alone, rtol=1e-5, atol=1e-7)


def test_more_workers_than_rows_take_part_with_empty_batches() -> None:
    for alone, together in zip(vectors_trained(1, 2, 1), vectors_trained(3, 2, 2), strict=True):
        np.testing.assert_allclose(together, alone, rtol=1e-5, atol=1e-7)


def test_nan_gradient_names_step_and_table_and_nothing_is_sent() -> None:
    with Store.open(shards=2, blocks=40) as store:
        net = network(store)
        store.begin(1, 1, 0)
        before = tables(net.embeddings)
        learner = Learner(net, optimizer("rowwise_adagrad"), total_steps=STEPS)
        batch = batches(1, ROWS)[0]
        batch.dense[3, 2] = np.nan
        pushes = store.counters.pushes
        with pytest.raises(GradientError, match=r"step 1: the gradient of table 'c\d\.full' is NaN"):
            learner.step(batch, net.embeddings.prefetch(batch.ids), Clock(1, 1))
        assert store.counters.pushes == pushes
        assert all((a == b).all() for a, b in zip(before, tables(net.embeddings), strict=True))


def test_nan_gradient_of_the_dense_part_names_the_parameter_and_nothing_is_sent() -> None:
    with Store.open(shards=2, blocks=40) as store:
        net = network(store)
        store.begin(1, 1, 0)
        before = [p.detach().clone() for p in net.parameters()]
        learner = Learner(net, optimizer("rowwise_adagrad"), total_steps=STEPS)
        name, parameter = list(net.named_parameters())[-1]
        parameter.register_hook(lambda grad: grad * torch.inf)
        batch, pushes = batches(1, ROWS)[0], store.counters.pushes
        with pytest.raises(GradientError, match=rf"step 1: the gradient of parameter '{name}' is NaN"):
            learner.step(batch, net.embeddings.prefetch(batch.ids), Clock(1, 1))
        assert store.counters.pushes == pushes
        assert all(torch.equal(a, b) for a, b in zip(before, net.parameters(), strict=True))


def test_pulls_never_run_beyond_a_boundary() -> None:
    with Store.open(shards=2, blocks=40) as store:
        net = network(store)
        store.begin(1, 1, 0)
        learner = Learner(net, optimizer("sgd"), total_steps=STEPS)
        pipeline = Pipeline(iter(batches(STEPS, ROWS)), net.embeddings, lambda s: Clock(1, s, staleness=3), depth=3)
        issued = []
        for step in range(1, 11):
            batch, ticket = pipeline.next(5 if step <= 5 else 10)
            learner.step(batch, ticket, Clock(1, step, staleness=3), pipeline.settle)
            issued.append(pipeline.issued)
        assert issued == [4, 5, 5, 5, 5, 9, 10, 10, 10, 10]


class Lazy(Future):
    """A pull that is answered when somebody waits for it, and not before."""

    def __init__(self, answer: Future) -> None:
        super().__init__()
        self._answer = answer

    def result(self, timeout: float | None = None) -> list[np.ndarray]:
        if not self.done():
            self.set_result(self._answer.result())
        return super().result(timeout)


def test_nothing_is_pushed_while_an_own_pull_is_open(monkeypatch: pytest.MonkeyPatch) -> None:
    """Otherwise what the pull sees would be a race, and one worker alone would not be reproducible."""
    with Store.open(shards=2, blocks=40) as store:
        net = network(store)
        store.begin(1, 1, 0)
        pulls: list[Lazy] = []
        open_at_push: list[int] = []
        pull, push = store.pull, store.push

        def lazy_pull(*arguments: Any) -> Lazy:
            pulls.append(Lazy(pull(*arguments)))
            return pulls[-1]

        def checked_push(*arguments: Any) -> Future:
            open_at_push.append(sum(not future.done() for future in pulls))
            return push(*arguments)

        monkeypatch.setattr(store, "pull", lazy_pull)
        monkeypatch.setattr(store, "push", checked_push)
        run(net, "rowwise_adagrad", lag=2)
        assert len(pulls) == STEPS and open_at_push == [0] * STEPS
