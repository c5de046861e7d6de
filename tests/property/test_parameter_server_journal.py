"""Whatever a shard did, and wherever its journal ends: what comes back is the shard as of the last whole record."""

from __future__ import annotations

import contextlib
import json
import shutil
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from embershard.parameter_server import failpoints
from embershard.parameter_server.blocks import BlockMap
from embershard.parameter_server.compaction import Compaction
from embershard.parameter_server.records import (
    JournalError,
    decode_pushes,
    decode_tensors,
    encode_pushes,
    encode_tensors,
)
from embershard.parameter_server.recovery import open_shard
from embershard.parameter_server.requests import Clock, PushRequest, RowSet
from embershard.parameter_server.segments import HEADER_BYTES, checksum
from embershard.parameter_server.shard import Shard
from embershard.parameter_server.store import BusyError
from embershard.parameter_server.tables import Layout, Optimizer, TableSpec
from hypothesis import given, settings
from hypothesis import strategies as st

sys.path.insert(0, str(Path(__file__).parents[1] / "oracles"))
import parameter_server_reference as reference

BLOCKS, SEED, WORKERS = 20, 5, 2
FIRST = [
    TableSpec(name="a", rows=30, width=3, optimizer=Optimizer(kind="adam")),
    TableSpec(name="b", rows=25, width=2, optimizer=Optimizer(kind="rowwise_adagrad")),
]
SECOND = [TableSpec(name="c", rows=22, width=3, optimizer=Optimizer(kind="adam"))]
OWNERS = [np.zeros(BLOCKS), np.arange(BLOCKS) % 2, (np.arange(BLOCKS) < 4) * 1]  # 0: this shard

Operation = tuple[str, Any]


@pytest.fixture(scope="module")
def folder() -> Iterator[Path]:
    with tempfile.TemporaryDirectory() as path:
        yield Path(path)


def push_of(shard: Shard, seed: int, client: int, sequence: int, clock: Clock | None) -> PushRequest:
    """Some rows of some slabs, some of them of blocks that the shard does not hold."""
    generator = np.random.default_rng(seed)
    parts, grads = [], []
    for slab in shard.layout.slabs:
        blocks = np.flatnonzero(generator.random(BLOCKS) < 0.4).astype(np.uint16)
        index = (blocks[:, None].astype(np.uint32) * slab.rows_per_block).reshape(-1)
        parts.append(RowSet(slab.id, index, blocks, np.ones(len(blocks), np.uint32)))
        grads.append(generator.normal(size=(len(index), slab.width)).astype(np.float32))
    return PushRequest(client, sequence, parts, grads, [0.1] * len(parts), clock)


def apply(shard: Shard, operation: Operation) -> None:
    """One call to a shard, or a few that belong together; the same on a twin that keeps no journal."""
    with contextlib.suppress(BusyError):  # a sealed block waits for the end of its move
        if operation[0] in ("incoming", "seal", "cancel"):
            move(shard, *operation)
        else:
            call(shard, *operation)


def move(shard: Shard, name: str, value: int) -> None:
    """What the two ends of a move do."""
    block = value % 6
    if name == "cancel":
        shard.cancel_moves()
    elif name == "seal" and shard._held[block]:
        shard.begin_move(block, "m")
        shard.changes_of(block, "m", seal=True)
    elif name == "incoming" and not shard._held[block] and shard.layout.slabs:
        ledger = {"client": [99], "generation": [1], "highest": [value], "window": [1]}
        tensors = {f"ledger/{n}": np.array(v, np.int64 if n == "generation" else np.uint64) for n, v in ledger.items()}
        changes = shard._transit.arrived[block] and value % 2
        for slab in shard.layout.slabs:
            rows = 1 if changes else slab.rows_per_block
            tensors[f"{slab.id}/weights"] = np.full((rows, slab.width), value, np.float32)
            tensors[f"{slab.id}/state"] = np.full((rows, slab.state_width), 1 + value, np.float32)
            if changes:
                tensors[f"{slab.id}/rows"] = np.zeros(1, np.int64)
        shard.receive_block(block, "m", tensors)


def call(shard: Shard, name: str, value: Any) -> None:
    if name == "tables":
        shard.create_tables(value)
    elif name == "map":
        shard.set_block_map(BlockMap(shard.block_map.epoch + 1, value.astype(np.uint16), ("x", "y")))
    elif name == "begin":
        shard.begin((shard.clocks.generation or 0) + 1, WORKERS, value)
    elif name == "push":
        # Other rows under the same number: the blocks that are new are applied, the others are duplicates.
        shard.push(push_of(shard, value, value % 2, 1 + value % 4, None), None, 0.0)
    elif name == "step":
        step = shard.clocks.step + 1
        for rank in range(WORKERS):
            clock = Clock(shard.clocks.generation or 0, step, rank, WORKERS, sync=value % 2 == 0)
            shard.push(push_of(shard, value + rank, 10 + rank, step, clock), None, 0.0)
            shard.push(push_of(shard, value + rank, 10 + rank, step, clock), None, 0.0)  # repeated on the way
    elif name == "reset":
        shard.reset()
    elif name == "load" and shard.layout.tables:
        block = int(shard._held.argmax())
        shard.load_block(block, push_back(shard, block, value))
    elif name == "rows" and shard.layout.slabs:
        slab = shard.layout.slabs[0]
        index = np.arange(0, BLOCKS * slab.rows_per_block, 3).astype(np.uint32)
        shard.overwrite_rows(0, index, np.full((len(index), slab.width), value, np.float32), None)


def push_back(shard: Shard, block: int, value: int) -> dict[str, np.ndarray]:
    """A block with other weights, with its ledger or without."""
    tensors = shard.export_block(block)
    tensors = {n: t + np.float32(value % 7) if n.endswith("/weight") else t for n, t in tensors.items()}
    return tensors if value % 2 else {n: t for n, t in tensors.items() if not n.startswith("ledger/")}


def state(shard: Shard) -> dict[str, Any]:
    """All that a shard would answer from; ledgers by client, whatever order they were entered in."""
    blocks = {}
    for block in np.flatnonzero(shard._held).tolist():
        tensors = shard.export_block(block)
        order = np.argsort(tensors["ledger/client"])
        blocks[block] = {n: t[order].tolist() if n.startswith("ledger/") else t.tobytes() for n, t in tensors.items()}
    return {
        "blocks": blocks,
        "held": [
            flags.tolist() for flags in (shard._held, shard._served, shard._transit.sealed, shard._transit.arrived)
        ],
        "clocks": shard.clocks.describe(),
        "epoch": shard.block_map.epoch,
        "owners": shard.block_map.owners.tolist(),
        "addresses": shard.block_map.addresses,
        "slabs": [list(slab.tables) for slab in shard.layout.slabs],
    }


POINTS = [None, "journal.segment", "snapshot.block", "snapshot.manifest", "snapshot.clean"]
OPERATIONS = st.lists(
    st.one_of(
        st.tuples(st.just("tables"), st.sampled_from([FIRST, SECOND])),
        st.tuples(st.just("map"), st.sampled_from(OWNERS)),
        st.tuples(st.just("begin"), st.integers(0, 3)),
        st.tuples(st.just("snapshot"), st.sampled_from(POINTS)),
        st.tuples(st.just("push"), st.integers(0, 11)),
        st.tuples(st.just("push"), st.integers(0, 11)),
        st.tuples(st.just("step"), st.integers(0, 5)),
        st.tuples(st.sampled_from(["load", "rows", "reset"]), st.integers(0, 9)),
        st.tuples(st.sampled_from(["incoming", "incoming", "seal", "cancel"]), st.integers(0, 11)),
    ),
    min_size=3,
    max_size=9,
)
START: list[Operation] = [("map", np.zeros(BLOCKS)), ("tables", FIRST), ("begin", 0)]


def snapshot(shard: Shard, point: str | None) -> None:
    """A local snapshot, interrupted at a point or not at all."""
    compaction = Compaction(shard, shard.journal, 1 << 40)
    if point is None:
        compaction.write()
        return
    failpoints.arm(f"{point}=error")
    try:
        with pytest.raises((OSError, AssertionError)):  # without blocks there is no block to fail at
            compaction.write()
            raise AssertionError
    finally:
        failpoints.arm("")


class History:
    """The state of a shard at the end of every record, by (segment, offset)."""

    def __init__(self, directory: Path, operations: list[Operation]) -> None:
        shard, recovery = open_shard(0, BLOCKS, SEED, journal=str(directory))
        assert recovery is None
        twin = Shard(0, Layout(BLOCKS, SEED))
        self.states: dict[tuple[int, int], dict] = {}
        append = shard.journal.append

        def watched(*record: Any) -> None:
            self.states[where(shard)] = state(shard)  # nothing of this record has been done yet
            append(*record)

        shard.journal.append = watched
        for operation in operations:
            if operation[0] == "snapshot" and not shard.moving:
                snapshot(shard, operation[1])
            elif operation[0] != "snapshot":
                apply(shard, operation)
                apply(twin, operation)
            assert state(shard) == state(twin)
            self.states[where(shard)] = state(shard)
        shard.journal.close()


def where(shard: Shard) -> tuple[int, int]:
    return shard.journal._identity.segment, shard.journal._end


@settings(max_examples=25, deadline=None)
@given(operations=OPERATIONS, data=st.data())
def test_cut_anywhere_it_is_the_shard_of_the_last_whole_record(folder: Path, operations: list, data: Any) -> None:
    directory = folder / "cut"
    shutil.rmtree(directory, ignore_errors=True)
    history = History(directory, START + operations)
    last = sorted(directory.glob("segment-*"))[-1]
    cut = data.draw(st.integers(0, last.stat().st_size), label="bytes that are left")
    with last.open("r+b") as file:
        file.truncate(cut)
        file.seek(cut)
        cut += file.write(data.draw(st.binary(max_size=9) if cut > HEADER_BYTES else st.just(b""), label="and garbage"))
    recovered, report = open_shard(0, BLOCKS, SEED, journal=str(directory))
    try:
        assert state(recovered) == history.states[where(recovered)]
        assert where(recovered)[1] <= max(cut, HEADER_BYTES)
        assert report is None or report.torn_bytes == max(0, cut - where(recovered)[1]) or cut < HEADER_BYTES
        apply(recovered, ("push", 3))  # it goes on behind what was torn
        again = state(recovered)
    finally:
        recovered.journal.close()
    once_more, _ = open_shard(0, BLOCKS, SEED, journal=str(directory))
    once_more.journal.close()
    assert state(once_more) == again


@settings(max_examples=25, deadline=None)
@given(operations=OPERATIONS, data=st.data())
def test_a_flipped_bit_is_found_or_was_in_the_last_record(folder: Path, operations: list, data: Any) -> None:
    """An error that names the file, or the shard as of a record that was whole: never another shard, never a crash."""
    directory = folder / "flip"
    shutil.rmtree(directory, ignore_errors=True)
    history = History(directory, START + operations)
    files = sorted(path for path in directory.rglob("*") if path.is_file() and path.name not in ("lock", "port"))
    path = data.draw(st.sampled_from(files), label="file")
    content = bytearray(path.read_bytes())
    bits = data.draw(st.integers(1, 3), label="bits")
    for _ in range(bits):
        bit = data.draw(st.integers(0, 8 * len(content) - 1), label="bit")
        content[bit // 8] ^= 1 << bit % 8
    path.write_bytes(content)
    try:
        recovered, _ = open_shard(0, BLOCKS, SEED, journal=str(directory))
    except JournalError as error:
        assert str(directory) in str(error)
        assert "\n" not in str(error)
    else:
        recovered.journal.close()
        assert state(recovered) == history.states[where(recovered)]
        assert bits > 1 or where(recovered) in list(history.states)[-2:], "more than the last record is gone"


@settings(max_examples=60, deadline=None)
@given(st.data())
def test_contents_of_records_that_cannot_be_are_errors(data: Any) -> None:
    """What stands in a record is guarded by its checksum; where that is right by chance, sizes are checked still."""
    shard = Shard(0, Layout(BLOCKS, SEED))
    for operation in START:
        apply(shard, operation)
    tensors = encode_tensors({"block": 0}, shard.export_block(0))
    pushes = encode_pushes([(push_of(shard, 1, 1, 1, Clock(1, 1, 0, 2)), np.zeros(BLOCKS, np.uint8))])
    header, arrays = data.draw(st.sampled_from([tensors, pushes]))
    damaged = bytearray(header)
    for _ in range(data.draw(st.integers(1, 3))):
        at = data.draw(st.integers(0, len(damaged) - 1))
        damaged[at : at + data.draw(st.integers(0, 2))] = data.draw(st.binary(max_size=3))
    payload = np.frombuffer(b"".join(array.tobytes() for array in arrays), np.uint8)
    payload = payload[: data.draw(st.integers(0, len(payload)))]
    with contextlib.suppress(JournalError):
        decode_tensors(bytes(damaged), payload)
    with contextlib.suppress(JournalError):
        decode_pushes(bytes(damaged), payload, [slab.width for slab in shard.layout.slabs])


@pytest.mark.parametrize("shape", [[-1, 3], [10**30], [0, 10**30], [2.5], ["x"], [[1]], [10**9, 10**9]])
def test_shapes_that_cannot_be(shape: list) -> None:
    header = json.dumps({"tensors": {"t": ["float32", *shape]}}).encode()
    with pytest.raises(JournalError):
        decode_tensors(header, np.zeros(64, np.uint8))


@settings(max_examples=25, deadline=None)
@given(st.integers(0, 300), st.integers(0, 10**6), st.integers(0, 3))
def test_the_checksum_is_the_one_that_was_written_down(size: int, seed: int, offset: int) -> None:
    """Wherever the bytes lie in memory; another one would make every journal unreadable."""
    data = np.random.default_rng(seed).integers(0, 256, size + offset, dtype=np.uint8)[offset:]
    assert checksum(data) == checksum(data.tobytes()) == reference.checksum(data.tobytes())


def test_a_checksum_that_never_changes() -> None:
    assert checksum(bytes(range(100))) == reference.checksum(bytes(range(100))) == 0x28DDC44F12B808FD
