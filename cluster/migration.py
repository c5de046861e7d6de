"""Moving blocks between shards: which ones, and what is asked of whom in which order. Pure; no I/O.

`Migration` moves one group of blocks. Whoever drives it performs `calls()`, all of them side by side, and tells it what
came of them; the next `calls()` follow from that. Until the new block map is committed everything can be undone, from
then on everything is repeated until it succeeds. Of a commit that failed nobody knows whether it was written: the old
map is written once more before anything is undone.
"""

from __future__ import annotations

import secrets
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from enum import Enum
from typing import Any

import numpy as np

from ..parameter_server.blocks import BlockMap

SETTLE_SECONDS = 20.0  # for the workers to finish the steps that they have begun
HOLD_SECONDS = 60.0  # after which shards answer again by themselves


@dataclass(frozen=True)
class Move:
    """One block's way."""

    block: int
    source: int
    target: int


@dataclass(frozen=True)
class Call:
    """One administrative call to a shard."""

    shard: int
    method: str
    arguments: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class Commit:
    """To be written where it survives the coordinator, before anybody is told of it."""

    block_map: BlockMap


class Phase(Enum):
    """What `calls()` asks for.

    Before COMMIT a failure leads to CANCEL, at COMMIT to REVERT and then CANCEL; after each of these, to the same calls
    again.
    """

    COPY = "copy"
    CATCH_UP = "catch up"
    CLOSE = "close gates"
    SETTLE = "settle"
    FINISH = "seal and finish"
    JOIN = "join"
    COMMIT = "commit"
    ANNOUNCE_TO_TARGETS = "announce to targets"
    ANNOUNCE = "announce"
    REVERT = "write the old map"
    CANCEL = "cancel"
    DONE = "done"
    CANCELLED = "cancelled"


_CANCEL_ORDER: list[Phase] = [Phase.REVERT, Phase.CANCEL, Phase.CANCELLED]
_ORDER: list[Phase] = [p for p in Phase if p not in _CANCEL_ORDER]


def plan_moves(owners: np.ndarray, shards: int, load: np.ndarray) -> list[Move]:
    """The fewest moves after which `shards` shards own equally many blocks (but for one) and bear about the same load.

    owners: uint16 [blocks]; load: float [blocks], bytes and traffic of each block on any scale. All blocks hold the
    same share of every table, so equal numbers are equal bytes; which ones move follows from their load.
    """
    blocks = len(owners)
    had = np.bincount(owners, minlength=shards)
    quota = _quotas(had[:shards], blocks)
    staying = [np.flatnonzero(owners == shard) for shard in range(shards)]
    share = float(load.sum()) / shards
    moves: list[Move] = []
    moving: list[tuple[int, int]] = [(int(b), int(owners[b])) for b in np.flatnonzero(owners >= shards)]
    for shard in range(shards):
        kept, left = _keep(staying[shard], int(quota[shard]), load, share)
        staying[shard] = kept
        moving += [(int(block), shard) for block in left]
    borne = np.array([load[kept].sum() for kept in staying])
    room = quota - np.array([len(kept) for kept in staying])
    for block, source in sorted(moving, key=lambda move: (-load[move[0]], move[0])):
        target = int(np.where(room > 0, borne, np.inf).argmin())  # the heaviest first, to whoever bears least
        moves.append(Move(block, source, target))
        borne[target] += load[block]
        room[target] -= 1
    return sorted(moves, key=lambda move: move.block)


def _quotas(had: np.ndarray, blocks: int) -> np.ndarray:
    """How many blocks each shard is to have; those who have more keep the odd ones."""
    quota = np.full(len(had), blocks // len(had))
    quota[np.argsort(-had, kind="stable")[: blocks % len(had)]] += 1
    return quota


def _keep(blocks: np.ndarray, quota: int, load: np.ndarray, share: float) -> tuple[np.ndarray, np.ndarray]:
    """Divides a shard's blocks into `quota` that stay, of about the given load, and the others."""
    if len(blocks) <= quota:
        return blocks, blocks[:0]
    ordered = blocks[np.argsort(load[blocks], kind="stable")]
    sums = np.concatenate([[0.0], np.cumsum(load[ordered])])
    windows = sums[quota:] - sums[: len(sums) - quota]
    first = int(np.abs(windows - share).argmin())
    stays = np.zeros(len(ordered), np.bool_)
    stays[first : first + quota] = True
    return ordered[stays], ordered[~stays]


class Migration:
    """One group of moves, from the first copy to the new block map in force.

    block_map: in force now. addresses: of all shards after the move. Without moves: more of them, or fewer (those that
    leave own no block any more); shards that own no block hear how far the workers are, whether they join now or missed
    it when they did.
    """

    def __init__(self, block_map: BlockMap, addresses: Sequence[str], moves: Sequence[Move]) -> None:
        owners = block_map.owners.copy()
        for move in moves:
            owners[move.block] = move.target
        if int(owners.max()) >= len(addresses):
            raise ValueError(f"{len(addresses)} shards are to stay, and shard {owners.max()} owns blocks")
        self.before = block_map
        self.after = BlockMap(block_map.epoch + 1, owners, tuple(addresses))
        self.moves = list(moves)
        self.move = secrets.token_hex(8)  # so that a call that was under way for long ends no later move
        self.phase = Phase.COPY
        self.error: Exception | None = None
        self.copied_bytes = 0
        self.on_hold: Callable[[], None] = lambda: None  # called when workers begin to be kept waiting
        self._everybody = range(max(len(block_map.addresses), len(addresses)))
        self._serving = sorted(set(block_map.owners.tolist()))
        self._joining = [] if moves else sorted(set(range(len(addresses))) - set(self._serving))
        self._gate: dict[str, int] = {}
        self._clocks: dict[str, Any] = {}

    @property
    def ended(self) -> bool:
        return self.phase in (Phase.DONE, Phase.CANCELLED)

    @property
    def committed(self) -> bool:
        return self.phase in _ORDER[_ORDER.index(Phase.COMMIT) + 1 :]

    @property
    def cancelling(self) -> bool:
        return self.phase in _CANCEL_ORDER

    def calls(self) -> list[Call | Commit]:
        """What has to be done now, in any order or side by side."""
        match self.phase:
            case Phase.COPY:
                return self._fetch(changes=False)
            case Phase.CATCH_UP:
                return self._fetch(changes=True)
            case Phase.FINISH:
                return self._fetch(changes=True, seal=True)
            case Phase.CLOSE:
                self.on_hold()
                return self._all(self._serving, "close_gate", after=0, lag=0, seconds=HOLD_SECONDS)
            case Phase.SETTLE:
                return self._all(self._serving, "settle", **self._gate, hold=HOLD_SECONDS, seconds=SETTLE_SECONDS)
            case Phase.COMMIT:
                return [Commit(self.after)]
            case Phase.JOIN:
                if self._clocks["generation"] is None:
                    return []
                where = {name: self._clocks[name] for name in ("generation", "workers")}
                return self._all(self._joining, "join", **where, step=self._clocks["done"][0])
            case Phase.ANNOUNCE_TO_TARGETS:
                return self._all(sorted({move.target for move in self.moves}), "set_block_map", **described(self.after))
            case Phase.ANNOUNCE:
                return self._all(self._everybody, "set_block_map", **described(self.after))
            case Phase.REVERT:
                return [Commit(self.before)]
            case Phase.CANCEL:
                return self._all(self._everybody, "cancel_moves", epoch=self.before.epoch, move=self.move)
        return []

    def succeeded(self, results: Sequence[Any]) -> None:
        """All calls came back; their results in the order of `calls()`."""
        match self.phase:
            case Phase.COPY | Phase.CATCH_UP | Phase.FINISH:
                self.copied_bytes += sum(results)
            case Phase.CLOSE:
                self._gate = {name: max(result[name] for result in results) for name in ("step", "lag")}
            case Phase.SETTLE:
                if (problem := self._unsettled(results)) is not None:
                    self.failed(problem)
                    return
                self._clocks = results[0]
        order = _CANCEL_ORDER if self.phase in _CANCEL_ORDER else _ORDER
        self.phase = order[order.index(self.phase) + 1]

    def _unsettled(self, results: Sequence[Any]) -> Exception | None:
        late = [str(shard) for shard, result in zip(self._serving, results, strict=True) if not result["settled"]]
        if late:
            return TimeoutError(
                f"shard {', '.join(late)} still waits for pushes up to step {self._gate['step'] - self._gate['lag']} "
                f"after {SETTLE_SECONDS:g} s"
            )
        if len({result["generation"] for result in results}) > 1:
            return InterruptedError("the workers are being started anew")
        if self._joining and any(len(set(result["done"])) > 1 or any(result["early"]) for result in results):
            # A shard that joins begins with one step for all ranks.
            return InterruptedError("the workers are not at the same step, as when a checkpoint is about to be written")
        return None

    def failed(self, error: Exception) -> None:
        """A call failed: before the commit that undoes the move, afterwards `calls()` are to be made again."""
        self.error = error
        if not self.committed and self.phase not in _CANCEL_ORDER:
            self.phase = Phase.REVERT if self.phase is Phase.COMMIT else Phase.CANCEL

    def cancel(self) -> bool:
        """Gives the move up; False if it is too late for that."""
        if self.committed or self.cancelling:
            return False
        self.failed(InterruptedError("the move was given up"))
        return True

    def _fetch(self, **what: bool) -> list[Call | Commit]:
        ways: dict[tuple[int, int], list[int]] = {}
        for move in self.moves:
            ways.setdefault((move.source, move.target), []).append(move.block)
        common = {"move": self.move, "epoch": self.before.epoch, **what}
        return [
            Call(target, "fetch_blocks", {"blocks": blocks, "source": source, **common})
            for (source, target), blocks in ways.items()
        ]

    def _all(self, shards: Sequence[int], method: str, **arguments: Any) -> list[Call | Commit]:
        return [Call(shard, method, arguments) for shard in shards]


def described(block_map: BlockMap) -> dict[str, Any]:
    """A block map as the arguments of `set_block_map`."""
    return {"epoch": block_map.epoch, "owners": block_map.owners.tolist(), "addresses": list(block_map.addresses)}
