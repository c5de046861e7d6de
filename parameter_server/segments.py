"""The file format of a journal: a header, and records one after another. See docs/durability.md.

    header  56 bytes: magic, format, shard, blocks, seed, number of the segment, number of its first record, checksum
    record  head: magic, kind, pieces, number, header bytes, payload bytes; (bytes, checksum) of each piece; checksum of
            all of that
            header, filled up to a multiple of 8; payload: the other pieces one after another, filled up likewise

Integers are little-endian. Every size is checked against the file before anything is read by it, and nothing is copied:
what is read are views of the mapped file.
"""

from __future__ import annotations

import itertools
import mmap
import struct
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from .jit import jit
from .placement_kernels import mix64
from .records import JournalError, Kind
from .validation import readable

FORMAT = 1
_MAGIC, _RECORD = b"EMBERJNL", b"\xf1EmR"
_HEADER, _HEAD, _PIECE, _SUM = (
    struct.Struct("<8sIIIIQQQ"),
    struct.Struct("<4sIIIQQQ"),
    struct.Struct("<QQ"),
    struct.Struct("<Q"),
)
HEADER_BYTES = _HEADER.size + _SUM.size
_ALIGN = 8

U64 = np.uint64


@jit
def _mix_words(words: np.ndarray, tail: np.ndarray) -> np.uint64:
    """Four independent lanes, so that the loop runs at the speed of memory; every word changes its lane for good."""
    a, b, c, d = U64(1), U64(2), U64(3), U64(4)
    factor, shift = U64(0x9FB21C651E98DF25), U64(29)
    whole = len(words) - len(words) % 4
    for i in range(0, whole, 4):
        a = (a ^ words[i]) * factor
        b = (b ^ words[i + 1]) * factor
        c = (c ^ words[i + 2]) * factor
        d = (d ^ words[i + 3]) * factor
        a ^= a >> shift
        b ^= b >> shift
        c ^= c >> shift
        d ^= d >> shift
    total = mix64(mix64(mix64(mix64(a) ^ b) ^ c) ^ d)
    for i in range(whole, len(words)):
        total = mix64(total ^ words[i])
    for i in range(len(tail)):
        total = mix64(total ^ U64(tail[i]))
    return mix64(total ^ (U64(len(words)) << U64(3)) ^ U64(len(tail)))


def checksum(data: bytes | np.ndarray) -> int:
    """64 bits that change with any bit. A guard against damage, not against people."""
    raw = np.frombuffer(data, np.uint8) if isinstance(data, bytes) else data.reshape(-1).view(np.uint8)
    whole = len(raw) & -8
    return int(_mix_words(readable(raw[:whole].view(np.uint64)), readable(raw[whole:])))


@dataclass(frozen=True, slots=True)
class Identity:
    """Whose journal a segment belongs to, and where in it it stands: its number and that of its first record."""

    shard: int
    blocks: int
    seed: int
    segment: int = 1
    first: int = 1


@dataclass(frozen=True, slots=True)
class Record:
    """One record; the payload (uint8) views the file. `end` is the offset behind it."""

    kind: Kind
    number: int
    header: bytes
    payload: np.ndarray
    end: int


def encode_header(identity: Identity) -> bytes:
    """The first bytes of a segment."""
    one = identity
    packed = _HEADER.pack(_MAGIC, FORMAT, one.shard, one.blocks, 0, one.seed % 2**64, one.segment, one.first)
    return packed + _SUM.pack(checksum(packed))


def encode_record(kind: Kind, number: int, header: bytes, arrays: Sequence[np.ndarray]) -> list[memoryview]:
    """The bytes of a record, piece by piece in the order in which they are written; arrays are not copied."""
    pieces = [(len(header), checksum(header)), *((array.nbytes, checksum(array)) for array in arrays)]
    payload = sum(size for size, _ in pieces[1:])
    head = b"".join(
        (
            _HEAD.pack(_RECORD, kind, len(pieces), 0, number, len(header), payload),
            *(_PIECE.pack(*piece) for piece in pieces),
        )
    )
    begin = head + _SUM.pack(checksum(head)) + header + bytes(-len(header) % _ALIGN)
    views = (array.reshape(-1).view(np.uint8).data for array in arrays if array.nbytes)
    return [memoryview(begin), *views, memoryview(bytes(-payload % _ALIGN))]


class Segment:
    """One file of a journal, mapped for reading.

    Raises:
        JournalError: damage, another format, or the journal of another shard or store.
    """

    def __init__(self, path: Path, identity: Identity) -> None:
        self.path = path
        self.size = path.stat().st_size
        self.end = 0  # behind the last whole record seen
        self.next = identity.first
        if self.size < HEADER_BYTES:  # begun, and ended with its process: nothing was ever written to it
            return
        with path.open("rb") as file:
            self._data = np.frombuffer(mmap.mmap(file.fileno(), 0, prot=mmap.PROT_READ), np.uint8)
        self._check(identity)
        self.end = HEADER_BYTES

    def _check(self, expected: Identity) -> None:
        packed = self._data[: _HEADER.size].tobytes()
        magic, form, shard, blocks, _, seed, segment, first = _HEADER.unpack(packed)
        if magic != _MAGIC or _SUM.unpack(self._data[_HEADER.size : HEADER_BYTES].tobytes())[0] != checksum(packed):
            raise JournalError(f"journal {self.path}: damaged at byte 0: this is not the header of a journal")
        if form != FORMAT:
            raise JournalError(f"journal {self.path} has format {form}; this version reads format {FORMAT}")
        if (shard, blocks, seed) != (expected.shard, expected.blocks, expected.seed % 2**64):
            raise JournalError(
                f"journal {self.path} is that of shard {shard} of a store with {blocks} blocks and seed {seed}, not of "
                f"shard {expected.shard} with {expected.blocks} blocks and seed {expected.seed}"
            )
        if (segment, first) != (expected.segment, expected.first):
            raise JournalError(
                f"journal {self.path}: segment {segment} begins with record {first}, but segment {expected.segment} "
                f"with record {expected.first} was expected: a part of the journal is missing"
            )

    def records(self, *, last: bool) -> Iterator[Record]:
        """The whole records. What is behind them is torn and left alone in the `last` segment, and an error elsewhere.

        Raises:
            JournalError: damage that is followed by records: what was acknowledged would be lost.
        """
        if self.size < HEADER_BYTES and not last:
            raise self._damaged("it has no header, and another segment follows")
        while HEADER_BYTES <= self.end < self.size:
            head = self._head(self.end)
            if head is not None and head[1] != self.next:
                raise self._damaged(f"record {head[1]} stands where record {self.next} should")
            record = None if head is None else self._body(self.end, *head)
            if record is None:
                if not last:
                    raise self._damaged("a record is not whole, and another segment follows")
                if self._another_behind():
                    raise self._damaged("a record is not whole, and others follow")
                return
            yield record
            self.end, self.next = record.end, self.next + 1

    def _damaged(self, what: str) -> JournalError:
        return JournalError(
            f"journal {self.path}: damaged at byte {self.end}: {what}; delete the journal and resume from a checkpoint"
        )

    def _head(self, at: int) -> tuple[int, int, int, int, np.ndarray] | None:
        """(kind, number, header bytes, payload bytes, pieces uint64 [n, 2]); None unless it is whole and right."""
        table = at + _HEAD.size
        if table + _SUM.size > self.size:
            return None
        magic, kind, pieces, _, number, header, payload = _HEAD.unpack(self._data[at:table].tobytes())
        end = table + pieces * _PIECE.size
        if magic != _RECORD or end + _SUM.size > self.size:
            return None
        if _SUM.unpack(self._data[end : end + _SUM.size].tobytes())[0] != checksum(self._data[at:end]):
            return None
        return kind, number, header, payload, self._data[table:end].view(np.uint64).reshape(-1, 2)

    def _body(self, at: int, kind: int, number: int, header: int, payload: int, pieces: np.ndarray) -> Record | None:
        begin = at + _HEAD.size + pieces.nbytes + _SUM.size
        middle = begin + header + -header % _ALIGN
        end = middle + payload + -payload % _ALIGN
        sizes = [int(size) for size in pieces[:, 0]]
        if end > self.size or sizes[:1] != [header] or sum(sizes[1:]) != payload:
            return None
        starts = [begin, *(middle + before for before in itertools.accumulate(sizes[1:-1], initial=0))][: len(sizes)]
        for start, size, expected in zip(starts, sizes, pieces[:, 1].tolist(), strict=True):
            if checksum(self._data[start : start + size]) != expected:
                return None
        try:
            known = Kind(kind)
        except ValueError:
            raise JournalError(
                f"journal {self.path}: record {number} is of kind {kind}, which this version does not know"
            ) from None
        data = self._data
        return Record(known, number, data[begin : begin + header].tobytes(), data[middle : middle + payload], end)

    def _another_behind(self) -> bool:
        """Whether any record begins behind the one that is not whole."""
        first = self.end + _ALIGN
        if first >= self.size:
            return False
        words = self._data[first : first + (self.size - first & -_ALIGN)].view(np.uint32)[::2]
        places = np.flatnonzero(words == np.frombuffer(_RECORD, np.uint32)[0])
        return any(self._head(first + _ALIGN * place) is not None for place in places.tolist())
