"""Shards against dense tables: exactly once under lost, repeated and reordered pushes; `sync`; cuts under fire."""

import sys
import threading
from pathlib import Path

import numpy as np
import pytest
from embershard.parameter_server import kernels
from embershard.parameter_server.blocks import BlockMap
from embershard.parameter_server.requests import Clock, PullRequest, PushReply, PushRequest
from embershard.parameter_server.shard import Shard
from embershard.parameter_server.tables import Layout, Optimizer, TableSpec
from hypothesis import given, settings
from hypothesis import strategies as st

sys.path.insert(0, str(Path(__file__).parents[1] / "oracles"))
import parameter_server_reference as reference

BLOCKS = 40
SEED = 9
KINDS = ["sgd", "adagrad", "rowwise_adagrad", "adam"]


def specs(kind: str) -> list[TableSpec]:
    optimizer = Optimizer(kind=kind)
    sizes = {"a": (23, 3), "b": (5, 3), "c": (11, 2)}
    return [TableSpec(name=n, rows=rows, width=width, optimizer=optimizer) for n, (rows, width) in sizes.items()]


class Cluster:
    """Several shards, and pushes cut up between them; what `StoreClient` does, without a network."""

    def __init__(self, shards: int, tables: list[TableSpec]) -> None:
        self.block_map = BlockMap.initial(BLOCKS, ("",) * shards)
        self.shards = [Shard(i, Layout(BLOCKS, SEED)) for i in range(shards)]
        self.layout = self.shards[0].layout
        for shard in self.shards:
            shard.set_block_map(self.block_map)
            shard.create_tables(tables)
        self.layout = self.shards[0].layout

    def locate(self, name: str, rows):
        ref = self.layout.ref(name)
        slab = self.layout.slabs[ref.slab]
        segments = np.array([0, len(rows)])
        return kernels.locate(slab, np.array([ref.table], np.int32), segments, np.array(rows), self.block_map.rank())

    def requests(
        self, client: int, sequence: int, update: dict, rate: float, clock: Clock | None = None
    ) -> list[PushRequest]:
        """One request per shard for the rows and gradients of an update {table: (rows, grads)}."""
        requests = []
        for shard in self.shards:
            parts, grads = [], []
            for name, (rows, values) in update.items():
                found, inverse = self.locate(name, rows)
                ordered = np.empty_like(values)
                ordered[inverse] = values
                part, where = found.select(self.block_map.owned_by(shard.number)[found.blocks])
                parts.append(part)
                grads.append(ordered[where])
            requests.append(PushRequest(client, sequence, parts, grads, [rate] * len(parts), clock))
        return requests

    def read(self, name: str) -> np.ndarray:
        ref = self.layout.ref(name)
        slab = self.layout.slabs[ref.slab]
        found, inverse = self.locate(name, range(slab.tables[ref.table].rows))
        values = np.full((len(inverse), slab.width), np.nan, np.float32)
        for shard in self.shards:
            part, where = found.select(self.block_map.owned_by(shard.number)[found.blocks])
            values[where] = shard.pull(PullRequest([part]), None, 0.0)[0].reply.rows[0]
        return values[inverse]


def make_update(generator: np.random.Generator, tables: list[TableSpec]) -> dict:
    chosen = generator.permutation(len(tables))[: generator.integers(1, len(tables) + 1)]
    update = {}
    for spec in (tables[i] for i in chosen):
        rows = generator.permutation(spec.rows)[: generator.integers(1, spec.rows + 1)]
        update[spec.name] = (rows, generator.normal(size=(len(rows), spec.width)).astype(np.float32))
    return update


@settings(max_examples=25, deadline=None)
@given(st.integers(0, 10**6), st.sampled_from([1, 2, 3]), st.data())
def test_every_push_counts_once_whatever_the_network_does(seed: int, shards: int, data: st.DataObject) -> None:
    """Integer gradients and SGD with rate 1: sums are exact in any order, so a lost or doubled part shows."""
    generator = np.random.default_rng(seed)
    tables = specs("sgd")
    cluster, model = Cluster(shards, tables), reference.DenseTables(tables, SEED)
    deliveries = []
    for sequence in range(1, 9):
        update = {n: (r, np.rint(g * 4).astype(np.float32)) for n, (r, g) in make_update(generator, tables).items()}
        for name, (rows, grads) in update.items():
            model.push(name, rows, grads, 1.0)
        for shard, request in enumerate(cluster.requests(1, sequence, update, 1.0)):
            deliveries += [(shard, request)] * data.draw(st.integers(1, 3), label="times delivered")
    for shard, request in data.draw(st.permutations(deliveries), label="order of arrival"):
        (done,) = cluster.shards[shard].push(request, None, 0.0)
        assert isinstance(done.reply, PushReply)
    for spec in tables:
        start = reference.DenseTables([spec], SEED).weight[spec.name]
        np.testing.assert_allclose(cluster.read(spec.name) - start, model.weight[spec.name] - start, atol=1e-4)


@settings(max_examples=20, deadline=None)
@given(st.integers(0, 10**6), st.sampled_from(KINDS), st.sampled_from([1, 2, 4]), st.integers(1, 3), st.data())
def test_sync_is_the_dense_model_bit_for_bit(
    seed: int, kind: str, shards: int, workers: int, data: st.DataObject
) -> None:
    """Whatever the shards and the order of arrival: gradients are added in rank order, then applied once."""
    generator = np.random.default_rng(seed)
    tables = specs(kind)
    cluster, model = Cluster(shards, tables), reference.DenseTables(tables, SEED)
    for shard in cluster.shards:
        shard.begin(1, workers, 0)
    for step in range(1, 5):
        updates = [make_update(generator, tables) for _ in range(workers)]
        for spec in tables:
            total: dict[int, np.ndarray] = {}
            for update in updates:
                rows, grads = update.get(spec.name, ((), ()))
                for row, grad in zip(rows, grads, strict=True):
                    total[row] = total[row] + grad if row in total else grad
            model.push(spec.name, list(total), list(total.values()), 0.1)
        calls = []
        for rank, update in enumerate(updates):
            clock = Clock(1, step, rank, workers, sync=True)
            calls += list(enumerate(cluster.requests(rank, step, update, 0.1, clock)))
        answered = 0
        repeated = data.draw(st.integers(0, len(calls)), label="repeated while waiting")
        for shard, request in data.draw(st.permutations(calls + calls[:repeated]), label="order of arrival"):
            answered += len(cluster.shards[shard].push(request, object(), 9.0))
        assert answered == len(calls) + repeated
    for spec in tables:
        np.testing.assert_array_equal(cluster.read(spec.name), model.weight[spec.name])


def test_two_workers_equal_one_up_to_rounding() -> None:
    generator = np.random.default_rng(0)
    tables = specs("rowwise_adagrad")
    one, two = Cluster(2, tables), Cluster(3, tables)
    for cluster, workers in ((one, 1), (two, 2)):
        for shard in cluster.shards:
            shard.begin(1, workers, 0)
    for step in range(1, 6):
        halves = [make_update(generator, tables) for _ in range(2)]
        whole: dict = {}
        for spec in tables:
            dense = np.zeros((spec.rows, spec.width), np.float64)
            for half in halves:
                if spec.name in half:
                    dense[half[spec.name][0]] += half[spec.name][1]
            rows = np.flatnonzero(dense.any(axis=1))
            whole[spec.name] = (rows, dense[rows].astype(np.float32))
        for shard, request in enumerate(one.requests(1, step, whole, 0.1, Clock(1, step, sync=True))):
            one.shards[shard].push(request, None, 9.0)
        for rank in range(2):
            clock = Clock(1, step, rank, 2, sync=True)
            for shard, request in enumerate(two.requests(rank, step, halves[rank], 0.1, clock)):
                two.shards[shard].push(request, None, 9.0)
    for spec in tables:
        np.testing.assert_allclose(two.read(spec.name), one.read(spec.name), rtol=1e-5, atol=1e-6)


@settings(max_examples=25, deadline=None)
@given(st.integers(0, 10**6), st.sampled_from(KINDS), st.data())
def test_a_cut_is_the_state_at_the_mark(seed: int, kind: str, data: st.DataObject) -> None:
    """Pushes before, between and after the blocks that are taken; the cut shows only those before the mark."""
    generator = np.random.default_rng(seed)
    tables = specs(kind)
    cluster = Cluster(1, tables)
    (shard,) = cluster.shards
    sequence = iter(range(1, 1000))

    def push() -> None:
        (request,) = cluster.requests(1, next(sequence), make_update(generator, tables), 0.1)
        shard.push(request, None, 0.0)

    push()
    expected = {block: shard.export_block(block) for block in range(BLOCKS)}
    with shard.mark() as cut:
        for block in data.draw(st.permutations(range(BLOCKS)), label="order of writing"):
            if generator.random() < 0.3:
                push()
            taken = cut.take(block)
            assert taken.keys() == expected[block].keys()
            for name, tensor in taken.items():
                np.testing.assert_array_equal(tensor, expected[block][name], err_msg=f"{name} of block {block}")
        with pytest.raises(KeyError, match="taken before"):
            cut.take(0)
    push()
    with shard.mark() as again:
        np.testing.assert_array_equal(again.take(3)["a/weight"], shard.export_block(3)["a/weight"])


def test_a_cut_holds_while_another_thread_pushes() -> None:
    generator = np.random.default_rng(4)
    tables = specs("adagrad")
    cluster = Cluster(1, tables)
    (shard,) = cluster.shards
    pushes = [cluster.requests(1, n, make_update(generator, tables), 0.1)[0] for n in range(1, 400)]
    shard.push(pushes[0], None, 0.0)
    expected = {block: shard.export_block(block) for block in range(BLOCKS)}
    with shard.mark() as cut:
        pusher = threading.Thread(target=lambda: [shard.push(push, None, 0.0) for push in pushes[1:]])
        pusher.start()
        taken = {block: cut.take(block) for block in range(BLOCKS)}
        pusher.join()
    for block, tensors in expected.items():
        for name, tensor in tensors.items():
            np.testing.assert_array_equal(taken[block][name], tensor, err_msg=f"{name} of block {block}")
    changed = [b for b in expected if not np.array_equal(shard.export_block(b)["a/weight"], expected[b]["a/weight"])]
    assert changed
