"""Checkpoints while pushes run flat out, writers that die, damaged files, two writers: one cut, whole or not at all.

Local snapshots of the journal: `tests/integration/test_store_journal.py`.
"""

from __future__ import annotations

import signal
import sys
import threading
from collections import defaultdict
from collections.abc import Callable
from pathlib import Path

import pytest
from embershard.cluster.chaos_history import HISTORY_FILE, History, check, read_tables
from embershard.parameter_server.checkpoint import CheckpointError, latest, read_block, read_manifest, verify
from embershard.parameter_server.ledger import WINDOW
from embershard.parameter_server.store import ShardUnavailable, Store

sys.path.insert(0, str(Path(__file__).parent))
from shards import WORKLOAD

pytestmark = [pytest.mark.chaos, pytest.mark.timeout(300)]


def saved(store: Store, folder: Path, step: int) -> str:
    """A checkpoint, named as those of a run."""
    directory = str(folder / "checkpoints" / f"step-{step:09d}")
    store.save(directory, step=step).result()
    return directory


def digests(directory: str) -> list[str]:
    """Of every block's file: equal where rows, optimizer state and ledger are."""
    return [entry.digest for entry in read_manifest(directory).files]


def contents(store: Store, folder: Path) -> list[str]:
    """Digests of what the shards hold now."""
    store.save(str(folder / "contents")).result()
    return digests(str(folder / "contents"))


def test_weights_state_and_ledger_are_of_one_cut(shards) -> None:
    group = shards(3)
    cuts: dict[int, str] = {}
    with group.connect() as store:
        pusher = group.pusher(store)
        meanwhile = 0
        for _ in range(8):
            pusher.run(group.step + 1, 10, sync=False)
            group.step += 10
            at = group.step
            cuts[at] = str(group.folder / "checkpoints" / f"step-{at:09d}")
            saving = store.save(cuts[at], step=at)
            while not saving.done():
                pusher.run(group.step + 1, 2, sync=False)
                group.step += 2
            saving.result()
            meanwhile += group.step - at
    assert meanwhile > 8  # steps that a cut without its barrier would show
    for at, directory in cuts.items():
        history = History.read(group.folder / HISTORY_FILE)
        history.pushes = [push for push in history.pushes if push.step <= at]
        verdict = check(history, read_tables(directory))
        assert verdict.nothing_lost, (at, verdict)
        assert ledgers(directory) == ledgers_after(at, directory)
    verdict = group.verdict()
    assert verdict.nothing_lost, verdict


def ledgers(directory: str) -> dict[int, tuple[int, int]]:
    """Block -> number of its last push, and the bitmap of those up to it; the store had one client."""
    found = {}
    for entry in read_manifest(directory).files:
        tensors = read_block(directory, entry)
        assert {"items/weight", "squares/weight", "squares/sum"} < tensors.keys()
        if len(tensors["ledger/client"]):
            (found[entry.block],) = zip(
                tensors["ledger/highest"].tolist(), tensors["ledger/window"].tolist(), strict=True
            )
    return found


def ledgers_after(step: int, directory: str) -> dict[int, tuple[int, int]]:
    """What `ledgers` is if pushes 1 to `step` are in it and no other; the push of a step has its number."""
    pushes = defaultdict(set)
    tables = read_tables(directory)
    for number in range(1, step + 1):
        rows, _ = WORKLOAD.gradients(0, number)
        for state in tables.values():
            for block in state.block[rows].tolist():
                pushes[block].add(number)
    return {
        block: (max(seen), sum(1 << (max(seen) - number) for number in seen if max(seen) - number < WINDOW))
        for block, seen in pushes.items()
    }


@pytest.mark.parametrize("number", [1, 20])
def test_a_shard_dies_while_it_writes(shards, number: int) -> None:
    group = shards(2)
    with group.connect() as store:
        pusher = group.pusher(store)
        pusher.run(1, 10, sync=False)
        before = saved(store, group.folder, 10)
        pusher.run(11, 10, sync=False)
        group.arm(1, f"checkpoint.block=kill:{number}")
        with pytest.raises(ShardUnavailable, match=group.addresses()[1]):
            saved(store, group.folder, 20)
        newest, skipped = latest(str(group.folder / "checkpoints"))
        assert newest == before
        assert len(skipped) == 1 and "manifest.json is missing; this is not a finished checkpoint" in skipped[0]
        group.restart(1)
        pusher.run(21, 10, sync=False)
        assert latest(str(group.folder / "checkpoints")) != saved(store, group.folder, 30)
    verdict = group.verdict()
    assert verdict.nothing_lost, verdict


def killed_while_it_saves(group, directory: str, point: str) -> None:
    """The client that asked for the checkpoint writes the dense part and the manifest."""
    process = group.saver(directory, f"{point}=kill")
    process.join(120)
    assert process.exitcode == -signal.SIGKILL


@pytest.mark.parametrize(
    ("point", "kept"), [("checkpoint.dense", 10), ("checkpoint.manifest", 10), ("checkpoint.committed", 20)]
)
def test_a_worker_dies_while_it_writes(shards, point: str, kept: int) -> None:
    """All goes back to the last checkpoint that is whole."""
    group = shards(2)
    with group.connect() as store:
        pusher = group.pusher(store)
        pusher.run(1, 10, sync=False)
        saved(store, group.folder, 10)
        pusher.run(11, 10, sync=False)
    checkpoints = group.folder / "checkpoints"
    killed_while_it_saves(group, str(checkpoints / "step-000000020"), point)
    newest, _ = latest(str(checkpoints))
    assert newest == str(checkpoints / f"step-{kept:09d}")
    group.begin(generation=2, step=kept)
    group.store.load(newest)
    with group.pushing():
        group.more_steps()
    saved(group.store, group.folder, group.step)  # the cut of the dead one is in nobody's way
    verdict = group.verdict()
    assert verdict.nothing_lost, verdict
    assert verdict.pushes_undone == 20 - kept


def test_a_shard_dies_while_it_loads(shards) -> None:
    """What it had loaded is in its journal; the whole is loaded again."""
    group = shards(2)
    with group.pushing():
        group.more_steps()
    at, checkpoint = group.step, saved(group.store, group.folder, group.step)
    with group.pushing():
        group.more_steps()
    group.begin(generation=2, step=at)
    group.arm(1, "load.block=kill:5")
    loading = threading.Thread(target=group.store.load, args=(checkpoint,))
    loading.start()
    group.restart(1)
    loading.join(120)
    assert contents(group.store, group.folder) == digests(checkpoint)
    with group.pushing():
        group.more_steps()
    verdict = group.verdict()
    assert verdict.nothing_lost, verdict
    assert verdict.pushes_undone > 0


def flip(path: Path) -> None:
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 16
    path.write_bytes(data)


DAMAGE: dict[str, Callable[[Path], object]] = {
    "is damaged": flip,
    "bytes or more, not": lambda path: path.write_bytes(path.read_bytes()[:-1]),
    "is missing": Path.unlink,
}


def test_one_damaged_file_is_refused_by_all_shards(shards) -> None:
    """Flipped, cut short, missing: a file of one shard alone, and the others load nothing either."""
    group = shards(3)
    store, checkpoints = group.store, group.folder / "checkpoints"
    with group.pushing():
        group.more_steps()
    good = saved(store, group.folder, 1)
    for number, (message, harm) in enumerate(DAMAGE.items(), 2):
        with group.pushing():
            group.more_steps()
        bad = saved(store, group.folder, number)
        with group.pushing():
            group.more_steps()
        before = contents(store, group.folder)
        harm(Path(bad) / "blocks" / f"block-{len(before) - 1:05d}.safetensors")
        with pytest.raises(CheckpointError, match=f"block-{len(before) - 1:05d}.safetensors.* {message}"):
            store.load(bad)
        assert contents(store, group.folder) == before
        newest, skipped = latest(str(checkpoints))
        assert newest == good and len(skipped) == number - 1
    at = group.step
    store.load(good)
    assert contents(store, group.folder) == digests(good) != before
    assert at == group.step


def test_two_writers_of_one_folder(shards) -> None:
    """A checkpoint of two is none, and is refused; what is loaded is that of one of them."""
    groups = [shards(2), shards(2)]
    for number, group in enumerate(groups):
        with group.connect() as store:
            group.pusher(store).run(1, 10 + number, sync=False)
    folder = groups[0].folder / "both"
    alone = [contents(group.store, group.folder) for group in groups]
    assert alone[0] != alone[1]
    groups[0].store.save(str(folder)).result()
    assert digests(str(folder)) == alone[0] and verify(str(folder)) == []
    killed_while_it_saves(groups[1], str(folder), "checkpoint.manifest")
    assert any("is damaged" in problem for problem in verify(str(folder)))
    with pytest.raises(CheckpointError, match="is damaged"):
        groups[0].store.load(str(folder))
    for _ in range(5):
        saving = [group.store.save(str(folder)) for group in groups]
        for one in saving:
            one.exception()  # who loses may find its file gone
        if not verify(str(folder)):
            assert digests(str(folder)) in alone
    assert [contents(group.store, group.folder) for group in groups] == alone


def test_any_number_of_shards_loads_what_any_other_saved(shards) -> None:
    groups = {count: shards(count) for count in (1, 2, 3, 7)}
    with groups[1].pushing():
        groups[1].more_steps()
    original = saved(groups[1].store, groups[1].folder, 1)
    for group in groups.values():
        group.store.load(original)
    for wrote, writer in groups.items():
        checkpoint = saved(writer.store, writer.folder, 2)
        for count, reader in groups.items():
            reader.store.reset()
            assert contents(reader.store, reader.folder) != digests(original)
            reader.store.load(checkpoint)
            assert contents(reader.store, reader.folder) == digests(original), (wrote, count)
