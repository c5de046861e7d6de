"""What one shard holds: its blocks' rows, their ledger, and the cut that is being written. No I/O, no threads."""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping, Sequence
from threading import RLock
from typing import Any

import numpy as np

from . import failpoints, kernels, ledger, optimizers, snapshot, transit
from .blocks import BlockMap
from .memory import SlabMemory, split_block
from .records import Journal, Kind, encode_tensors
from .snapshot import LEDGER, Snapshot
from .store import BusyError, StoreError
from .tables import Layout, TableError, TableSpec
from .transit import Transit
from .validation import readable

NOBODY = 65535  # owner of every block before the first block map; no shard has this number


class Contents:
    """The blocks that the block map gives to shard `number`; every public method holds `lock`.

    A block is *held* from the first block map on, or once `load_block` or a move brought its content; a block that is
    held is served unless it is sealed for the end of a move.
    """

    def __init__(self, number: int, layout: Layout, memory_bytes: int | None = None) -> None:
        blocks = layout.blocks
        self.number = number
        self.layout = layout
        self.memory_bytes = memory_bytes
        self.lock = RLock()
        self.ledger = ledger.Ledger(blocks)
        self.block_map = BlockMap(0, np.full(blocks, NOBODY, np.uint16), ())
        self._memory: list[SlabMemory] = []
        self._held = np.zeros(blocks, np.bool_)
        self._served = np.zeros(blocks, np.bool_)
        self._transit = Transit(blocks)
        self._snapshot: Snapshot | None = None
        self._local_snapshot: Snapshot | None = None
        self.journal: Journal | None = None

    def _record(self, kind: Kind, content: Mapping[str, Any], tensors: Mapping[str, np.ndarray] | None = None) -> None:
        """To be called when nothing can fail any more and nothing has changed yet. Raises JournalError."""
        if self.journal is not None:
            self.journal.append(kind, *encode_tensors(content, tensors or {}))

    @property
    def held_bytes(self) -> int:
        """Rows and optimizer state of the blocks held, or about to be."""
        return _bytes_of(self._memory, int((self._held | self._transit.arrived).sum()))

    @property
    def moving(self) -> bool:
        """Whether blocks are on their way to this shard or from it."""
        return bool(self._transit.arrived.any() or self._transit.leaving.any() or self._transit.busy)

    def _check_budget(self, added: int, what: str) -> None:
        """Raises TableError if so many bytes more would exceed `memory_bytes`."""
        if self.memory_bytes is not None and self.held_bytes + added > self.memory_bytes:
            raise TableError(
                f"shard {self.number}: {what} needs {added} bytes, and {self.held_bytes} of store.memory_bytes="
                f"{self.memory_bytes} are taken: use more shards, or raise it"
            )

    def _makes_room(self, rows: Mapping[int, int]) -> bool:
        """Whether pre-images of so many rows (by slab) stay within `memory_bytes`, at the worst.

        A cut that holds nothing always takes one push, so that every push is taken once the cut has been written.
        """
        cuts = [cut for cut in (self._snapshot, self._local_snapshot) if cut is not None]
        held = sum(cut.bytes for cut in cuts)
        if self.memory_bytes is None or held == 0:
            return True
        added = sum(count * snapshot.bytes_per_row(self._memory[slab].slab) for slab, count in rows.items())
        return self.held_bytes + held + len(cuts) * added <= self.memory_bytes

    def set_block_map(self, block_map: BlockMap) -> None:
        """Takes over a newer map, which ends the moves of the blocks that it gives to another shard.

        Blocks that go elsewhere are dropped; blocks that come are served if a move brought them, or after `load_block`.

        Raises:
            TableError: another number of blocks. StoreError: an older epoch.
            BusyError: a cut still needs a block that leaves.
        """
        with self.lock:
            if block_map.blocks != self.layout.blocks:
                raise TableError(f"a map of {block_map.blocks} blocks does not fit a store of {self.layout.blocks}")
            if block_map.epoch < self.block_map.epoch:
                raise StoreError(
                    f"block map of epoch {block_map.epoch} is older than {self.block_map.epoch}, the current one"
                )
            owned = block_map.owned_by(self.number)
            leaving = np.flatnonzero(self._held & ~owned).tolist()
            for block in leaving:
                self._not_in_cut(block)
            content = {"epoch": block_map.epoch, "addresses": block_map.addresses, "owners": block_map.owners.tolist()}
            self._record(Kind.BLOCK_MAP, content)
            for block in leaving:
                self._held[block] = False
                self._drop(block)
            # Without tables a block has no content that could be missing.
            arrived = owned & self._transit.arrived if self._memory else owned
            self._held |= arrived
            ended = arrived.copy()
            ended[leaving] = True
            self._transit.cancel(ended)
            self._served = self._held & ~self._transit.sealed
            self.block_map = block_map
            failpoints.hit("move.owned")

    def _drop(self, block: int) -> None:
        self.ledger.drop_block(block)
        for memory in self._memory:
            memory.drop(block)

    def create_tables(self, tables: Sequence[TableSpec]) -> None:
        """Adds tables with their initial rows in all blocks held; see `Layout.add`.

        Raises:
            TableError: a table exists with another specification, or the address space cannot be had; nothing is added.
        """
        with self.lock:
            self._end_copies()
            layout = copy.deepcopy(self.layout)
            added = [SlabMemory(slab) for slab in layout.add(tables)]
            names = ", ".join(repr(spec.name) for memory in added for spec in memory.slab.tables)
            self._check_budget(_bytes_of(added, int(self._held.sum())), f"its share of {names}")
            for memory in added:
                warm_up(memory.slab.index_dtype)
                for block in np.flatnonzero(self._held).tolist():
                    memory.initialise(block, layout.seed)
            if added:
                self._record(Kind.TABLES, {"tables": [spec.model_dump() for spec in tables]})
            self.layout = layout
            self._memory += added

    def reset(self) -> None:
        """Gives every row held its initial values again and forgets every push: as if tables had just been created.

        Raises:
            StoreError: a cut still needs a block; nothing was changed.
        """
        with self.lock:
            held = np.flatnonzero(self._held).tolist()
            for block in held:
                self._not_in_cut(block)
            self._end_copies()
            self._record(Kind.RESET, {})
            for memory in self._memory:
                for block in held:
                    memory.initialise(block, self.layout.seed)
            self.ledger = ledger.Ledger(self.layout.blocks)

    def adopt(self, slabs: Sequence[Sequence[TableSpec]], block_map: BlockMap) -> None:
        """Gives an empty shard these slabs and this map, as they were before; `load_block` brings the blocks."""
        with self.lock:
            self.layout = Layout(self.layout.blocks, self.layout.seed)
            self._memory = [SlabMemory(slab) for tables in slabs for slab in self.layout.add(tables)]
            for memory in self._memory:
                warm_up(memory.slab.index_dtype)
            self.block_map = block_map
            self._held = block_map.owned_by(self.number) if not self._memory else np.zeros(block_map.blocks, np.bool_)
            self._served = self._held.copy()

    def mark(self) -> Snapshot:
        """Cuts: the snapshot holds every row and the ledger as they are now. Milliseconds, whatever the size.

        Raises:
            StoreError: the last cut is not closed yet. BusyError: a block is sealed, so that no shard serves it.
        """
        with self.lock:
            if self._snapshot is not None:
                raise StoreError(f"shard {self.number} is still writing the last checkpoint: wait for it")
            self._not_sealed()
            self._snapshot = self._cut(self._forget_snapshot)
            return self._snapshot

    def mark_local(self) -> Snapshot:
        """A second cut, for the journal, whether or not a checkpoint is being written. One at a time.

        It never stands in the way: where a block that it still needs is dropped or overwritten, it is closed.
        """
        with self.lock:
            assert self._local_snapshot is None
            self._local_snapshot = self._cut(self._forget_local_snapshot)
            return self._local_snapshot

    def _cut(self, on_close: Callable[[], None]) -> Snapshot:
        return Snapshot(self.number, self._memory, self._held, self.ledger, self.lock, on_close)

    def _forget_snapshot(self) -> None:
        self._snapshot = None

    def _forget_local_snapshot(self) -> None:
        self._local_snapshot = None

    def _save_pre_images(self, slab: int, index: np.ndarray) -> None:
        for cut in (self._snapshot, self._local_snapshot):
            if cut is not None:
                cut.save(slab, index)

    def _not_in_cut(self, block: int) -> None:
        if self._local_snapshot is not None and self._local_snapshot.is_pending(block):
            self._local_snapshot.close()
        if self._snapshot is not None and self._snapshot.is_pending(block):
            raise BusyError(f"block {block} of shard {self.number} is not in the checkpoint yet: wait for it")

    def _not_sealed(self) -> None:
        if self._transit.busy:
            raise BusyError(f"shard {self.number} is about to give blocks to other shards: wait for it")

    def _end_copies(self) -> None:
        """Before rows change otherwise than by pushes: blocks that are being copied have to be copied anew."""
        self._not_sealed()
        self._transit.cancel(self._transit.leaving.copy())

    def begin_move(self, block: int, move: str) -> dict[str, np.ndarray]:
        """Begins to give a block away while it is served; see `Transit.begin`. Beginning again copies it anew.

        Raises:
            StoreError: the block is not held. BusyError: it is sealed already.
        """
        with self.lock:
            if not self._held[block]:
                raise StoreError(f"shard {self.number} does not hold block {block}")
            self._not_sealed()
            failpoints.hit("move.begun")
            return self._transit.begin(self._memory, block, move)

    def changes_of(self, block: int, move: str, *, seal: bool = False) -> dict[str, np.ndarray]:
        """What changed of a block that is being given away; see `Transit.changes`.

        seal: no call reads or changes the block from now on; it is answered MOVED until the move ends.

        Raises:
            StoreError: the block is not on its way. BusyError: a cut still needs it, so that it cannot be sealed.
        """
        with self.lock:
            self._transit.check_leaving(block, move)
            if seal and not failpoints.active("seal"):
                self._not_in_cut(block)
                self._record(Kind.SEAL, {"block": block})
                self.seal(block)
                failpoints.hit("move.sealed")
            return self._transit.changes(self._memory, self.ledger, block)

    def seal(self, block: int) -> None:
        """No call reads or changes a block from now on; what the journal says once more after a restart."""
        with self.lock:
            self._transit.sealed[block] = True
            self._served[block] = False

    def receive_block(self, block: int, move: str, tensors: Mapping[str, np.ndarray]) -> None:
        """Takes in a block or its changes, which a later block map may make this shard's own; see `Transit.receive`.

        Raises:
            StoreError: the block is held already, or the tensors do not fit.
        """
        with self.lock:
            if self._held[block]:
                raise StoreError(f"shard {self.number} holds block {block} already")
            if not self._transit.arrived[block]:
                self._check_budget(_bytes_of(self._memory, 1), f"block {block}")
            parts = self._transit.checked(self._memory, block, move, tensors)
            self._record(Kind.INCOMING, {"block": block, "move": move}, tensors)
            self._transit.receive(self._memory, self.ledger, block, move, parts, tensors)
            failpoints.hit("move.received")

    def cancel_moves(self, move: str | None = None) -> None:
        """Ends `move`, or any that is under way.

        What this shard was giving away it keeps and serves; what arrived and is not its own is forgotten.
        """
        with self.lock:
            if not self.moving or move not in (None, self._transit.move):
                return
            self._record(Kind.CANCEL_MOVES, {})
            arrived = np.flatnonzero(self._transit.arrived & ~self._held).tolist()
            self._transit.cancel()
            for block in arrived:
                self._drop(block)
            self._served = self._held.copy()

    def export_block(self, block: int) -> dict[str, np.ndarray]:
        """Everything known of one block now: its rows by table (`split_block`) and its ledger under "ledger/...".

        Raises:
            StoreError: the block is not held.
        """
        with self.lock:
            if not self._held[block]:
                raise StoreError(f"shard {self.number} does not hold block {block}")
            tensors = {LEDGER + name: value for name, value in self.ledger.export_block(block).items()}
            for memory in self._memory:
                weights, state = (array.copy() for array in memory.block(block))
                tensors |= split_block(memory.slab, block, weights, state)
            return tensors

    def load_block(self, block: int, tensors: Mapping[str, np.ndarray]) -> list[str]:
        """Overwrites the tables that `tensors` (see `export_block`) holds, and the ledger if it is there.

        Returns the tables whose optimizer state was absent and therefore starts anew.

        Raises:
            StoreError: the block belongs to another shard, or a cut still needs it.
            TableError: a tensor has another shape, or the block is new here and lacks a table; nothing was changed.
        """
        with self.lock:
            if self.block_map.owners[block] != self.number:
                raise StoreError(f"block {block} does not belong to shard {self.number}: send it to its owner")
            self._not_in_cut(block)
            self._end_copies()
            missing = [spec.name for spec in self.layout.tables if f"{spec.name}/weight" not in tensors]
            if missing and not self._held[block]:
                raise TableError(f"block {block} comes without table {missing[0]!r}, which shard {self.number} has")
            if not self._held[block]:
                self._check_budget(_bytes_of(self._memory, 1), f"block {block}")
            for memory in self._memory:
                memory.check(block, tensors)
            self._record(Kind.BLOCK, {"block": block}, tensors)
            without_state = [name for memory in self._memory for name in memory.load(block, tensors)]
            if f"{LEDGER}client" in tensors:
                self.ledger.import_block(block, {name: tensors[LEDGER + name] for name in ledger.FIELDS})
            self._held[block] = self._served[block] = True
            return without_state

    def overwrite_rows(self, slab: int, index: np.ndarray, weights: np.ndarray, state: np.ndarray | None) -> None:
        """Sets rows of held blocks, skips others: weights [U, width], state [U, state_width] or None (initial)."""
        with self.lock:
            self._end_copies()
            memory = self._memory[slab]
            here = self._held[index // memory.slab.rows_per_block]
            written = {"index": index, "weights": weights} | ({} if state is None else {"state": state})
            self._record(Kind.ROWS, {"slab": slab}, written)
            self._save_pre_images(slab, readable(index[here]))
            memory.weights[index[here]] = weights[here]
            initial = optimizers.initial_state(memory.slab.optimizer)
            memory.state[index[here]] = initial if state is None else state[here]


def _bytes_of(memory: Sequence[SlabMemory], blocks: int) -> int:
    return blocks * sum(sum(slab.block_bytes) for slab in memory)


def warm_up(index_dtype: np.dtype[np.unsignedinteger]) -> None:
    """Compiles every kernel that a shard runs on indices of this dtype, so that no served request waits for it."""
    kernels.warm_up(index_dtype)
    ledger.warm_up()
    snapshot.warm_up(index_dtype)
    transit.warm_up(index_dtype)
