"""The journal where it meets the world: full disks, other processes, other stores, checkpoints, damage."""

from __future__ import annotations

import json
import resource
import shutil
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from embershard.parameter_server import checkpoint, failpoints, restore
from embershard.parameter_server.blocks import BlockMap
from embershard.parameter_server.compaction import Compaction
from embershard.parameter_server.records import JournalError
from embershard.parameter_server.recovery import open_shard
from embershard.parameter_server.requests import (
    LATER,
    NOT_WRITTEN,
    Clock,
    PullReply,
    PullRequest,
    PushReply,
    PushRequest,
    Refusal,
    RowSet,
)
from embershard.parameter_server.shard import Shard
from embershard.parameter_server.tables import Layout, Optimizer, TableError, TableSpec

BLOCKS = 20
TABLE = TableSpec(name="t", rows=200, width=4, optimizer=Optimizer(kind="adagrad"))


@pytest.fixture(autouse=True)
def disarmed() -> Iterator[None]:
    yield
    failpoints.arm("")


def begin(shard: Shard) -> Shard:
    shard.set_block_map(BlockMap.initial(BLOCKS, ("here",)))
    shard.create_tables([TABLE])
    shard.begin(1, 1, 0)
    return shard


def opened(folder: Path, **options: Any) -> Shard:
    shard, _ = open_shard(0, BLOCKS, 0, journal=str(folder), **options)
    return shard if shard.layout.slabs else begin(shard)


def push(shard: Shard, sequence: int, clock: Clock | None = None, rows: int = 10) -> Any:
    """The first `rows` rows of every block."""
    per_block = shard.layout.slabs[0].rows_per_block
    blocks = np.arange(BLOCKS, dtype=np.uint16)
    index = (blocks[:, None].astype(np.uint32) * per_block + np.arange(rows, dtype=np.uint32)).reshape(-1)
    part = RowSet(0, index, blocks, np.full(BLOCKS, rows, np.uint32))
    grads = np.random.default_rng(sequence).normal(size=(len(index), 4)).astype(np.float32)
    (done, *_) = shard.push(PushRequest(1, sequence, [part], [grads], [0.1], clock), None, 0.0) or [None]
    return done and done.reply


def contents(shard: Shard) -> dict[int, dict[str, bytes]]:
    return {b: {n: t.tobytes() for n, t in shard.export_block(b).items()} for b in range(BLOCKS)}


def test_a_journal_has_one_writer(tmp_path: Path) -> None:
    shard = opened(tmp_path)
    with pytest.raises(JournalError, match=r"is being written by process \d+ on \S+: end it first"):
        open_shard(0, BLOCKS, 0, journal=str(tmp_path))
    shard.journal.close()
    opened(tmp_path).journal.close()


@pytest.mark.parametrize(("number", "blocks", "seed"), [(1, BLOCKS, 0), (0, BLOCKS + 1, 0), (0, BLOCKS, 7)])
def test_the_journal_of_another_shard_or_store_is_refused(tmp_path: Path, number: int, blocks: int, seed: int) -> None:
    opened(tmp_path).journal.close()
    with pytest.raises(JournalError, match="is that of shard 0 of a store with 20 blocks and seed 0, not of shard"):
        open_shard(number, blocks, seed, journal=str(tmp_path))
    opened(tmp_path).journal.close()  # the refusal let go of it


def test_nothing_is_written_and_nothing_comes_back_without_a_folder() -> None:
    shard, recovery = open_shard(0, BLOCKS, 0)
    assert (shard.journal, recovery) == (None, None)


def test_a_full_disk_refuses_pushes_and_serves_pulls(tmp_path: Path) -> None:
    """The system itself refuses the bytes, in the middle of a record."""
    shard = opened(tmp_path)
    assert isinstance(push(shard, 1), PushReply)
    before = contents(shard)
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (shard.journal.size + 200, limits[1]))
    try:
        for clock in (None, Clock(1, 1), Clock(1, 1, sync=True)):
            refused = push(shard, 2, clock)
            assert isinstance(refused, Refusal)
            assert refused.code == NOT_WRITTEN
            assert "cannot be written (File too large), nothing was applied" in refused.message
        with pytest.raises(JournalError, match="File too large"):
            shard.load_block(0, shard.export_block(0))
        assert contents(shard) == before
        assert shard.clocks.step == 0
        assert (tmp_path / "segment-00000001.journal").stat().st_size == shard.journal.size
        (pulled,) = shard.pull(PullRequest([]), None, 0.0)
        assert isinstance(pulled.reply, PullReply)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    statistics = shard.statistics()
    assert (statistics["not_written"], statistics["journal_failures"]) == (3, 4)
    assert isinstance(push(shard, 2), PushReply)  # with room again
    shard.journal.roll()  # nothing of what was refused may stand at the end of the segment before
    after = contents(shard)
    shard.journal.close()
    recovered = opened(tmp_path)
    assert contents(recovered) == after
    recovered.journal.close()


def saved(shard: Shard, directory: Path) -> str:
    blocks = restore.write_blocks(shard.mark(), str(directory))
    checkpoint.commit(str(directory), shard.layout, 1, blocks, checkpoint.write_dense(str(directory), {}), {})
    return str(directory)


def test_what_a_rollback_undid_stays_undone(tmp_path: Path) -> None:
    """Even when the checkpoint is gone by the time the journal is replayed."""
    shard = opened(tmp_path / "journal")
    push(shard, 1)
    directory = saved(shard, tmp_path / "step-000000001")
    at_checkpoint = contents(shard)
    push(shard, 2)
    assert contents(shard) != at_checkpoint
    restore.load_blocks(shard, directory, {"t": "t"})
    shutil.rmtree(directory)
    shard.journal.close()
    recovered = opened(tmp_path / "journal")
    assert contents(recovered) == at_checkpoint
    assert isinstance(push(recovered, 2), PushReply)  # undone, so it counts again
    assert contents(recovered) != at_checkpoint
    recovered.journal.close()


def test_a_checkpoint_and_a_local_snapshot_at_once(tmp_path: Path) -> None:
    """Two cuts, at different moments, with pushes between: each holds its own moment, neither fails."""
    shard = opened(tmp_path / "journal")
    push(shard, 1)
    first, cut = contents(shard), shard.mark()
    push(shard, 2)
    second, local = contents(shard), shard.mark_local()
    push(shard, 3)
    third = contents(shard)
    for block in range(BLOCKS):
        assert {n: t.tobytes() for n, t in cut.take(block).items()} == first[block]
        push(shard, 4 + block)
        assert {n: t.tobytes() for n, t in local.take(block).items()} == second[block]
    assert contents(shard) != third
    cut.close()
    local.close()
    shard.journal.close()


def test_a_local_snapshot_gives_way_to_whoever_overwrites_its_blocks(tmp_path: Path) -> None:
    shard = opened(tmp_path)
    push(shard, 1)
    arrived, go_on = threading.Event(), threading.Event()
    compaction = Compaction(shard, shard.journal, 1 << 40)
    take, failures = shard.mark_local, []

    def mark_and_wait() -> Any:
        cut = take()
        original = cut.take

        def held_back(block: int) -> Any:
            arrived.set()
            assert go_on.wait(20)
            return original(block)

        cut.take = held_back
        return cut

    shard.mark_local = mark_and_wait

    def write() -> None:
        try:
            compaction.write()
        except KeyError as error:
            failures.append(error)

    thread = threading.Thread(target=write)
    thread.start()
    assert arrived.wait(20)
    shard.load_block(3, shard.export_block(3))  # not refused, though block 3 is not in the snapshot yet
    go_on.set()
    thread.join(20)
    assert failures
    after = contents(shard)
    shard.journal.close()
    recovered = opened(tmp_path)
    assert contents(recovered) == after
    assert not list(tmp_path.glob("snapshot-*"))
    recovered.journal.close()


def test_the_journal_stays_short(tmp_path: Path) -> None:
    shard = opened(tmp_path, journal_bytes=50_000)
    written = 0
    for sequence in range(1, 200):
        before = shard.journal.size
        push(shard, sequence)
        written += max(0, shard.journal.size - before)
        for thread in threading.enumerate():
            if thread.name == "compaction-0":
                thread.join(20)
    statistics = shard.statistics()
    assert statistics["local_snapshots"] > 3
    assert statistics["local_snapshot_failures"] == 0
    assert written > 300_000 > 2 * shard.journal.size
    assert len(list(tmp_path.glob("segment-*"))) == len(list(tmp_path.glob("snapshot-*"))) == 1
    after = contents(shard)
    shard.journal.close()
    recovered, report = open_shard(0, BLOCKS, 0, journal=str(tmp_path))
    assert report.snapshot == str(next(tmp_path.glob("snapshot-*")))
    assert contents(recovered) == after
    recovered.journal.close()


def test_a_snapshot_that_fails_is_counted_and_the_journal_goes_on(tmp_path: Path) -> None:
    failpoints.arm("snapshot.block=error")
    shard = opened(tmp_path, journal_bytes=30_000)
    for sequence in range(1, 30):
        push(shard, sequence)
        for thread in threading.enumerate():
            if thread.name == "compaction-0":
                thread.join(20)
    assert shard.statistics()["local_snapshot_failures"] > 0
    assert shard.statistics()["not_written"] == 0
    after = contents(shard)
    shard.journal.close()
    recovered = opened(tmp_path)
    assert contents(recovered) == after
    recovered.journal.close()


def test_a_missing_segment_is_an_error(tmp_path: Path) -> None:
    shard = opened(tmp_path)
    shard.journal.roll()
    push(shard, 1)
    shard.journal.close()
    (tmp_path / "segment-00000001.journal").unlink()
    with pytest.raises(JournalError, match=r"segment-00000001\.journal is missing: segment 2 is there"):
        open_shard(0, BLOCKS, 0, journal=str(tmp_path))


def test_damage_in_the_middle_names_file_and_place(tmp_path: Path) -> None:
    shard = opened(tmp_path)
    push(shard, 1)
    at = shard.journal.size
    push(shard, 2)
    push(shard, 3)
    shard.journal.close()
    path = tmp_path / "segment-00000001.journal"
    data = bytearray(path.read_bytes())
    data[at + 2000] ^= 1
    path.write_bytes(data)
    with pytest.raises(JournalError, match=rf"segment-00000001\.journal: damaged at byte {at}: .* others follow"):
        open_shard(0, BLOCKS, 0, journal=str(tmp_path))


def test_the_old_port_is_remembered_and_nonsense_is_not_believed(tmp_path: Path) -> None:
    journal = opened(tmp_path).journal
    assert journal.port() == 0
    journal.remember_port(4711)
    assert journal.port() == 4711
    for nonsense in (b"", b"x", b"-1", b"99999", b"1" * 100, b"\xff\xfe"):
        (tmp_path / "port").write_bytes(nonsense)
        assert journal.port() == 0
    journal.close()


def test_tables_and_blocks_beyond_the_budget_are_refused_with_the_numbers() -> None:
    shard = Shard(0, Layout(BLOCKS), memory_bytes=8000)
    shard.set_block_map(BlockMap.initial(BLOCKS, ("here",)))
    shard.create_tables([TABLE])  # 200 rows of 4 floats and as much state
    with pytest.raises(TableError, match=r"shard 0: its share of 'u' needs 6400 bytes, and 6400 of .*=8000 are taken"):
        shard.create_tables([TABLE.model_copy(update={"name": "u"})])
    assert [spec.name for spec in shard.layout.tables] == ["t"]
    content = shard.export_block(3)
    half = np.where(np.arange(BLOCKS) < 10, 1, 0).astype(np.uint16)
    shard.set_block_map(BlockMap(2, half, ("here", "there")))
    shard.memory_bytes = shard.held_bytes + 100
    shard.set_block_map(BlockMap(3, np.zeros(BLOCKS, np.uint16), ("here",)))
    with pytest.raises(TableError, match="block 3 needs 320 bytes"):
        shard.load_block(3, content)
    shard.memory_bytes += 220
    shard.load_block(3, content)


@pytest.mark.parametrize("sync", [False, True])
def test_a_cut_that_is_written_too_slowly_pushes_back(sync: bool) -> None:
    """Until its blocks are taken; then the same push is applied, once."""
    shard, twin = begin(Shard(0, Layout(BLOCKS), memory_bytes=6400 + 6000)), begin(Shard(0, Layout(BLOCKS)))
    sequence = 0

    def both() -> Any:
        reply = push(shard, sequence, Clock(1, sequence, sync=sync), rows=sequence % 10 + 1)
        if isinstance(reply, PushReply):
            push(twin, sequence, Clock(1, sequence, sync=sync), rows=sequence % 10 + 1)
        return reply

    cut = shard.mark()
    for sequence in range(1, 9):  # noqa: B007 both() reads it
        reply = both()
        if isinstance(reply, Refusal):
            break
    assert reply.code == LATER
    assert cut.bytes <= 6000
    for block in range(BLOCKS):
        cut.take(block)
    assert cut.bytes == 0
    assert isinstance(both(), PushReply)
    assert shard.statistics()["later"] == 1
    assert contents(shard) == contents(twin)


def test_an_interrupted_recovery_is_begun_again(tmp_path: Path) -> None:
    shard = opened(tmp_path)
    for sequence in range(1, 4):
        push(shard, sequence)
    after = contents(shard)
    shard.journal.close()
    with pytest.MonkeyPatch.context() as patch, pytest.raises(JournalError, match="record 4 cannot be repeated: power"):

        def fail(*_: Any) -> None:
            raise RuntimeError("power")

        patch.setattr(Shard, "repeat", fail)
        open_shard(0, BLOCKS, 0, journal=str(tmp_path))
    recovered = opened(tmp_path)
    assert contents(recovered) == after
    recovered.journal.close()


def test_the_manifest_of_a_local_snapshot_is_checked(tmp_path: Path) -> None:
    shard = opened(tmp_path)
    Compaction(shard, shard.journal, 1 << 40).write()
    shard.journal.close()
    manifest = tmp_path / "snapshot-00000002" / "manifest.json"
    content = json.loads(manifest.read_text())
    manifest.write_text(json.dumps(content | {"epoch": 99}))
    with pytest.raises(JournalError, match=r"snapshot-00000002 cannot be used: .*manifest\.json is damaged"):
        open_shard(0, BLOCKS, 0, journal=str(tmp_path))
    manifest.write_text(json.dumps(content))
    with pytest.raises(JournalError, match=r"has \(format, shard, blocks, seed\) \(1, 0, 20, 0\), where"):
        open_shard(0, BLOCKS, 1, journal=str(tmp_path))
