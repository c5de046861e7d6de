"""A checkpoint on disk or in an object store: one file per block, the dense part, and a manifest that is written last.

    DIRECTORY/blocks/block-00017.safetensors  "<table>/weight", "<table>/<state name>" of that block's rows; its ledger
    DIRECTORY/dense/dense.safetensors
    DIRECTORY/manifest.json                   what there is, with a digest of every file and of itself

Without a manifest there is no checkpoint: whatever a killed writer leaves behind is never read. A checkpoint does not
know about shards: any number of them loads what any other number wrote, table by table, by name.
"""

from __future__ import annotations

import json
import posixpath
from collections.abc import Mapping, Sequence
from typing import Any

import fsspec
import numpy as np
from pydantic import BaseModel, ConfigDict, ValidationError

from . import failpoints
from .files import (
    MANIFEST,
    CheckpointError,
    FileEntry,
    join,
    read_signed,
    read_tensors,
    read_verified,
    write_signed,
    write_tensors,
)
from .tables import Layout, TableSpec

__all__ = [
    "BlockEntry",
    "CheckpointError",
    "FileEntry",
    "Manifest",
    "commit",
    "latest",
    "read_block",
    "read_dense",
    "read_manifest",
    "verify",
    "write_block",
    "write_dense",
]

FORMAT = 1


class BlockEntry(FileEntry):
    """The file of one block."""

    block: int


class Manifest(BaseModel):
    """What a checkpoint holds. `state` is the caller's own JSON: cursor, metrics, ..."""

    model_config = ConfigDict(extra="forbid")
    format: int = FORMAT
    step: int
    blocks: int
    seed: int
    tables: list[TableSpec]
    files: list[BlockEntry]
    dense: FileEntry
    state: dict[str, Any]

    def table(self, name: str) -> TableSpec | None:
        return next((spec for spec in self.tables if spec.name == name), None)


def write_block(directory: str, block: int, tensors: Mapping[str, np.ndarray]) -> BlockEntry:
    """Writes the tensors of one block (`snapshot.take`)."""
    failpoints.hit("checkpoint.block")
    entry = write_tensors(directory, f"blocks/block-{block:05d}.safetensors", tensors)
    return BlockEntry(block=block, **entry.model_dump())


def read_block(directory: str, entry: BlockEntry) -> dict[str, np.ndarray]:
    """The tensors of one block; the digest is verified before anything of them is used.

    Raises:
        CheckpointError: missing or damaged.
    """
    return read_tensors(directory, entry)


def write_dense(directory: str, tensors: Mapping[str, np.ndarray]) -> FileEntry:
    """Writes the dense part: any named arrays."""
    failpoints.hit("checkpoint.dense")
    return write_tensors(directory, "dense/dense.safetensors", tensors)


def read_dense(directory: str, manifest: Manifest) -> dict[str, np.ndarray]:
    """The dense part. Raises CheckpointError if it is missing or damaged."""
    return read_tensors(directory, manifest.dense)


def commit(
    directory: str,
    layout: Layout,
    step: int,
    blocks: Sequence[BlockEntry | Mapping[str, Any]],
    dense: FileEntry,
    state: Mapping[str, Any],
) -> dict[str, Any]:
    """Writes the manifest, which makes the checkpoint one; returns it.

    Raises:
        CheckpointError: not every block was written exactly once.
    """
    entries = sorted((BlockEntry.model_validate(entry) for entry in blocks), key=lambda entry: entry.block)
    if [entry.block for entry in entries] != list(range(layout.blocks)):
        absent = sorted(set(range(layout.blocks)) - {entry.block for entry in entries})
        what = f"block {absent[0]} of {layout.blocks} was not written" if absent else "a block was written twice"
        raise CheckpointError(f"checkpoint {directory}: {what}, so it is not committed")
    manifest = Manifest(
        step=step,
        blocks=layout.blocks,
        seed=layout.seed,
        tables=list(layout.tables),
        files=entries,
        dense=dense,
        state=dict(state),
    )
    # The caller's state goes through json itself: pydantic would write a NaN as null.
    described = manifest.model_dump(mode="json", exclude={"state"})
    content: dict[str, Any] = json.loads(json.dumps({**described, "state": manifest.state}))
    failpoints.hit("checkpoint.manifest")
    write_signed(directory, MANIFEST, content)
    failpoints.hit("checkpoint.committed")
    return content


def read_manifest(directory: str) -> Manifest:
    """The manifest of a checkpoint.

    Raises:
        CheckpointError: there is none, it is damaged, or a newer version of the format.
    """
    content = read_signed(directory, MANIFEST)
    if content.get("format") != FORMAT:
        raise CheckpointError(
            f"checkpoint {directory} has format {content.get('format')}; this version reads format {FORMAT}"
        )
    try:
        manifest = Manifest.model_validate(content)
    except ValidationError as error:
        where = ".".join(map(str, error.errors()[0]["loc"]))
        raise CheckpointError(f"checkpoint {directory}: {MANIFEST} has no valid {where}") from error
    if [entry.block for entry in manifest.files] != list(range(len(manifest.files))):
        raise CheckpointError(f"checkpoint {directory}: {MANIFEST} does not list every block once")
    if len(manifest.files) != manifest.blocks:
        raise CheckpointError(
            f"checkpoint {directory}: {MANIFEST} lists {len(manifest.files)} of {manifest.blocks} blocks"
        )
    return manifest


def verify(directory: str) -> list[str]:
    """Reads every file and compares its digest; what is wrong, one line each. Empty: the checkpoint is whole."""
    try:
        manifest = read_manifest(directory)
    except CheckpointError as error:
        return [str(error)]
    problems = []
    for entry in (*manifest.files, manifest.dense):
        try:
            read_verified(directory, entry)
        except CheckpointError as error:
            problems.append(str(error))
    return problems


def latest(directory: str) -> tuple[str | None, list[str]]:
    """The newest checkpoint (`step-...`) below `directory` that verifies, and what was skipped on the way, and why."""
    fs, path = fsspec.core.url_to_fs(directory)
    if not fs.isdir(path):
        return None, []
    names = (posixpath.basename(str(found).rstrip("/")) for found in fs.ls(path, detail=False))
    skipped: list[str] = []
    for name in sorted((name for name in names if name.startswith("step-")), reverse=True):
        candidate = join(directory, name)
        problems = verify(candidate)
        if not problems:
            return candidate, skipped
        more = f" (and {len(problems) - 1} more)" if len(problems) > 1 else ""
        skipped.append(f"{problems[0]}{more}")
    return None, skipped
