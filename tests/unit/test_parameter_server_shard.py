"""One shard: refusals, waiting, fencing, ownership. What it computes is compared with a dense model elsewhere."""

import re

import numpy as np
import pytest
from embershard.parameter_server import kernels
from embershard.parameter_server.blocks import BlockMap
from embershard.parameter_server.ledger import WINDOW
from embershard.parameter_server.requests import (
    FENCED,
    INVALID,
    TIMEOUT,
    TOO_OLD,
    BlockStatus,
    Clock,
    PullRequest,
    PushRequest,
    Refusal,
    RowSet,
)
from embershard.parameter_server.shard import Shard
from embershard.parameter_server.store import FencedError, StoreError
from embershard.parameter_server.tables import Layout, Optimizer, TableError, TableSpec

BLOCKS = 20
SPECS = [
    TableSpec(name="a", rows=60, width=4, optimizer=Optimizer(kind="sgd")),
    TableSpec(name="b", rows=30, width=2, optimizer=Optimizer(kind="sgd")),
]


def make_shard(owners: list[int] | None = None) -> Shard:
    shard = Shard(0, Layout(BLOCKS, 1))
    shard.set_block_map(BlockMap(1, np.array(owners or [0] * BLOCKS, np.uint16), ("x", "y")))
    shard.create_tables(SPECS)
    return shard


def rows_of(shard: Shard, name: str, rows: list[int] | None = None) -> tuple[RowSet, np.ndarray]:
    ref = shard.layout.ref(name)
    slab = shard.layout.slabs[ref.slab]
    wanted = np.array(rows if rows is not None else range(slab.tables[ref.table].rows))
    order = np.arange(BLOCKS, dtype=np.uint16)
    return kernels.locate(slab, np.array([ref.table], np.int32), np.array([0, len(wanted)]), wanted, order)


def read(shard: Shard, name: str = "a") -> np.ndarray:
    part, inverse = rows_of(shard, name)
    (done,) = shard.pull(PullRequest([part]), "read", 0.0)
    return done.reply.rows[0][inverse]


def push_of(shard: Shard, sequence: int, clock: Clock | None = None, client: int = 1, rate: float = 1.0) -> PushRequest:
    parts = [rows_of(shard, "a", [1, 5, 44])[0], rows_of(shard, "b", [7])[0]]
    grads = [np.ones((3, 4), np.float32), np.ones((1, 2), np.float32)]
    return PushRequest(client, sequence, parts, grads, [rate, rate], clock)


def tokens(completed) -> list[object]:
    return [done.token for done in completed]


def test_a_push_applies_once() -> None:
    shard = make_shard()
    before = read(shard)
    for _ in range(3):
        (done,) = shard.push(push_of(shard, 1), "p", 0.0)
    assert all((statuses == BlockStatus.DUPLICATE).all() for statuses in done.reply.statuses)
    moved = before.copy()
    moved[[1, 5, 44]] -= 1
    np.testing.assert_array_equal(read(shard), moved)
    assert shard.statistics()["duplicates"] == 2 * sum(len(s) for s in done.reply.statuses)


def test_a_push_below_the_window_is_refused_whole() -> None:
    shard = make_shard()
    for sequence in range(1, WINDOW + 2):
        shard.push(push_of(shard, sequence, rate=0.0), "p", 0.0)
    before = read(shard)
    (done,) = shard.push(push_of(shard, 1), "late", 0.0)
    assert done.reply.code == TOO_OLD
    assert "push 1 of client 1" in done.reply.message
    np.testing.assert_array_equal(read(shard), before)


def broken_pushes(shard: Shard):
    def change(message: str, **fields):
        request = push_of(shard, 1, Clock(1, 1))
        for name, value in fields.items():
            setattr(request, name, value)
        return request, message

    part = rows_of(shard, "a", [1, 5, 44])[0]
    good = np.ones((3, 4), np.float32)
    nan = good.copy()
    nan[1, 2] = np.nan
    yield change(
        "slab 9 does not exist",
        parts=[RowSet(9, part.index, part.blocks, part.counts)],
        grads=[good],
        learning_rates=[1.0],
    )
    yield change(
        "index is int64",
        parts=[RowSet(0, part.index.astype(np.int64), part.blocks, part.counts)],
        grads=[good],
        learning_rates=[1.0],
    )
    yield change(
        "state 4 rows",
        parts=[RowSet(0, part.index, part.blocks, part.counts + np.uint32([1, 0, 0]))],
        grads=[good],
        learning_rates=[1.0],
    )
    yield change(
        "does not lie in block",
        parts=[RowSet(0, part.index[::-1].copy(), part.blocks, part.counts)],
        grads=[good],
        learning_rates=[1.0],
    )
    yield change(
        "stands twice",
        parts=[RowSet(0, part.index, part.blocks[[0, 0, 2]], part.counts)],
        grads=[good],
        learning_rates=[1.0],
    )
    yield change(
        "block 65535 does not exist",
        parts=[RowSet(0, part.index, np.uint16([0, 1, 65535]), part.counts)],
        grads=[good],
        learning_rates=[1.0],
    )
    yield change(r"step 1, slab 0: gradients are float32\[2, 4\]", parts=[part], grads=[good[:2]], learning_rates=[1.0])
    yield change(
        "step 1: the gradient of row .* of table 'a' is not finite", parts=[part], grads=[nan], learning_rates=[1.0]
    )
    yield change("learning rate is inf", parts=[part], grads=[good], learning_rates=[float("inf")])
    yield change("1 parts with 2 gradients", parts=[part])
    yield change("is out of range", sequence=-1)


@pytest.mark.parametrize("which", range(11))
def test_wrong_pushes_are_refused_and_change_nothing(which: int) -> None:
    shard = make_shard()
    shard.begin(1, 1, 0)
    before = read(shard)
    request, message = list(broken_pushes(shard))[which]
    (done,) = shard.push(request, "p", 0.0)
    assert isinstance(done.reply, Refusal)
    assert done.reply.code == INVALID
    assert re.search(message, done.reply.message), done.reply.message
    np.testing.assert_array_equal(read(shard), before)
    assert shard.clocks.step == 0, "a refused push does not count for its step"


def test_the_row_with_the_bad_gradient_is_named() -> None:
    shard = make_shard()
    part, inverse = rows_of(shard, "a", [3, 9, 27])
    grads = np.zeros((3, 4), np.float32)
    grads[inverse[2], 1] = np.inf
    (done,) = shard.push(PushRequest(1, 1, [part], [grads], [0.1]), "p", 0.0)
    assert "row 27 of table 'a'" in done.reply.message


def test_only_blocks_that_are_owned_are_answered() -> None:
    owners = [0] * 10 + [1] * 10
    shard = make_shard(owners)
    part, _ = rows_of(shard, "a")
    (done,) = shard.pull(PullRequest([part]), "p", 0.0)
    here = part.blocks < 10
    assert done.reply.statuses[0].tolist() == np.where(here, BlockStatus.APPLIED, BlockStatus.MOVED).tolist()
    assert len(done.reply.rows[0]) == part.counts[here].sum()
    assert np.isfinite(done.reply.rows[0]).all()
    (done,) = shard.push(PushRequest(1, 1, [part], [np.ones((60, 4), np.float32)], [0.1]), "p", 0.0)
    assert done.reply.statuses[0].tolist() == np.where(here, BlockStatus.APPLIED, BlockStatus.MOVED).tolist()


def test_a_block_moves_with_its_rows_and_its_ledger() -> None:
    source, target = make_shard(), make_shard([1] * BLOCKS)
    request = push_of(source, 1)
    source.push(request, "p", 0.0)
    after = read(source)
    moving = list(range(0, BLOCKS, 2))
    exported = {block: source.export_block(block) for block in moving}
    owners = np.zeros(BLOCKS, np.uint16)
    owners[moving] = 1
    source.set_block_map(BlockMap(2, owners, ("x", "y")))
    target.set_block_map(BlockMap(2, 1 - owners, ("y", "x")))  # the target calls itself 0
    part, inverse = rows_of(source, "a")
    assert (target.pull(PullRequest([part]), "p", 0.0)[0].reply.statuses[0] == BlockStatus.MOVED).all(), (
        "nothing came yet"
    )
    padding = 0
    for block, tensors in exported.items():
        assert target.load_block(block, tensors) == []
        weights = target._memory[1].block(block)[0]
        padding += len(weights) - len(tensors["b/weight"])
        assert np.isnan(weights[len(tensors["b/weight"]) :]).all(), "what is no row must not pass for one"
    assert padding > 0
    rows = np.empty((60, 4), np.float32)
    for shard, here in ((source, owners[part.blocks] == 0), (target, owners[part.blocks] == 1)):
        reply = shard.pull(PullRequest([part]), "p", 0.0)[0].reply
        assert (reply.statuses[0] == np.where(here, BlockStatus.APPLIED, BlockStatus.MOVED)).all()
        rows[np.repeat(here, part.counts)] = reply.rows[0]
    np.testing.assert_array_equal(rows[inverse], after)
    for shard, other in ((source, 1), (target, 0)):
        statuses = shard.push(request, "again", 0.0)[0].reply.statuses[0]
        expected = np.where(owners[request.parts[0].blocks] == other, BlockStatus.MOVED, BlockStatus.DUPLICATE)
        assert statuses.tolist() == expected.tolist()


def test_memory_of_a_block_that_left_is_given_back() -> None:
    shard = Shard(0, Layout(BLOCKS, 1))
    shard.set_block_map(BlockMap.initial(BLOCKS, ("x",)))
    shard.create_tables([TableSpec(name="large", rows=BLOCKS * 2048, width=4)])
    owners = np.zeros(BLOCKS, np.uint16)
    owners[7] = 1
    shard.set_block_map(BlockMap(2, owners, ("x", "y")))
    blocks = [shard._memory[0].block(block)[0] for block in range(BLOCKS)]
    assert [block for block in range(BLOCKS) if not blocks[block].any()] == [7]


def test_maps_and_blocks_that_do_not_fit_are_refused() -> None:
    shard = make_shard([0] * 10 + [1] * 10)
    with pytest.raises(TableError, match="a map of 30 blocks"):
        shard.set_block_map(BlockMap.initial(30, ("x",)))
    with pytest.raises(StoreError, match="older than 1"):
        shard.set_block_map(BlockMap(0, np.zeros(BLOCKS, np.uint16), ("x",)))
    with pytest.raises(StoreError, match="block 15 does not belong to shard 0"):
        shard.load_block(15, {})
    with pytest.raises(StoreError, match="does not hold block 15"):
        shard.export_block(15)
    tensors = shard.export_block(3)
    tensors["a/weight"] = tensors["a/weight"][:1]
    with pytest.raises(TableError, match="table 'a', block 3"):
        shard.load_block(3, tensors)


def test_existing_tables_stay_as_they_are() -> None:
    shard = make_shard()
    shard.push(push_of(shard, 1), "p", 0.0)
    before = read(shard)
    shard.create_tables([SPECS[0], TableSpec(name="c", rows=9, width=4)])
    np.testing.assert_array_equal(read(shard), before)
    assert np.isfinite(read(shard, "c")).all()
    with pytest.raises(TableError, match="another specification"):
        shard.create_tables([TableSpec(name="d", rows=9, width=1), TableSpec(name="a", rows=61, width=4)])
    assert shard.layout.find("d") is None


def test_generations_fence() -> None:
    shard = make_shard()
    old = Clock(1, 1, 0, 2)
    assert shard.push(push_of(shard, 1, old), "early", 0.0)[0].reply.code == FENCED, "no generation yet"
    shard.begin(1, 2, 0)
    assert shard.pull(PullRequest([], Clock(1, 2, 0, 2)), "pull", 9.0) == []
    assert shard.push(push_of(shard, 1, Clock(1, 1, 0, 2, sync=True)), "push", 9.0) == []
    before = read(shard)
    done = shard.begin(2, 1, 0)
    assert sorted(tokens(done)) == ["pull", "push"]
    assert {d.reply.code for d in done} == {FENCED}
    for clock in (old, Clock(3, 1, 0, 1)):
        assert shard.push(push_of(shard, 1, clock), "p", 0.0)[0].reply.code == FENCED
        assert shard.pull(PullRequest([], clock), "p", 0.0)[0].reply.code == FENCED
    np.testing.assert_array_equal(read(shard), before)
    with pytest.raises(FencedError, match="generation 1 is over"):
        shard.begin(1, 2, 0)
    with pytest.raises(ValueError, match="began with 1 workers"):
        shard.begin(2, 3, 0)
    shard.push(push_of(shard, 1, Clock(2, 1)), "p", 0.0)
    assert shard.begin(2, 1, 0) == []
    assert shard.clocks.step == 1, "beginning the running generation again changes nothing"
    assert shard.statistics()["clients"] == 1
    shard.begin(3, 1, 0)
    assert shard.statistics()["clients"] == 0, "a client of an older generation can never come back"


def test_a_pull_waits_for_every_rank_and_its_staleness() -> None:
    shard = make_shard()
    shard.begin(1, 2, 10)
    part = rows_of(shard, "a", [1])[0]
    at_once = shard.pull(PullRequest([part], Clock(1, 12, 0, 2, staleness=1)), "k=1", 9.0)
    assert tokens(at_once) == ["k=1"]
    assert shard.pull(PullRequest([part], Clock(1, 12, 0, 2)), "k=0", 9.0) == []
    before = read(shard)[1]
    assert tokens(shard.push(push_of(shard, 1, Clock(1, 11, 0, 2), client=1), "p0", 9.0)) == ["p0"]
    header_only = PushRequest(2, 1, [], [], [], Clock(1, 11, 1, 2))
    done = shard.push(header_only, "p1", 9.0)
    assert tokens(done) == ["p1", "k=0"]
    np.testing.assert_array_equal(done[1].reply.rows[0][0], before - 1)


def test_a_push_that_overtakes_does_not_vouch_for_the_one_before() -> None:
    shard = make_shard()
    shard.begin(1, 1, 0)
    assert shard.pull(PullRequest([], Clock(1, 3)), "pull", 9.0) == []
    assert tokens(shard.push(push_of(shard, 2, Clock(1, 2)), "p2", 9.0)) == ["p2"]
    assert tokens(shard.push(push_of(shard, 1, Clock(1, 1)), "p1", 9.0)) == ["p1", "pull"]


def test_deadlines_name_the_missing_ranks() -> None:
    shard = make_shard()
    shard.begin(1, 3, 11)
    sync = {"workers": 3, "sync": True}
    assert shard.next_deadline() is None
    assert shard.push(push_of(shard, 1, Clock(1, 12, 0, **sync)), "push", 5.0) == []
    assert shard.pull(PullRequest([], Clock(1, 13, 0, **sync)), "pull", 4.0) == []
    assert shard.next_deadline() == 4.0
    assert shard.expire(3.9) == []
    (pull,) = shard.expire(4.0)
    assert (pull.token, pull.reply.code) == ("pull", TIMEOUT)
    assert pull.reply.message == "step 12 still waits for the push of ranks 1, 2 (asked by the pull for step 13)"
    shard.push(push_of(shard, 1, Clock(1, 12, 2, **sync), client=2), "late", 9.0)
    (push,) = shard.expire(5.0)
    assert push.reply.message == "step 12 still waits for the push of rank 1 (asked by the push for step 12)"
    before = read(shard)
    shard.push(push_of(shard, 1, Clock(1, 12, 1, **sync), client=3), "p1", 9.0)
    np.testing.assert_array_equal(read(shard), before)  # rank 0 was told that nothing of its push was applied
    done = shard.push(push_of(shard, 1, Clock(1, 12, 0, **sync)), "again", 9.0)
    assert sorted(tokens(done)) == ["again", "late", "p1"]
    assert shard.statistics()["timeouts"] == 2


def test_ranks_that_disagree_are_told() -> None:
    shard = make_shard()
    shard.begin(1, 2, 0)
    wrong_size = shard.push(push_of(shard, 1, Clock(1, 1, 0, 3)), "p", 0.0)[0].reply
    assert (wrong_size.code, "began with 2" in wrong_size.message) == (INVALID, True)
    shard.push(push_of(shard, 1, Clock(1, 1, 0, 2, sync=True), rate=0.5), "p", 9.0)
    other_rate = shard.push(push_of(shard, 1, Clock(1, 1, 1, 2, sync=True), client=2, rate=0.25), "p", 9.0)[0].reply
    assert other_rate.message.startswith("step 1, slab 0: rank 1 states learning rate 0.25")
    skipped = shard.push(push_of(shard, 1, Clock(1, 100, 0, 2)), "p", 0.0)[0].reply
    assert "its push for step 1 has not arrived" in skipped.message


def test_after_warm_up_a_shard_compiles_nothing() -> None:
    from embershard.parameter_server import contents, ledger, placement_kernels, row_kernels, snapshot

    contents.warm_up(np.dtype(np.uint32))
    modules = (ledger, placement_kernels, row_kernels, snapshot)
    compiled = [f for m in modules for f in vars(m).values() if hasattr(f, "signatures")]
    before = {f: len(f.signatures) for f in compiled}
    shard = Shard(0, Layout(BLOCKS, 1))
    shard.set_block_map(BlockMap.initial(BLOCKS, ("x",)))
    kinds = ("sgd", "adagrad", "rowwise_adagrad", "adam")
    shard.create_tables([TableSpec(name=k, rows=20, width=3, optimizer=Optimizer(kind=k)) for k in kinds])
    shard.begin(1, 2, 0)
    parts = [rows_of(shard, kind)[0] for kind in kinds]
    wire = [np.frombuffer(np.ones((20, 3), np.float32).tobytes(), np.float32).reshape(20, 3) for _ in kinds]
    with shard.mark() as cut:
        for rank in range(2):
            shard.push(PushRequest(rank, 1, parts, wire, [0.1] * 4, Clock(1, 1, rank, 2, sync=True)), rank, 9.0)
        cut.take(0)
    shard.pull(PullRequest(parts), "p", 9.0)
    assert {f.py_func.__name__ for f in compiled if len(f.signatures) > before[f]} == set()
