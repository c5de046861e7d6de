"""Where a shard's rows lie: address space for a whole slab, memory only for the blocks that are owned."""

from __future__ import annotations

import mmap
import platform
import sys
from collections.abc import Mapping

import numpy as np

from .kernels import gather, initialise_share, share_rows
from .optimizers import apply, initial_state, state_columns
from .parallel import in_parts
from .tables import Slab, TableError, TableSpec

HUGE_PAGE = 2 << 20
# Not every supported Python names MAP_NORESERVE; without it Linux refuses to map more than there is memory.
_LINUX_NORESERVE = 0x4000 if sys.platform == "linux" and platform.machine() in ("x86_64", "aarch64") else 0
_FLAGS = mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS | getattr(mmap, "MAP_NORESERVE", _LINUX_NORESERVE)


def reserve(size: int, purpose: str, *, huge_pages: bool = False) -> mmap.mmap:
    """Address space of `size` bytes, reading as zeros; memory comes with the first write to each page.

    Raises:
        TableError: the system refuses; says for what and how much.
    """
    try:
        space = mmap.mmap(-1, max(size, mmap.PAGESIZE), flags=_FLAGS)
    except (OSError, OverflowError, ValueError) as error:
        raise TableError(
            f"{purpose}: cannot reserve {size} bytes of address space ({error}); "
            f"lift `ulimit -v`, or set vm.overcommit_memory to 0 or 1"
        ) from error
    if huge_pages and size >= HUGE_PAGE and hasattr(mmap, "MADV_HUGEPAGE"):
        space.madvise(mmap.MADV_HUGEPAGE)
    return space


def share_of(slab: Slab, table: int, block: int) -> slice:
    """The rows of one table within a block, without the padding behind them."""
    spec = slab.tables[table]
    begin = int(slab.base[table])
    return slice(begin, begin + int(share_rows(block, slab.blocks, spec.rows, np.uint64(spec.key))))


def split_block(slab: Slab, block: int, weights: np.ndarray, state: np.ndarray) -> dict[str, np.ndarray]:
    """A block's rows by table: "<table>/weight" [n, width] and "<table>/<state name>" [n, columns], contiguous.

    weights [rows_per_block, width] and state [rows_per_block, state_width] are the block's own; the tensors may be
    views of both.
    """
    tensors = {}
    columns = state_columns(slab.optimizer, slab.width)
    for table, spec in enumerate(slab.tables):
        share = share_of(slab, table, block)
        tensors[f"{spec.name}/weight"] = weights[share]
        for name, where in columns.items():
            tensors[f"{spec.name}/{name}"] = np.ascontiguousarray(state[share, where])
    return tensors


class SlabMemory:
    """Weights and optimizer state of one slab: weights [R, width] and state [R, state_width], float32.

    R counts every slab row there is, whoever owns it, so the slab row is the address on every shard and no row moves
    when blocks come and go. Only owned blocks are ever touched.
    """

    def __init__(self, slab: Slab) -> None:
        self.slab = slab
        self._maps: list[mmap.mmap] = []
        self.weights = self._region(slab.width, "weights")
        self.state = self._region(slab.state_width, "optimizer state")

    def _region(self, width: int, what: str) -> np.ndarray:
        rows = self.slab.blocks * self.slab.rows_per_block
        if width == 0:
            return np.empty((rows, 0), np.float32)
        name = self.slab.tables[0].name
        space = reserve(4 * rows * width, f"{what} of the slab of table {name!r}", huge_pages=True)
        self._maps.append(space)
        return np.frombuffer(space, np.float32, count=rows * width).reshape(rows, width)

    @property
    def block_bytes(self) -> tuple[int, int]:
        """Bytes of weights and of state in one block."""
        rows = 4 * self.slab.rows_per_block
        return rows * self.slab.width, rows * self.slab.state_width

    def block(self, block: int) -> tuple[np.ndarray, np.ndarray]:
        """Views of one block's weights [rows_per_block, width] and state [rows_per_block, state_width]."""
        rows = slice(block * self.slab.rows_per_block, (block + 1) * self.slab.rows_per_block)
        return self.weights[rows], self.state[rows]

    def read(self, index: np.ndarray, threads: int = 1) -> np.ndarray:
        """float32 [U, width]: the rows `index`."""
        out = np.empty((len(index), self.slab.width), np.float32)
        in_parts(
            lambda begin, end: gather(self.weights, index[begin:end], out[begin:end]), len(out), out.nbytes, threads
        )
        return out

    def update(self, index: np.ndarray, grads: np.ndarray, learning_rate: float, threads: int = 1) -> None:
        """Applies the optimizer to the rows `index` (distinct); grads float32 [U, width]."""

        def update(begin: int, end: int) -> None:
            part = slice(begin, end)
            apply(self.slab.optimizer, self.weights, self.state, index[part], grads[part], learning_rate)

        in_parts(update, len(index), grads.nbytes, threads)

    def initialise(self, block: int, seed: int) -> None:
        """Gives every row of a block its initial values."""
        weights, state = self.block(block)
        for table, spec in enumerate(self.slab.tables):
            begin, end = int(self.slab.base[table]), int(self.slab.base[table + 1])
            initialise_share(weights[begin:end], spec, block, self.slab.blocks, seed)
        state[:] = initial_state(self.slab.optimizer)

    def check(self, block: int, tensors: Mapping[str, np.ndarray]) -> None:
        """Raises TableError if a weight tensor of one of the slab's tables has another shape than the block's share."""
        for table, spec in enumerate(self.slab.tables):
            weight = tensors.get(f"{spec.name}/weight")
            share = share_of(self.slab, table, block)
            shape = (share.stop - share.start, self.slab.width)
            if weight is not None and (weight.shape != shape or weight.dtype != np.float32):
                raise TableError(
                    f"table {spec.name!r}, block {block}: got {weight.dtype}{list(weight.shape)}, "
                    f"not float32{list(shape)}"
                )

    def load(self, block: int, tensors: Mapping[str, np.ndarray]) -> list[str]:
        """Overwrites the tables that `tensors` holds; returns those whose state was absent and is initial again."""
        weights, state = self.block(block)
        columns = state_columns(self.slab.optimizer, self.slab.width)
        without_state = []
        for table, spec in enumerate(self.slab.tables):
            if f"{spec.name}/weight" not in tensors:
                continue
            share = share_of(self.slab, table, block)
            weights[share] = tensors[f"{spec.name}/weight"]
            weights[share.stop : int(self.slab.base[table + 1])] = np.nan
            own = state[int(self.slab.base[table]) : int(self.slab.base[table + 1])]
            own[:] = initial_state(self.slab.optimizer)
            if not has_state(spec, tensors):
                without_state.append(spec.name)
                continue
            for name, where in columns.items():
                own[: share.stop - share.start, where] = tensors[f"{spec.name}/{name}"]
        return without_state

    def drop(self, block: int) -> None:
        """Gives a block's memory back, in whole pages."""
        for space, size in zip(self._maps, [s for s in self.block_bytes if s], strict=True):
            first = -(-block * size // mmap.PAGESIZE) * mmap.PAGESIZE
            last = (block + 1) * size // mmap.PAGESIZE * mmap.PAGESIZE
            if last > first and hasattr(mmap, "MADV_DONTNEED"):
                space.madvise(mmap.MADV_DONTNEED, first, last - first)


def has_state(spec: TableSpec, tensors: Mapping[str, np.ndarray]) -> bool:
    """Whether a block's tensors hold the whole state that this table's optimizer needs."""
    columns = state_columns(spec.optimizer, spec.width)
    rows = len(tensors[f"{spec.name}/weight"])
    shapes = {f"{spec.name}/{name}": (rows, where.stop - where.start) for name, where in columns.items()}
    return all(name in tensors and tensors[name].shape == shape for name, shape in shapes.items())
