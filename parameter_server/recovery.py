"""A shard from its journal: the newest local snapshot, and every record since, applied again in their order."""

from __future__ import annotations

import time
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np

from . import compaction
from .blocks import BlockMap
from .journal import FileJournal
from .records import JournalError, Kind, decode_pushes, decode_tensors
from .segments import Identity, Record
from .shard import Shard
from .store import DEFAULT_JOURNAL_BYTES
from .tables import Layout, TableSpec


@dataclass(frozen=True)
class Recovery:
    """What a shard came back from. snapshot: the folder of the local snapshot, if there was one."""

    records: int
    bytes: int
    torn_bytes: int
    seconds: float
    snapshot: str | None

    def as_dict(self) -> dict[str, Any]:
        return asdict(self)


def open_shard(
    number: int,
    blocks: int,
    seed: int,
    *,
    journal: str | None = None,
    journal_bytes: int = DEFAULT_JOURNAL_BYTES,
    memory_bytes: int | None = None,
) -> tuple[Shard, Recovery | None]:
    """A shard that keeps a journal in the folder `journal`, as that journal left it; empty where there is none yet.

    Without a folder nothing is written and nothing comes back. Recovery may be interrupted and begun again.

    Raises:
        JournalError: another process holds the journal, it is damaged, or that of another shard or store.
    """
    shard = Shard(number, Layout(blocks, seed), memory_bytes)
    if journal is None:
        return shard, None
    began = time.monotonic()
    files = FileJournal(journal, Identity(number, blocks, seed))
    try:
        snapshot = files.snapshot()
        first = compaction.read_snapshot(shard, files, snapshot) if snapshot else 1
        records = 0
        for record in files.replay(snapshot, first):
            _repeat(shard, record)
            records += 1
        files.clean(snapshot)
    except BaseException:
        files.close()
        raise
    shard.journal = files
    compaction.Compaction(shard, files, journal_bytes)
    if records == 0 and snapshot == 0:
        return shard, None
    folder = str(files.snapshot_folder(snapshot)) if snapshot else None
    return shard, Recovery(records, files.size, files.torn_bytes, time.monotonic() - began, folder)


def _repeat(shard: Shard, record: Record) -> None:
    try:
        _apply(shard, record)
    except Exception as error:
        raise JournalError(
            f"journal of shard {shard.number}: record {record.number} cannot be repeated: {error}"
        ) from error


def _apply(shard: Shard, record: Record) -> None:
    if record.kind is Kind.PUSHES:
        shard.repeat(decode_pushes(record.header, record.payload, [slab.width for slab in shard.layout.slabs]))
        return
    content, tensors = decode_tensors(record.header, record.payload)
    if record.kind is Kind.TABLES:
        shard.create_tables([TableSpec.model_validate(table) for table in content["tables"]])
    elif record.kind is Kind.BLOCK_MAP:
        owners = np.array(content["owners"], np.uint16)
        shard.set_block_map(BlockMap(content["epoch"], owners, tuple(content["addresses"])))
    elif record.kind is Kind.BEGIN:
        shard.begin(**content)
    elif record.kind is Kind.BLOCK:
        shard.load_block(content["block"], tensors)
    elif record.kind is Kind.ROWS:
        shard.overwrite_rows(content["slab"], tensors["index"], tensors["weights"], tensors.get("state"))
    elif record.kind is Kind.INCOMING:
        shard.receive_block(content["block"], content["move"], tensors)
    elif record.kind is Kind.SEAL:
        shard.seal(content["block"])
    elif record.kind is Kind.JOIN:
        shard.join(**content)
    elif record.kind is Kind.CANCEL_MOVES:
        shard.cancel_moves()
    else:
        shard.reset()
