"""A table read row by row in pieces, and MLET's two layers as the one table that is served."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import torch

from ...parameter_server.kernels import locate
from ...parameter_server.store import Store
from .projected import Projected

# Rows per piece: 64 MiB at 64 floats each.
PIECE_ROWS = 1 << 18


def table_pieces(store: Store, table: str, rows: int = PIECE_ROWS) -> Iterator[np.ndarray]:
    """The rows of a table in their order, float32 [<= rows, width] at a time; only one piece is held.

    Raises:
        TableError: the store has no such table. StoreError: rows could not be read.
    """
    ref = store.layout.ref(table)
    slab = store.layout.slabs[ref.slab]
    total = slab.tables[ref.table].rows
    tables = np.array([ref.table], np.int32)
    for begin in range(0, total, rows):
        wanted = np.arange(begin, min(total, begin + rows), dtype=np.int64)
        part, inverse = locate(slab, tables, np.array([0, len(wanted)]), wanted, store.block_map.rank())
        yield store.pull([part]).result()[0][inverse]


@torch.no_grad()
def collapse(store: Store, method: Projected, rows: int = PIECE_ROWS) -> Iterator[np.ndarray]:
    """E = W1 W2 as one table of `full_rows` x d, float32 [<= rows, d] at a time: neither table is ever held whole.

    Row r belongs to the ids that the method's only lookup maps to r, as with `full`.

    Raises:
        TableError, StoreError: as `table_pieces`.
    """
    for piece in table_pieces(store, method.tables[0].name, rows):
        factor = torch.from_numpy(piece).to(method.projection.device)
        yield method.compose([factor]).cpu().numpy()
