"""Which pushes each block has seen: what makes a repeated push count once."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np

from . import failpoints
from .jit import jit

NEW, DUPLICATE, TOO_OLD = 0, 1, 2
WINDOW = 64  # sequence numbers told apart below the highest one; a client keeps fewer pushes open
NO_GENERATION = -1
FIELDS = ("client", "generation", "highest", "window")  # of what `export_block` gives

U64 = np.uint64


@jit
def check_blocks(
    highest: np.ndarray, window: np.ndarray, sequence: np.uint64, blocks: np.ndarray, out: np.ndarray
) -> None:
    """Fills uint8 [K] with NEW, DUPLICATE or TOO_OLD. Bit i of a window stands for sequence `highest - i`."""
    for k in range(len(blocks)):
        block = np.intp(blocks[k])
        if window[block] == U64(0) or sequence > highest[block]:
            out[k] = NEW
            continue
        age = highest[block] - sequence
        if age >= U64(WINDOW):
            out[k] = TOO_OLD
        else:
            out[k] = DUPLICATE if (window[block] >> age) & U64(1) else NEW


@jit
def mark_blocks(highest: np.ndarray, window: np.ndarray, sequence: np.uint64, blocks: np.ndarray) -> None:
    """Enters a push into the given blocks' windows, none of which may be TOO_OLD for it."""
    for k in range(len(blocks)):
        block = np.intp(blocks[k])
        if window[block] == U64(0) or sequence > highest[block]:
            ahead = sequence - highest[block]
            kept = window[block] << ahead if ahead < U64(WINDOW) else U64(0)
            window[block] = kept | U64(1)
            highest[block] = sequence
        else:
            window[block] |= U64(1) << (highest[block] - sequence)


class Ledger:
    """Per block and client: the highest sequence number and a bitmap of the 64 up to it.

    A client belongs to the generation it first pushed in (or to none); clients of older generations are fenced anyway
    and are forgotten when a new one begins.
    """

    def __init__(self, blocks: int) -> None:
        self.blocks = blocks
        self._slot: dict[int, int] = {}
        self._generation: list[int] = []
        self._highest = np.zeros((4, blocks), np.uint64)
        self._window = np.zeros((4, blocks), np.uint64)

    def __len__(self) -> int:
        return len(self._slot)

    def check(self, client: int, sequence: int, blocks: np.ndarray) -> np.ndarray:
        """uint8 [K]: NEW, DUPLICATE or TOO_OLD for each of `blocks` (integers [K])."""
        out = np.zeros(len(blocks), np.uint8)
        if (slot := self._slot.get(client)) is not None and not failpoints.active("ledger"):
            check_blocks(self._highest[slot], self._window[slot], U64(sequence), blocks, out)
        return out

    def mark(self, client: int, sequence: int, blocks: np.ndarray, generation: int = NO_GENERATION) -> None:
        """Remembers that the push is in `blocks`, which `check` has just called NEW."""
        if len(blocks):
            slot = self._open(client, generation)
            mark_blocks(self._highest[slot], self._window[slot], U64(sequence), blocks)

    def drop_generations_before(self, generation: int) -> None:
        """Forgets the clients of older generations; those without one stay."""
        keep = [c for c, s in self._slot.items() if not 0 <= self._generation[s] < generation]
        slots = [self._slot[c] for c in keep]
        room = max(4, len(keep))
        highest, window = np.zeros((room, self.blocks), np.uint64), np.zeros((room, self.blocks), np.uint64)
        highest[: len(keep)] = self._highest[slots]
        window[: len(keep)] = self._window[slots]
        self._generation = [self._generation[s] for s in slots]
        self._slot = {c: i for i, c in enumerate(keep)}
        self._highest, self._window = highest, window

    def drop_block(self, block: int) -> None:
        """Forgets everything about a block that is owned no longer."""
        self._highest[:, block] = 0
        self._window[:, block] = 0

    def export_block(self, block: int) -> dict[str, np.ndarray]:
        """client, highest, window: uint64 [C], generation: int64 [C]; the clients that this block has seen."""
        clients = np.fromiter(self._slot, np.uint64, len(self._slot))
        window = self._window[: len(clients), block]
        seen = window != 0
        return {
            "client": clients[seen],
            "generation": np.array(self._generation, np.int64)[seen],
            "highest": self._highest[: len(clients), block][seen],
            "window": window[seen],
        }

    def import_block(self, block: int, tensors: Mapping[str, np.ndarray]) -> None:
        """Replaces what is known about a block by what `export_block` gave."""
        self.drop_block(block)
        for i, client in enumerate(tensors["client"].tolist()):
            slot = self._open(client, int(tensors["generation"][i]))
            self._highest[slot, block] = tensors["highest"][i]
            self._window[slot, block] = tensors["window"][i]

    def copy(self) -> Ledger:
        """An independent copy, for a cut."""
        other = Ledger(self.blocks)
        other._slot, other._generation = dict(self._slot), list(self._generation)
        other._highest, other._window = self._highest.copy(), self._window.copy()
        return other

    def _open(self, client: int, generation: int) -> int:
        slot = self._slot.get(client)
        if slot is None:
            slot = self._slot[client] = len(self._generation)
            self._generation.append(generation)
            if slot == len(self._highest):
                empty = np.zeros_like(self._highest)
                self._highest = np.concatenate([self._highest, empty])
                self._window = np.concatenate([self._window, empty])
        return slot


def warm_up() -> None:
    """Compiles the kernels of the ledger, or loads them from the cache."""
    ledger, block = Ledger(1), np.zeros(1, np.int64)
    ledger.mark(0, 0, block)
    ledger.check(0, 0, block)
