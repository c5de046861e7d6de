"""All categorical features of a model over a store: ids in, vectors out, summed gradients back."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Hashable, Mapping, Sequence
from concurrent.futures import Future
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor, nn

from ...datasets.schema import Ids
from ...parameter_server.kernels import locate
from ...parameter_server.requests import Clock
from ...parameter_server.store import Store
from ...parameter_server.tables import Optimizer, TableSpec
from .base import EmbeddingError, Feature, Lookup, Method
from .gather import distinct_rows, pooled, read_rows, sample_sums, vectors
from .gradients import GradientError, collect, not_finite
from .lookups import SlabLookups
from .planning import EmbeddingSize, build_method
from .ticket import Ticket

# Each open push holds its gradients until it is acknowledged.
MAX_OPEN_PUSHES = 8


@dataclass(frozen=True)
class _Read:
    """Neighbouring lookups of one slab, which is the `slab`-th that is read."""

    slab: int
    first: int
    lookups: int


@dataclass(frozen=True)
class _Group:
    """Features whose vectors come from one call.

    row: vectors are the rows of one read. composed: one read per lookup of the methods, each for all features. sample:
    one read per table, all features' lookups together.
    """

    kind: Literal["row", "composed", "sample"]
    features: tuple[int, ...]
    reads: tuple[_Read, ...]
    pooling: str


class EmbeddingBagCollection(nn.Module):
    """Embeddings of several features in a store, as a module.

        with Store.open(shards=4) as store:
            embeddings = EmbeddingBagCollection(features, store=store)
            vectors = embeddings(ids)      # [B, F, d]; a dict by name where widths differ; [B, d] per sample
            loss(vectors).backward()
            embeddings.step()              # the shards apply the optimizer

    Its parameters are the methods' dense ones (none for `full` and `hash`); rows live in the store and are trained by
    `step`, never by a torch optimizer. For one thread.

    features: in the order of the output. optimizer: applied by the shards. learning_rate: what `step` sends unless it
    is given another. device: where vectors are composed.

    Raises:
        EmbeddingError: a feature that stands twice, options that its method does not take, features that share a table
            but not its size, or a method with one vector per sample beside one with a vector per feature.
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
        self.output = _common_output(self._methods)
        store.create_tables(distinct_tables(self._methods))
        self._slabs, self._groups = _Arrangement(self._methods, store).result()
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

        With methods that have one vector per sample (`output` is "sample"): [B, d].

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
        if self.output == "sample":
            return outputs[0]
        if not self._one_width:
            pairs = zip(self._groups, outputs, strict=True)
            columns = {f: out[:, i] for group, out in pairs for i, f in enumerate(group.features)}
            return {name: columns[f] for f, name in enumerate(self.names)}
        together = outputs[0] if len(outputs) == 1 else torch.cat(outputs, 1)
        return together if self._order is None else together[:, self._order]

    def step(
        self,
        learning_rate: float | None = None,
        clock: Clock | None = None,
        *,
        verdict: Callable[[GradientError | None], GradientError | None] = lambda error: error,
    ) -> None:
        """Sends the gradients of everything forwarded since the last step; the shards apply the optimizer once per row.

        With a clock the push is on its way when this returns, and failures surface in a later call or in `drain`;
        without one it has been applied, so that the next forward sees it.

        verdict: told of this worker's error before anything is sent, says whether to send; several workers agree in it.

        Raises:
            GradientError: a gradient is NaN or infinite; nothing was sent.
            StoreError: this push, or an earlier one, failed.
        """
        parts, grads = collect(self._forwarded, self._block_rank())
        self._forwarded.clear()
        found = not_finite(parts, grads, self.store.layout.slabs, None if clock is None else clock.step)
        if (error := verdict(found)) is not None:
            raise error
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
        """[B, F of the group, d], or [B, d] of a group of kind sample."""
        count, weights = len(group.features), self._weights(group, ticket.ids)
        read = [(rows[r.slab], ticket.inverse_of(r.slab, r.first, r.lookups)) for r in group.reads]
        if group.kind == "sample":
            bags = [self._bags(group, ticket.ids, r.lookups // count) for r in group.reads]
            sums = [
                sample_sums(*own, offsets, r.lookups) for own, offsets, r in zip(read, bags, group.reads, strict=True)
            ]
            return self._methods[group.features[0]].compose_sample(sums)
        offsets = None if ticket.ids.offsets is None else self._bags(group, ticket.ids)
        own_rows = group.kind == "row"
        table, number = read[0] if own_rows else self._composed(group, ticket, read)
        if offsets is None:
            return vectors(table, number, count, own_rows=own_rows)
        if weights is not None:
            table = read_rows(table, number) * weights[:, None]
            number = np.arange(len(table), dtype=np.int32)
        return pooled(table, number, offsets, count, group.pooling)

    def _weights(self, group: _Group, ids: Ids) -> Tensor | None:
        """float32 [N], what each id of the group's bags is multiplied with; None where all count alike.

        Raises:
            EmbeddingError: weights where their meaning would be open: in a mean, or in one vector per sample.
        """
        if ids.weights is None or ids.offsets is None:
            return None
        if group.pooling == "mean" or group.kind == "sample":
            raise EmbeddingError(
                f"feature {self.names[group.features[0]]!r}: the weights of a bag multiply the vectors of its ids, "
                f"which are then added: set embedding.pooling=sum and a method with a vector per feature, or leave "
                f"data.bag_weights out"
            )
        batch, positions = ids.batch_size, self._positions_in(ids)[list(group.features)]
        own = [ids.weights[ids.offsets[p * batch] : ids.offsets[(p + 1) * batch]] for p in positions]
        return torch.from_numpy(np.concatenate(own)).to(self.device, non_blocking=True)

    def _composed(
        self, group: _Group, ticket: Ticket, read: Sequence[tuple[Tensor, np.ndarray]]
    ) -> tuple[Tensor, np.ndarray]:
        """Vectors [V, d], and int32 [N]: which of them belongs to each id."""
        first = group.reads[0]
        begins = ticket.segments[first.slab][first.first : first.first + first.lookups + 1]
        begins = begins - begins[0]
        methods = [self._methods[f] for f in group.features]
        if len(read) > 1:
            table = methods[0].compose_all(methods, [read_rows(*own) for own in read], begins.tolist())
            return table, np.arange(len(table), dtype=np.int32)
        # The same row gives the same vector, so each is composed once.
        source, where = read[0]
        firsts, number = distinct_rows(where, len(source))
        segments = np.searchsorted(firsts, begins).tolist()
        return methods[0].compose_all(methods, [read_rows(source, where[firsts])], segments), number

    def _bags(self, group: _Group, ids: Ids, repeat: int = 1) -> np.ndarray:
        """int64 [F of the group * repeat * B + 1], from 0: where bags begin if each feature is read `repeat` times."""
        batch = ids.batch_size
        if ids.offsets is None:
            return np.arange(len(group.features) * repeat * batch + 1)
        positions = np.repeat(self._positions_in(ids)[list(group.features)], repeat)
        sizes = np.diff(ids.offsets).reshape(len(ids), batch)[positions]
        return np.concatenate([np.zeros(1, np.int64), np.cumsum(sizes)])

    def _positions_in(self, ids: Ids) -> np.ndarray:
        if self._positions[0] != ids.features:
            places = {name: i for i, name in enumerate(ids.features)}
            columns = [feature.column or feature.name for feature in self.features]
            if missing := [name for name in columns if name not in places]:
                raise EmbeddingError(
                    f"the batch has no ids for feature {missing[0]!r}: it holds {', '.join(ids.features) or 'none'}"
                )
            self._positions = (ids.features, np.array([places[name] for name in columns], np.int64))
        return self._positions[1]

    def _block_rank(self) -> np.ndarray:
        block_map = self.store.block_map
        if self._rank[0] != block_map.epoch:
            self._rank = (block_map.epoch, block_map.rank())
        return self._rank[1]


def distinct_tables(methods: Sequence[Method]) -> list[TableSpec]:
    """Every table once; one that several features read is declared by each of them.

    Raises:
        EmbeddingError: two features declare one table differently.
    """
    tables: dict[str, TableSpec] = {}
    for method in methods:
        for table in method.tables:
            other = tables.setdefault(table.name, table)
            if other != table:
                raise EmbeddingError(
                    f"feature {method.feature.name!r}: table {table.name} would be {table.rows} x {table.width}, but "
                    f"features before it share it as {other.rows} x {other.width}: give all features of method "
                    f"{method.feature.method} the same dim and sizes"
                )
    return list(tables.values())


def _common_output(methods: Sequence[Method]) -> Literal["feature", "sample"]:
    """Raises EmbeddingError: one vector per sample beside something else."""
    first = methods[0]
    for method in methods:
        if method.output != first.output:
            per_sample, other = (method, first) if method.output == "sample" else (first, method)
            raise EmbeddingError(
                f"feature {other.feature.name!r}: method {other.feature.method} has a vector of its own, while method "
                f"{per_sample.feature.method} makes one vector per sample of all features: use it for every feature, "
                f"or set embedding.scope=field"
            )
        if method.output == "sample" and method.together() != first.together():
            raise EmbeddingError(
                f"feature {method.feature.name!r}: a vector per sample of all features needs the same "
                f"embedding.hashes and embedding.weight_hashes for each of them"
            )
    return first.output


class _Arrangement:
    """Which lookups go to which slab, in which order, and which features are composed together.

    Features whose vector is a row come first, those of one slab and pooling in one piece, so that a single gather
    serves all of them.
    """

    def __init__(self, methods: Sequence[Method], store: Store) -> None:
        self._methods = methods
        self._layout = store.layout
        self._lookups: dict[int, list[tuple[int, int, Lookup]]] = {}  # by slab, in the order in which they are read

    def result(self) -> tuple[list[SlabLookups], list[_Group]]:
        groups = [self._group(members) for members in self._together()]
        features = [method.feature for method in self._methods]
        return [SlabLookups(slab, features, own) for slab, own in self._lookups.items()], groups

    def _together(self) -> list[list[int]]:
        """Numbers of the features that are composed in one call, rows first."""
        rows: dict[Hashable, list[int]] = {}
        others: dict[Hashable, list[int]] = {}
        for f, method in enumerate(self._methods):
            slabs = tuple(self._slab(f, lookup) for lookup in method.lookups)
            if method.output == "sample":
                others.setdefault("sample", []).append(f)
            elif method.is_row:
                rows.setdefault((*slabs, method.feature.pooling), []).append(f)
            else:
                same = method.together()
                alone = f if same is None else None
                others.setdefault((type(method), same, slabs, method.feature.pooling, alone), []).append(f)
        return [*rows.values(), *others.values()]

    def _group(self, members: list[int]) -> _Group:
        first = self._methods[members[0]]
        pooling, features = first.feature.pooling, tuple(members)
        if first.output == "sample":
            reads = []
            for table in range(len(first.tables)):
                own = [(f, n) for f in members for n in self._methods[f].lookups if n.table == table]
                reads.append(self._add(own))
            return _Group("sample", features, tuple(reads), pooling)
        by_lookup = [
            self._add([(f, self._methods[f].lookups[number]) for f in members]) for number in range(len(first.lookups))
        ]
        return _Group("row" if first.is_row else "composed", features, tuple(by_lookup), pooling)

    def _slab(self, feature: int, lookup: Lookup) -> int:
        return self._layout.ref(self._methods[feature].tables[lookup.table].name).slab

    def _add(self, lookups: Sequence[tuple[int, Lookup]]) -> _Read:
        """Lookups of one slab, (number of the feature, lookup), as neighbours."""
        slab = self._slab(*lookups[0])
        own = self._lookups.setdefault(slab, [])
        begin = len(own)
        for feature, lookup in lookups:
            ref = self._layout.ref(self._methods[feature].tables[lookup.table].name)
            own.append((feature, ref.table, lookup))
        return _Read(list(self._lookups).index(slab), begin, len(lookups))
