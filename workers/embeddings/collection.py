"""All categorical features of a model over a store: ids in, vectors out, summed gradients back."""

from __future__ import annotations

from collections import deque
from collections.abc import Mapping, Sequence
from concurrent.futures import Future
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from ...datasets.schema import Ids
from ...parameter_server.kernels import locate
from ...parameter_server.requests import Clock
from ...parameter_server.store import Store
from ...parameter_server.tables import Optimizer
from .base import EmbeddingError, Feature, Lookup, Method
from .gather import pooled, read_rows, vectors
from .gradients import check_finite, collect
from .lookups import SlabLookups
from .planning import EmbeddingSize, build_method
from .ticket import Ticket

# Each open push holds its gradients until it is acknowledged.
MAX_OPEN_PUSHES = 8


@dataclass(frozen=True)
class _Group:
    """Features whose vectors come from one call. reads: (position of the slab, first lookup, lookups), in one piece."""

    features: tuple[int, ...]
    reads: tuple[tuple[int, int, int], ...]
    is_row: bool
    pooling: str


class EmbeddingBagCollection(nn.Module):
    """Embeddings of several features in a store, as a module.

        with Store.open(shards=4) as store:
            embeddings = EmbeddingBagCollection(features, store=store)
            vectors = embeddings(ids)      # [B, F, d], or a dict by name where widths differ
            loss(vectors).backward()
            embeddings.step()              # the shards apply the optimizer

    Its parameters are the methods' dense ones (none for `full` and `hash`); rows live in the store and are trained by
    `step`, never by a torch optimizer. For one thread.

    features: in the order of the output. optimizer: applied by the shards. learning_rate: what `step` sends unless it
    is given another. device: where vectors are composed.

    Raises:
        EmbeddingError: a feature that stands twice, or options that its method does not take.
        TableError: the store holds a table of that name with another specification.
    """

    def __init__(
        self,
        features: Sequence[Feature],
        *,
        store: Store,
        optimizer: Optimizer | None = None,
        learning_rate: float = 0.01,
        device: torch.device | str | None = None,
    ) -> None:
        super().__init__()
        self.features = tuple(features)
        self.names = tuple(feature.name for feature in features)
        if len(set(self.names)) < len(self.names) or not self.names:
            raise EmbeddingError(f"features: at least one, each name once; found {', '.join(self.names) or 'none'}")
        self.store = store
        self.learning_rate = learning_rate
        self.device = torch.device(device or "cpu")
        self.methods = nn.ModuleList(build_method(f, optimizer or Optimizer()) for f in features).to(self.device)
        # A table that several features read is declared by each of them.
        tables = {table.name: table for method in self._methods for table in method.tables}
        store.create_tables(list(tables.values()))
        self._slabs, self._groups = _arrange(self._methods, store)
        self._one_width = len({feature.dim for feature in features}) == 1
        order = [f for group in self._groups for f in group.features]
        self._order = None if order == sorted(order) else torch.tensor(np.argsort(order), device=self.device)
        self._stream = torch.cuda.Stream(self.device) if self.device.type == "cuda" else None  # type: ignore[no-untyped-call]
        self._positions: tuple[tuple[str, ...], np.ndarray] = ((), np.empty(0, np.int64))
        self._rank: tuple[int, np.ndarray] = (-1, np.empty(0, np.uint16))
        self._forwarded: list[Ticket] = []
        self._pushes: deque[Future[None]] = deque()

    @property
    def _methods(self) -> list[Method]:
        return [method for method in self.methods if isinstance(method, Method)]

    @property
    def size(self) -> EmbeddingSize:
        """Parameters and bytes of the tables, and those of the same features with method `full`."""
        return EmbeddingSize.of(self._methods)

    def prefetch(self, ids: Ids | Mapping[str, Any], clock: Clock | None = None) -> Ticket:
        """Asks the store for the rows of a batch and returns at once; `forward` takes the ticket.

        Raises:
            EmbeddingError: a feature is missing from the batch, or an id lies outside its cardinality.
        """
        batch = ids if isinstance(ids, Ids) else Ids.from_dict(ids)
        positions = self._positions_in(batch)
        rank = self._block_rank()
        parts, inverses, segments = [], [], []
        for lookups in self._slabs:
            begins, rows = lookups.map(batch, positions)
            part, inverse = locate(self.store.layout.slabs[lookups.slab], lookups.tables, begins, rows, rank)
            parts.append(part)
            inverses.append(inverse)
            segments.append(begins)
        pulled = self.store.pull(parts, clock)
        return Ticket(batch, parts, inverses, segments, pulled, self.device, self._stream)

    def forward(self, ids: Ids | Mapping[str, Any] | Ticket) -> Tensor | dict[str, Tensor]:
        """Vectors [B, F, d] in the order of the features, or {name: [B, d]} where widths differ.

        Bags are summed or averaged as the feature's `pooling` says; an empty bag gives zeros.

        Raises:
            StoreError: the rows could not be read.
        """
        ticket = ids if isinstance(ids, Ticket) else self.prefetch(ids)
        rows = ticket.rows()
        if torch.is_grad_enabled():
            for leaf in rows:
                leaf.requires_grad_()
            if not any(ticket is earlier for earlier in self._forwarded):
                self._forwarded.append(ticket)
        outputs = [self._vectors(group, ticket, rows) for group in self._groups]
        if not self._one_width:
            pairs = zip(self._groups, outputs, strict=True)
            columns = {f: out[:, i] for group, out in pairs for i, f in enumerate(group.features)}
            return {name: columns[f] for f, name in enumerate(self.names)}
        together = outputs[0] if len(outputs) == 1 else torch.cat(outputs, 1)
        return together if self._order is None else together[:, self._order]

    def step(self, learning_rate: float | None = None, clock: Clock | None = None) -> None:
        """Sends the gradients of everything forwarded since the last step; the shards apply the optimizer once per row.

        With a clock the push is on its way when this returns, and failures surface in a later call or in `drain`;
        without one it has been applied, so that the next forward sees it.

        Raises:
            GradientError: a gradient is NaN or infinite; nothing was sent.
            StoreError: this push, or an earlier one, failed.
        """
        parts, grads = collect(self._forwarded, self._block_rank())
        self._forwarded.clear()
        check_finite(parts, grads, self.store.layout.slabs, None if clock is None else clock.step)
        rate = self.learning_rate if learning_rate is None else learning_rate
        if parts or clock is not None:
            self._pushes.append(self.store.push(parts, grads, [rate] * len(parts), clock))
        while self._pushes and (clock is None or len(self._pushes) > MAX_OPEN_PUSHES or self._pushes[0].done()):
            self._pushes.popleft().result()

    def drain(self) -> None:
        """Until every push is acknowledged. Raises StoreError if one failed."""
        while self._pushes:
            self._pushes.popleft().result()

    def _vectors(self, group: _Group, ticket: Ticket, rows: list[Tensor]) -> Tensor:
        """[B, F of the group, d]."""
        count, offsets = len(group.features), self._bags(group, ticket.ids)
        read = [
            (rows[slab], ticket.inverse[slab][ticket.segments[slab][first] : ticket.segments[slab][first + n]])
            for slab, first, n in group.reads
        ]
        if group.is_row:
            table, inverse = read[0]
        else:
            method = self._methods[group.features[0]]
            table = method.compose([read_rows(source, where) for source, where in read])
            inverse = np.arange(len(table), dtype=np.int32)
        if offsets is None:
            return vectors(table, inverse, count)
        return pooled(table, inverse, offsets, count, group.pooling)

    def _bags(self, group: _Group, ids: Ids) -> np.ndarray | None:
        """int64 [F of the group * B + 1], from 0; None where every sample has one id per feature."""
        if ids.offsets is None:
            return None
        batch, positions = ids.batch_size, self._positions_in(ids)[list(group.features)]
        sizes = np.diff(ids.offsets).reshape(-1, batch)[positions]
        return np.concatenate([np.zeros(1, np.int64), np.cumsum(sizes)])

    def _positions_in(self, ids: Ids) -> np.ndarray:
        if self._positions[0] != ids.features:
            places = {name: i for i, name in enumerate(ids.features)}
            if missing := [name for name in self.names if name not in places]:
                raise EmbeddingError(
                    f"the batch has no ids for feature {missing[0]!r}: it holds {', '.join(ids.features) or 'none'}"
                )
            self._positions = (ids.features, np.array([places[name] for name in self.names], np.int64))
        return self._positions[1]

    def _block_rank(self) -> np.ndarray:
        block_map = self.store.block_map
        if self._rank[0] != block_map.epoch:
            self._rank = (block_map.epoch, block_map.rank())
        return self._rank[1]


def _arrange(methods: Sequence[Method], store: Store) -> tuple[list[SlabLookups], list[_Group]]:
    """Which lookups go to which slab, in which order, and which features are composed together.

    Features whose vector is a row come first, those of one slab and pooling in one piece, so that a single gather
    serves all of them.
    """
    features = [method.feature for method in methods]
    lookups: dict[int, list[tuple[int, int, Lookup]]] = {}
    slabs: list[int] = []

    def add(feature: int, lookup: Lookup) -> tuple[int, int]:
        ref = store.layout.ref(methods[feature].tables[lookup.table].name)
        if ref.slab not in slabs:
            slabs.append(ref.slab)
        own = lookups.setdefault(ref.slab, [])
        own.append((feature, ref.table, lookup))
        return slabs.index(ref.slab), len(own) - 1

    together: dict[tuple[int, str], list[int]] = {}
    for f, method in enumerate(methods):
        if method.is_row:
            slab = store.layout.ref(method.tables[0].name).slab
            together.setdefault((slab, features[f].pooling), []).append(f)
    groups = []
    for (_, pooling), members in together.items():
        places = [add(f, methods[f].lookups[0]) for f in members]
        groups.append(_Group(tuple(members), ((*places[0], len(places)),), True, pooling))
    for f, method in enumerate(methods):
        if not method.is_row:
            reads = tuple((*add(f, lookup), 1) for lookup in method.lookups)
            groups.append(_Group((f,), reads, False, features[f].pooling))
    return [SlabLookups(slab, features, lookups[slab]) for slab in slabs], groups
