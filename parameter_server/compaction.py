"""A journal that stays short: past a size the shard writes itself down whole, and what came before is deleted.

The cut and the new segment are one moment: the shard's lock is held for both. From then on either the older snapshot
with every segment since, or the new one with its own, is the shard; at no moment neither.
"""

from __future__ import annotations

import shutil
import threading

import numpy as np
from pydantic import BaseModel, ConfigDict, ValidationError

from . import failpoints
from .blocks import BlockMap
from .checkpoint import BlockEntry, write_block
from .files import MANIFEST, CheckpointError, read_signed, read_tensors, write_signed
from .journal import FileJournal
from .records import JournalError
from .shard import Shard
from .snapshot import Snapshot
from .store import BusyError, StoreError
from .tables import TableError, TableSpec

FORMAT = 1


class LocalManifest(BaseModel):
    """A shard at one moment. first_record: the number of the first record that is not in it."""

    model_config = ConfigDict(extra="forbid")
    format: int = FORMAT
    shard: int
    blocks: int
    seed: int
    first_record: int
    slabs: list[list[TableSpec]]
    epoch: int
    owners: list[int]
    addresses: list[str]
    generation: int | None
    workers: int
    done: list[int]
    early: list[list[int]]
    files: list[BlockEntry]


class Compaction:
    """Writes a local snapshot, on a thread of its own, whenever the segments since the last one exceed `journal_bytes`.

    And the size of that snapshot: so at most as much is written again as was written in the first place.
    """

    def __init__(self, shard: Shard, journal: FileJournal, journal_bytes: int) -> None:
        self._shard = shard
        self._journal = journal
        self._journal_bytes = journal_bytes
        self._due = journal_bytes
        self._running = False
        journal.on_growth = self._grown

    def _grown(self, size: int) -> None:
        """Called with the shard's lock held."""
        if size > self._due and not self._running and not self._shard.moving:
            self._running = True
            threading.Thread(target=self._run, name=f"compaction-{self._shard.number}", daemon=True).start()

    def _run(self) -> None:
        try:
            self._due = max(self._journal_bytes, self.write())
        except BusyError:
            pass  # the next record asks again
        except (StoreError, TableError, CheckpointError, OSError, KeyError):
            self._journal.snapshot_failures += 1
            self._due = self._journal.size + self._journal_bytes  # a disk that is full is not asked at every push
        finally:
            self._running = False

    def write(self) -> int:
        """Writes a snapshot and deletes what it replaces; returns its bytes.

        Raises:
            JournalError, CheckpointError: it cannot be written. KeyError: a block that it needed was overwritten.
            BusyError: blocks are on their way. TableError: no address space for a cut.
        """
        shard, journal = self._shard, self._journal
        with shard.lock:
            if shard.moving:  # what has arrived of a block stands in the journal alone
                raise BusyError(f"shard {shard.number} is changing blocks with other shards")
            number, first = journal.roll()
            content = _describe(shard, first)
            cut = shard.mark_local()
        folder = str(journal.snapshot_folder(number))
        try:
            entries = _write_blocks(cut, folder)
            failpoints.hit("snapshot.manifest")
            files = [entry.model_dump() for entry in entries]
            write_signed(folder, MANIFEST, {**content.model_dump(mode="json"), "files": files})
        except BaseException:
            shutil.rmtree(folder, ignore_errors=True)
            raise
        failpoints.hit("snapshot.clean")
        journal.clean(number)
        journal.snapshots += 1
        return sum(entry.bytes for entry in entries)


def _describe(shard: Shard, first: int) -> LocalManifest:
    return LocalManifest(
        shard=shard.number,
        blocks=shard.layout.blocks,
        seed=shard.layout.seed,
        first_record=first,
        slabs=[list(slab.tables) for slab in shard.layout.slabs],
        epoch=shard.block_map.epoch,
        owners=shard.block_map.owners.tolist(),
        addresses=list(shard.block_map.addresses),
        **shard.clocks.describe(),
        files=[],
    )


def _write_blocks(cut: Snapshot, folder: str) -> list[BlockEntry]:
    entries = []
    with cut:
        failpoints.hit("journal.segment")
        for block in cut.blocks:
            failpoints.hit("snapshot.block")
            entries.append(write_block(folder, block, cut.take(block)))
    return entries


def read_snapshot(shard: Shard, journal: FileJournal, number: int) -> int:
    """Makes an empty shard what local snapshot `number` holds; returns the number of the first record after it.

    Raises:
        JournalError: it is damaged, or that of another shard or store.
    """
    folder = str(journal.snapshot_folder(number))
    try:
        content = read_signed(folder, MANIFEST)
        manifest = LocalManifest.model_validate(content)
        _check(shard, folder, manifest)
        owners = np.array(manifest.owners, np.uint16)
        shard.adopt(manifest.slabs, BlockMap(manifest.epoch, owners, tuple(manifest.addresses)))
        shard.clocks.restore(manifest.generation, manifest.workers, manifest.done, manifest.early)
        for entry in manifest.files:
            shard.load_block(entry.block, read_tensors(folder, entry))
    except (CheckpointError, StoreError, ValidationError, ValueError, KeyError, OverflowError, IndexError) as error:
        raise JournalError(f"local snapshot {folder} cannot be used: {error}") from error
    return manifest.first_record


def _check(shard: Shard, folder: str, manifest: LocalManifest) -> None:
    stated = (manifest.format, manifest.shard, manifest.blocks, manifest.seed)
    expected = (FORMAT, shard.number, shard.layout.blocks, shard.layout.seed)
    if stated != expected or len(manifest.owners) != manifest.blocks:
        raise JournalError(
            f"local snapshot {folder} has (format, shard, blocks, seed) {stated}, where {expected} was expected"
        )
