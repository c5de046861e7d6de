"""Files of a checkpoint: written whole or not at all, read only if the digest is right. Local paths or fsspec URLs."""

from __future__ import annotations

import hashlib
import json
import posixpath
from collections.abc import Mapping
from contextlib import suppress
from typing import Any

import fsspec
import numpy as np
from fsspec import AbstractFileSystem
from pydantic import BaseModel, ConfigDict, Field
from safetensors import SafetensorError
from safetensors import numpy as safetensors

MANIFEST = "manifest.json"
MAX_MANIFEST_BYTES = 256 << 20


class CheckpointError(RuntimeError):
    """A checkpoint that is missing, damaged or of another shape: one line that names the file or table."""


class FileEntry(BaseModel):
    """A file of a checkpoint: its path inside, its size, and the BLAKE2b (256 bits) of its bytes."""

    model_config = ConfigDict(extra="forbid")
    file: str = Field(pattern=r"^(blocks|dense)/[^/]+$")
    bytes: int = Field(ge=0)
    digest: str


def write_tensors(directory: str, file: str, tensors: Mapping[str, np.ndarray]) -> FileEntry:
    data = safetensors.save({name: np.ascontiguousarray(value) for name, value in tensors.items()})
    write_file(directory, file, data)
    return FileEntry(file=file, bytes=len(data), digest=digest(data))


def read_tensors(directory: str, entry: FileEntry) -> dict[str, np.ndarray]:
    data = read_verified(directory, entry)
    try:
        tensors: dict[str, np.ndarray] = safetensors.load(data)
        return tensors
    except (SafetensorError, KeyError) as error:
        raise CheckpointError(f"checkpoint {directory}: {entry.file} is not a safetensors file: {error}") from error


def read_verified(directory: str, entry: FileEntry) -> bytes:
    data = read_file(directory, entry.file, entry.bytes)
    if len(data) != entry.bytes:
        raise CheckpointError(f"checkpoint {directory}: {entry.file} has {len(data)} bytes or more, not {entry.bytes}")
    if digest(data) != entry.digest:
        raise CheckpointError(
            f"checkpoint {directory}: {entry.file} is damaged (its digest differs); use an older checkpoint"
        )
    return data


def write_signed(directory: str, file: str, content: Mapping[str, Any]) -> None:
    """Writes JSON together with its own digest."""
    write_file(directory, file, json.dumps({"digest": digest(canonical(content)), **content}, indent=1).encode())


def read_signed(directory: str, file: str) -> dict[str, Any]:
    """What `write_signed` wrote. Raises CheckpointError if it is missing or damaged."""
    data = read_file(directory, file, MAX_MANIFEST_BYTES)
    try:
        content: dict[str, Any] = json.loads(data)
        intact = content.pop("digest") == digest(canonical(content))
    except (ValueError, KeyError, AttributeError, TypeError, RecursionError):
        intact = False
    if not intact:
        raise CheckpointError(f"checkpoint {directory}: {file} is damaged; use an older checkpoint")
    return content


def canonical(content: Mapping[str, Any]) -> bytes:
    """The bytes that the digest of a JSON object is taken of."""
    return json.dumps(content, sort_keys=True, separators=(",", ":")).encode()


def write_file(directory: str, file: str, data: bytes) -> None:
    """A file appears under its name only when it is whole: renamed on a local disk, put in one piece elsewhere."""
    fs, root = fsspec.core.url_to_fs(directory)
    path = join(root, file)
    target = f"{path}.tmp" if _renames(fs) else path
    try:
        fs.makedirs(posixpath.dirname(path), exist_ok=True)
        with fs.open(target, "wb") as out:
            out.write(data)
        if target != path:
            fs.mv(target, path)
    except OSError as error:
        with suppress(OSError):  # on a full disk, what was written of it is in the way
            fs.rm(target)
        raise CheckpointError(f"checkpoint {directory}: cannot write {file}: {error.strerror or error}") from error


def read_file(directory: str, file: str, limit: int) -> bytes:
    """A file's bytes, but not more than one beyond `limit`: a stated size is not trusted."""
    fs, root = fsspec.core.url_to_fs(directory)
    try:
        with fs.open(join(root, file), "rb") as source:
            # Python allocates what `read` is asked for, so it is never asked for more than there is.
            return bytes(source.read((limit if source.size is None else min(limit, source.size)) + 1))
    except FileNotFoundError as error:
        advice = "this is not a finished checkpoint" if file == MANIFEST else "use an older checkpoint"
        raise CheckpointError(f"checkpoint {directory}: {file} is missing; {advice}") from error
    except OSError as error:
        raise CheckpointError(f"checkpoint {directory}: cannot read {file}: {error.strerror or error}") from error


def _renames(fs: AbstractFileSystem) -> bool:
    return "file" in ((fs.protocol,) if isinstance(fs.protocol, str) else fs.protocol)


def join(directory: str, name: str) -> str:
    return f"{directory.rstrip('/')}/{name}"


def digest(data: bytes) -> str:
    return hashlib.blake2b(data, digest_size=32).hexdigest()
