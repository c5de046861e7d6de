"""Between a shard and a checkpoint: writing a cut, and loading tables by name into whatever layout the shard has."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np

from . import failpoints
from .checkpoint import BlockEntry, CheckpointError, Manifest, read_block, read_manifest, write_block
from .contents import Contents
from .kernels import locate, rows_of_share
from .memory import has_state
from .optimizers import state_columns
from .snapshot import LEDGER, Snapshot
from .tables import TableSpec


def write_blocks(snapshot: Snapshot, directory: str) -> list[BlockEntry]:
    """Writes every block of a cut and closes it, also when a file cannot be written (CheckpointError)."""
    with snapshot:
        return [write_block(directory, block, snapshot.take(block)) for block in snapshot.blocks]


def check_load(shard: Contents, directory: str, tables: Mapping[str, str]) -> None:
    """Whether `load_blocks` with the same arguments would succeed: reads and verifies every file it needs.

    Raises:
        CheckpointError: a table is missing or of another shape, another number of blocks, or a damaged file.
    """
    manifest = read_manifest(directory)
    _check_tables(shard, directory, manifest, tables)
    for entry in manifest.files:
        if _is_needed(shard, entry, tables):
            read_block(directory, entry)


def load_blocks(shard: Contents, directory: str, tables: Mapping[str, str]) -> dict[str, list[str]]:
    """Overwrites this shard's part of `tables` (table of the store -> table of the checkpoint).

    The ledger goes back together with the tables if all of them do. Optimizer state of another kind is not taken over:
    it starts anew, and the tables it concerns are reported.

    Returns:
        {"tables": loaded, "without_state": those whose optimizer state starts anew}.

    Raises:
        CheckpointError: see `check_load`, which comes first so that nothing changes when something is wrong.
    """
    manifest = read_manifest(directory)
    _check_tables(shard, directory, manifest, tables)
    whole = all(tables.get(spec.name) == spec.name for spec in shard.layout.tables)
    kept = [name for name, source in tables.items() if name == source]
    moved = {name: source for name, source in tables.items() if name != source}
    owned = shard.block_map.owners == shard.number
    without_state: set[str] = set()
    for entry in manifest.files:
        if not _is_needed(shard, entry, tables):
            continue
        tensors = read_block(directory, entry)
        failpoints.hit("load.block")
        if owned[entry.block] and kept:
            own = {key: tensors[key] for name in kept for key in _keys(shard, name, name) if key in tensors}
            if whole:
                own |= {key: value for key, value in tensors.items() if key.startswith(LEDGER)}
            without_state.update(shard.load_block(entry.block, own))
        for name, source in moved.items():
            if not _load_renamed(shard, entry.block, tensors, name, source):
                without_state.add(name)
    return {"tables": sorted(tables), "without_state": sorted(without_state)}


def _check_tables(shard: Contents, directory: str, manifest: Manifest, tables: Mapping[str, str]) -> None:
    if manifest.blocks != shard.layout.blocks:
        raise CheckpointError(
            f"checkpoint {directory} has {manifest.blocks} blocks and this store {shard.layout.blocks}: "
            f"open the store with store.blocks={manifest.blocks}"
        )
    for name, source in tables.items():
        here, there = shard.layout.find(name), manifest.table(source)
        if here is None:
            raise CheckpointError(f"checkpoint {directory}: this store has no table {name!r} to load {source!r} into")
        if there is None:
            known = ", ".join(repr(spec.name) for spec in manifest.tables[:8])
            raise CheckpointError(f"checkpoint {directory} has no table {source!r}: it holds {known}")
        if (here.rows, here.width, here.dtype) != (there.rows, there.width, there.dtype):
            raise CheckpointError(
                f"checkpoint {directory}: table {source!r} is {there.rows} x {there.width} and table {name!r} of this "
                f"store {here.rows} x {here.width}: load it into one of its own shape"
            )


def _is_needed(shard: Contents, entry: BlockEntry, tables: Mapping[str, str]) -> bool:
    """A row's block follows from its table's name: under the same name it stays, under another it may come from any."""
    if any(name != source for name, source in tables.items()):
        return True
    return bool(shard.block_map.owners[entry.block] == shard.number)


def _keys(shard: Contents, name: str, source: str) -> dict[str, str]:
    """Tensor name in a checkpoint -> tensor name here."""
    spec = _spec(shard, name)
    parts = ("weight", *state_columns(spec.optimizer, spec.width))
    return {f"{source}/{part}": f"{name}/{part}" for part in parts}


def _spec(shard: Contents, name: str) -> TableSpec:
    ref = shard.layout.ref(name)
    return shard.layout.slabs[ref.slab].tables[ref.table]


def _load_renamed(shard: Contents, block: int, tensors: Mapping[str, np.ndarray], name: str, source: str) -> bool:
    """Puts one block's rows of table `source` where they lie under the name `name`; False if their state was absent."""
    ref, spec = shard.layout.ref(name), _spec(shard, name)
    slab = shard.layout.slabs[ref.slab]
    own = {here: tensors[there] for there, here in _keys(shard, name, source).items() if there in tensors}
    weights = own[f"{name}/weight"]
    rows = np.empty(len(weights), np.int64)
    old_key = TableSpec(name=source, rows=spec.rows, width=spec.width).key
    rows_of_share(block, slab.blocks, spec.rows, np.uint64(old_key), rows)
    identity = np.arange(slab.blocks, dtype=np.uint16)
    found, inverse = locate(slab, np.array([ref.table], np.int32), np.array([0, len(rows)]), rows, identity)
    complete = has_state(spec, own)
    state = None
    if complete and slab.state_width:
        state = np.concatenate([own[f"{name}/{part}"] for part in state_columns(spec.optimizer, spec.width)], axis=1)
    shard.overwrite_rows(slab.id, found.index[inverse], weights, state)
    return complete
