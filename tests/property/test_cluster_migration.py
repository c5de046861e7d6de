"""Moves of blocks under every order of calls, failures and pushes between them: one owner, nothing lost or doubled."""

from __future__ import annotations

import numpy as np
import pytest
from embershard.cluster.migration import Call, Commit, Migration, Move, Phase, described, plan_moves
from embershard.parameter_server.blocks import BlockMap
from embershard.parameter_server.kernels import locate
from embershard.parameter_server.local import PREFIX, LocalStore
from embershard.parameter_server.requests import Clock
from embershard.parameter_server.tables import Initializer, Optimizer, TableSpec
from hypothesis import given, settings
from hypothesis import strategies as st

ROWS, USERS, WIDTH, BLOCKS = 120, 80, 2, 40
ZERO = Initializer(kind="constant", scale=0.0)
TABLES = [
    TableSpec(name="items", rows=ROWS, width=WIDTH, initializer=ZERO, optimizer=Optimizer(kind="adagrad")),
    TableSpec(name="users", rows=USERS, width=1, initializer=ZERO, optimizer=Optimizer(kind="sgd")),
]


class Lost(Exception):
    """What a call to a shard ends with when the network fails."""


class Run:
    """A store with a model beside it, one worker that trains, and a coordinator that moves blocks."""

    def __init__(self, shards: int, joining: int) -> None:
        self.store = LocalStore(shards=shards + joining, blocks=BLOCKS)
        self.twin = LocalStore(shards=1, blocks=BLOCKS)
        self.block_map = BlockMap.initial(BLOCKS, tuple(f"{PREFIX}{i}" for i in range(shards)))
        self.block_map = BlockMap(2, self.block_map.owners, self.block_map.addresses)
        for member in self.store.members:
            member.set_block_map(self.block_map)
        self.store.adopt(self.block_map)
        for store in (self.store, self.twin):
            store.create_tables(TABLES)
            store.begin(1, 1, 0)
        self.addresses = [f"{PREFIX}{i}" for i in range(shards + joining)]
        for address in self.addresses[shards:]:
            self.store.control_at(address, "create_tables", {"tables": [table.model_dump() for table in TABLES]})
        self.step = 0
        self.waiting: list = []

    def train(self, generator: np.random.Generator) -> None:
        """One step; what a closed gate or a seal keeps back stays under way."""
        for future in self.waiting[:-20]:  # as the window of pushes demands
            future.result(10)
        self.step += 1
        self._send(generator, 0, np.unique(generator.integers(0, ROWS, 9)), Clock(1, self.step, staleness=1))

    def push_from_outside(self, generator: np.random.Generator) -> None:
        """A push without a clock, which no gate keeps back. Such pushes overtake each other: their table has SGD."""
        if sum(not future.done() for future in self.waiting) < 20:  # more would have to wait for answers
            self._send(generator, 1, np.unique(generator.integers(0, USERS, 20)), None)

    def _send(self, generator: np.random.Generator, slab: int, rows: np.ndarray, clock: Clock | None) -> None:
        width = self.store.layout.slabs[slab].width
        grads = generator.integers(-3, 4, (len(rows), width)).astype(np.float32)
        segments = np.array([0, len(rows)])
        for store in (self.store, self.twin):
            layout, rank = store.layout.slabs[slab], store.block_map.rank()
            part, inverse = locate(layout, np.zeros(1, np.int32), segments, rows, rank)
            ordered = np.empty_like(grads)
            ordered[inverse] = grads
            if clock is not None:
                self.waiting.append(store.pull([part], clock))
            self.waiting.append(store.push([part], [ordered], [1.0], clock))

    def perform(self, call: Call | Commit) -> object:
        if isinstance(call, Commit):
            self.block_map = call.block_map
            return None
        arguments = dict(call.arguments)
        if call.method == "settle":
            arguments["seconds"] = 0.2
        return self.store.control_at(self.addresses[call.shard], call.method, arguments)

    def settle(self) -> None:
        """What a coordinator does that comes back: it announces the map that it finds and ends what was under way."""
        for address in self.addresses[: len(self.block_map.addresses)]:
            self.store.control_at(address, "set_block_map", described(self.block_map))
        for address in self.addresses[: len(self.block_map.addresses)]:
            self.store.control_at(address, "cancel_moves", {"epoch": self.block_map.epoch})
        self.store.adopt(self.block_map)

    def finish(self) -> None:
        for future in self.waiting:
            future.result(10)

    def check(self) -> None:
        """Every block has one owner, and rows, optimizer state and ledger are those of the unmoved twin."""
        owners = [[m.number for m in self.store.members if m._served[block]] for block in range(BLOCKS)]
        assert owners == [[int(owner)] for owner in self.block_map.owners]
        for block in range(BLOCKS):
            got = self.store.members[self.block_map.owners[block]].export_block(block)
            expected = self.twin.members[0].export_block(block)
            for name in expected:
                if not name.startswith("ledger/client"):  # each store's own number
                    np.testing.assert_array_equal(got[name], expected[name], err_msg=f"block {block} {name}")


FATES = ("lost", "answer lost", "twice", "given up", "coordinator died")
Faults = dict[tuple[Phase, int], str]
some_faults = st.dictionaries(st.tuples(st.sampled_from(Phase), st.integers(0, 2)), st.sampled_from(FATES), max_size=3)


def drive(run: Run, migration: Migration, generator: np.random.Generator, faults: Faults) -> None:
    """Some calls are lost on the way there, or on the way back, or are made twice; training goes on between them.

    The move may be given up, and its coordinator may die; the next one knows only what was committed. faults: by phase
    and number of the call in it, each once.
    """
    while not migration.ended:
        if migration.phase in (Phase.COPY, Phase.CATCH_UP, Phase.CLOSE):  # later, gates may be closed for long
            run.train(generator)
        run.push_from_outside(generator)
        if faults.get((migration.phase, 0)) == "given up":
            migration.cancel()
        results: list[object] = []
        error: Exception | None = None
        for number, call in enumerate(migration.calls()):
            fate = faults.pop((migration.phase, number), None)
            try:
                if fate == "lost":
                    raise Lost
                if fate == "twice":
                    run.perform(call)
                results.append(run.perform(call))
                if fate == "answer lost":
                    raise Lost
            except Exception as problem:
                error = problem
            run.push_from_outside(generator)
            if fate == "coordinator died" and not migration._joining:
                run.settle()
                return
        if error is not None:
            migration.failed(error)
        else:
            migration.succeeded(results)
    if migration.committed:
        run.store.adopt(migration.after)
    elif not migration._joining:
        run.settle()  # the coordinator dies now


@settings(max_examples=25, deadline=None)
@given(st.integers(0, 10**6), st.sampled_from([(1, 1), (2, 1), (3, 0), (2, 2)]), st.data())
def test_moves_keep_one_owner_and_every_push(seed: int, shape: tuple[int, int], data: st.DataObject) -> None:
    generator = np.random.default_rng(seed)
    run = Run(*shape)
    for _ in range(3):
        run.train(generator)
    if shape[1]:
        join = Migration(run.block_map, run.addresses, [])
        drive(run, join, generator, data.draw(some_faults, label="faults"))
        if not join.committed:  # a shard that could not join gets no blocks
            run.finish()
            run.check()
            return
    for _ in range(data.draw(st.integers(1, 3), label="groups")):
        shards = len(run.block_map.addresses)
        blocks = generator.permutation(BLOCKS)[:5].tolist()
        moves = [
            Move(block, int(run.block_map.owners[block]), int((run.block_map.owners[block] + 1) % shards))
            for block in blocks
        ]
        migration = Migration(run.block_map, run.block_map.addresses, moves)
        drive(run, migration, generator, data.draw(some_faults, label="faults"))
        run.train(generator)
    run.finish()
    run.check()


@pytest.mark.parametrize("fate", FATES)
@pytest.mark.parametrize("phase", [phase for phase in Phase if phase not in (Phase.DONE, Phase.CANCELLED)])
def test_each_fault_at_each_step_and_then_a_dead_coordinator(phase: Phase, fate: str) -> None:
    generator = np.random.default_rng(1)
    run = Run(2, 0)
    run.train(generator)
    moves = [Move(block, int(run.block_map.owners[block]), 1 - int(run.block_map.owners[block])) for block in (3, 8)]
    faults = {(phase, 0): fate}
    if phase in (Phase.REVERT, Phase.CANCEL):
        faults[Phase.COMMIT, 0] = "answer lost"
    drive(run, Migration(run.block_map, run.block_map.addresses, moves), generator, faults)
    run.train(generator)
    run.finish()
    run.check()


@settings(max_examples=50, deadline=None)
@given(st.integers(1, 9), st.integers(1, 9), st.integers(0, 10**6))
def test_plans_move_the_fewest_blocks_and_balance(before: int, after: int, seed: int) -> None:
    generator = np.random.default_rng(seed)
    blocks = 12 * max(before, after)
    owners = generator.integers(0, before, blocks).astype(np.uint16)
    load = 1 / blocks + generator.pareto(2, blocks) / blocks
    moves = plan_moves(owners, after, load)
    moved = owners.copy()
    for move in moves:
        assert owners[move.block] == move.source != move.target
        moved[move.block] = move.target
    counts = np.bincount(moved, minlength=after)
    assert len(counts) == after
    assert counts.max() - counts.min() <= 1
    had = np.sort(np.bincount(owners, minlength=max(before, after))[:after])[::-1]
    quota = np.full(after, blocks // after)
    quota[: blocks % after] += 1
    assert len(moves) == int((owners >= after).sum()) + int(np.maximum(had - quota, 0).sum())
    assert plan_moves(moved, after, load) == []


def test_a_new_shard_takes_its_share_of_the_traffic() -> None:
    """Half of the traffic on four blocks of one shard: what joins does not get only idle blocks."""
    owners = np.repeat([0, 1], 20).astype(np.uint16)
    load = np.full(40, 1.0)
    load[:4] = 10.0
    moved = owners.copy()
    for move in plan_moves(owners, 4, load):
        moved[move.block] = move.target
    borne = np.bincount(moved, load, 4)
    assert borne.max() <= 1.5 * borne.mean()


def about_to_commit() -> Migration:
    migration = Migration(BlockMap.initial(40, ("a", "b")), ("a", "b"), [Move(0, 0, 1)])
    while migration.phase is not Phase.COMMIT:
        assert migration.calls() or migration.phase is Phase.JOIN  # nobody joins
        results = {
            Phase.CLOSE: {"step": 0, "lag": 0},
            Phase.SETTLE: {"settled": True, "generation": None, "workers": 0, "done": [], "early": []},
        }
        migration.succeeded([results.get(migration.phase, 0) for _ in migration.calls()])
    return migration


def test_a_move_can_be_given_up_until_it_is_committed() -> None:
    migration = about_to_commit()
    other = Migration(BlockMap.initial(40, ("a", "b")), ("a", "b"), [Move(0, 0, 1)])
    assert other.cancel()
    assert [call.method for call in other.calls() if isinstance(call, Call)] == ["cancel_moves", "cancel_moves"]
    migration.succeeded([None])
    assert migration.committed
    assert not migration.cancel()


def test_of_a_commit_that_failed_the_old_map_is_written_before_anything_is_undone() -> None:
    migration = about_to_commit()
    migration.failed(Lost())
    for _ in range(2):
        assert migration.calls() == [Commit(migration.before)]
        migration.failed(Lost())
    assert not migration.cancel()
    migration.succeeded([None])
    assert [call.method for call in migration.calls() if isinstance(call, Call)] == ["cancel_moves", "cancel_moves"]


def test_workers_that_do_not_come_to_rest_are_named() -> None:
    migration = Migration(BlockMap.initial(40, ("a", "b")), ("a", "b"), [Move(0, 0, 1)])
    for results in ([8], [8], [{"step": 4, "lag": 1}, {"step": 6, "lag": 0}]):
        migration.succeeded(results)
    state = {"generation": 1, "workers": 1}
    migration.succeeded([{**state, "settled": True}, {**state, "settled": False}])
    assert migration.phase is Phase.CANCEL
    assert "shard 1 still waits for pushes up to step 5" in str(migration.error)


def test_a_generation_that_begins_meanwhile_ends_the_move() -> None:
    migration = Migration(BlockMap.initial(40, ("a", "b")), ("a", "b"), [Move(0, 0, 1)])
    for results in ([8], [8], [{"step": 4, "lag": 1}, {"step": 6, "lag": 0}]):
        migration.succeeded(results)
    states = [{"generation": number, "workers": 1, "settled": True} for number in (1, 2)]
    migration.succeeded(states)
    assert migration.phase is Phase.CANCEL


@pytest.mark.parametrize("field", ["weights", "state"])
def test_shards_with_other_tables_refuse_each_others_blocks(field: str) -> None:
    store = LocalStore(shards=2, blocks=BLOCKS)
    store.create_tables(TABLES)
    tensors = {name: np.array(value) for name, value in store.members[0].begin_move(0, "m").items()}
    tensors[f"0/{field}"] = tensors[f"0/{field}"][1:]
    with pytest.raises(Exception, match="the shards do not have the same tables"):
        store.members[1].receive_block(0, "m", tensors)


def test_a_shard_that_owns_blocks_cannot_leave() -> None:
    with pytest.raises(ValueError, match="1 shards are to stay, and shard 1 owns blocks"):
        Migration(BlockMap.initial(40, ("a", "b")), ("a",), [])
