"""Which shard owns each block. Pure; no I/O."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from .tables import MIN_BLOCKS_PER_SHARD, TableError


@dataclass(frozen=True)
class BlockMap:
    """owners: uint16 [blocks], an index into `addresses`; the epoch grows with every change."""

    epoch: int
    owners: np.ndarray
    addresses: tuple[str, ...]

    @classmethod
    def initial(cls, blocks: int, addresses: tuple[str, ...]) -> BlockMap:
        """Equal contiguous ranges of blocks, epoch 1.

        Raises:
            TableError: fewer than 10 blocks per shard.
        """
        shards = len(addresses)
        if shards < 1 or blocks < MIN_BLOCKS_PER_SHARD * shards:
            raise TableError(
                f"store.blocks: {blocks} blocks over {shards} shards is fewer than {MIN_BLOCKS_PER_SHARD} each; "
                f"use at most {max(1, blocks // MIN_BLOCKS_PER_SHARD)} shards, or create the store with more blocks"
            )
        return cls(1, (np.arange(blocks) * shards // blocks).astype(np.uint16), addresses)

    @property
    def blocks(self) -> int:
        return len(self.owners)

    def owned_by(self, shard: int) -> np.ndarray:
        """bool [blocks]."""
        owned: np.ndarray = self.owners == shard
        return owned

    def rank(self) -> np.ndarray:
        """uint16 [blocks]: each block's place when blocks are ordered by (owner, block)."""
        rank = np.empty(self.blocks, np.uint16)
        rank[np.argsort(self.owners, kind="stable")] = np.arange(self.blocks, dtype=np.uint16)
        return rank
