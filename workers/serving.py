"""A trained network without its store: the module that is exported, and what each feature becomes in it."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ..parameter_server.store import Store
from .embeddings.base import Method, RowMap
from .embeddings.collapse import collapse, table_pieces
from .embeddings.projected import Projected
from .models.base import Model
from .network import Network

_LOW = 0xFFFFFFFF
_NOWHERE = 1 << 62  # beyond every table


@dataclass(frozen=True)
class ServedTable:
    """A table as it is served; `source`: the method whose composed vectors are its rows, None for a stored table."""

    name: str
    rows: int
    width: int
    source: Projected | None

    def pieces(self, store: Store) -> Iterator[np.ndarray]:
        """The rows in their order, float32 [some, width] at a time."""
        return table_pieces(store, self.name) if self.source is None else collapse(store, self.source)


@dataclass(frozen=True)
class ServedFeature:
    """A feature as it is served: (table, row map) of each lookup; collapsed: the vector is the row."""

    method: Method
    lookups: tuple[tuple[ServedTable, RowMap], ...]
    collapsed: bool

    @property
    def composed(self) -> bool:
        return not (self.collapsed or self.method.is_row)


def serve(method: Method) -> ServedFeature:
    """The smallest form that answers as in training: MLET's product where it is no larger than its factors."""
    if isinstance(method, Projected):
        table, dim = method.tables[0], method.feature.dim
        if table.rows * dim <= method.parameter_count:
            vectors = ServedTable(f"{method.feature.name}.collapsed", table.rows, dim, method)
            return ServedFeature(method, ((vectors, method.lookups[0].map),), True)
    tables = [ServedTable(table.name, table.rows, table.width, None) for table in method.tables]
    return ServedFeature(method, tuple((tables[one.table], one.map) for one in method.lookups), False)


def served_features(network: Network) -> list[ServedFeature]:
    return [serve(method) for method in network.embeddings.methods if isinstance(method, Method)]


def served_tables(features: Sequence[ServedFeature]) -> list[ServedTable]:
    """Each table once, in the order of the first lookup that reads it."""
    return list({table.name: table for feature in features for table, _ in feature.lookups}.values())


def embedding_parameters(features: Sequence[ServedFeature]) -> int:
    """Numbers that the exported embeddings consist of."""
    dense = sum(p.numel() for feature in features if feature.composed for p in feature.method.parameters())
    return dense + sum(table.rows * table.width for table in served_tables(features))


class ServingNetwork(nn.Module):
    """dense float32 [B, D], ids int64 [B, F] in the order of the features -> logits [B]; one id per feature.

    tables: the rows of `served_tables(features)`, by name. An id outside its cardinality reads beyond the table, which
    is an error of the runtime, never another id's row.
    """

    def __init__(self, features: Sequence[ServedFeature], tables: Mapping[str, Tensor], model: Model) -> None:
        super().__init__()
        self.features = tuple(features)
        names = list(tables)
        self.tables = nn.ParameterList(nn.Parameter(table, requires_grad=False) for table in tables.values())
        self.methods = nn.ModuleList(feature.method if feature.composed else nn.Identity() for feature in features)
        self.model = model
        self.per_sample = features[0].method.output == "sample"
        # Where the rows of each feature's lookups stand among those of all.
        self._places: list[list[tuple[int, int]]] = [[] for _ in features]
        maps: list[tuple[int, RowMap]] = []
        for f, feature in enumerate(features):
            for table, row_map in feature.lookups:
                self._places[f].append((names.index(table.name), len(maps)))
                maps.append((f, row_map))
        self.maps = RowMaps(maps)

    def forward(self, dense: Tensor, ids: Tensor) -> Tensor:
        logits: Tensor = self.model(dense, self.vectors(ids))
        return logits

    def vectors(self, ids: Tensor) -> Tensor:
        """[B, F, d], or [B, d] of methods with one vector per sample."""
        rows = self.maps(ids)
        read = [[F.embedding(rows[:, at], self.tables[table]) for table, at in places] for places in self._places]
        if self.per_sample:
            sums: dict[int, Tensor] = {}
            for places, own in zip(self._places, read, strict=True):
                for (table, _), one in zip(places, own, strict=True):
                    sums[table] = sums[table] + one if table in sums else one
            return self.features[0].method.compose_sample(list(sums.values()))
        pairs = zip(self.features, read, strict=True)
        return torch.stack([f.method.compose(own) if f.composed else own[0] for f, own in pairs], 1)


class RowMaps(nn.Module):
    """ids [B, F] -> rows [B, L] of L lookups: `kernels.map_ids` in torch, of integer operations that ONNX has too.

    maps: (feature, row map) of each lookup.
    """

    order: Tensor
    features: Tensor
    moduli: Tensor
    wrapped: Tensor
    wrap_at: Tensor
    limits: Tensor
    seeds: Tensor
    divisors: Tensor

    def __init__(self, maps: Sequence[tuple[int, RowMap]]) -> None:
        super().__init__()
        hashed = [i for i, (_, m) in enumerate(maps) if m.kind == "hash"]
        indexed = [i for i, (_, m) in enumerate(maps) if m.kind == "index"]
        self.hashed = len(hashed)
        self._hold("order", np.argsort(hashed + indexed).tolist())
        chosen = [maps[i] for i in hashed + indexed]
        self.wraps = any(m.wrap for _, m in chosen)
        self._hold("features", [feature for feature, _ in chosen])
        self._hold("moduli", [m.modulus for _, m in chosen])
        self._hold("wrapped", [m.wrap for _, m in chosen])
        self._hold("wrap_at", [m.limit or 1 if m.wrap else 1 for _, m in chosen])
        self._hold("limits", [0 if m.wrap else m.limit or 0 for _, m in chosen])
        self._hold("seeds", [m.seed for _, m in chosen])
        self._hold("divisors", [m.divisor for _, m in chosen])

    def _hold(self, name: str, values: Sequence[int]) -> None:
        # Never empty: torch.export cannot save a tensor of no elements.
        unsigned = np.array([int(value) for value in values], np.uint64)
        self.register_buffer(name, torch.from_numpy(unsigned.view(np.int64)), persistent=False)

    def forward(self, ids: Tensor) -> Tensor:
        given = ids[:, self.features]
        if self.wraps:
            given = torch.where(self.wrapped > 0, torch.remainder(given, self.wrap_at), given)
        parts = []
        if self.hashed:
            word = _mix(_mix(given[:, : self.hashed]) ^ self.seeds[: self.hashed])
            parts.append(_multiply_high(word, self.moduli[: self.hashed]))
        if self.hashed < len(self.moduli):
            quotient = torch.div(given[:, self.hashed :], self.divisors[self.hashed :], rounding_mode="floor")
            parts.append(torch.remainder(quotient, self.moduli[self.hashed :]))
        outside = (self.limits > 0) & ((given < 0) | (given >= self.limits))
        return torch.where(outside, _NOWHERE, torch.cat(parts, 1))[:, self.order]


def _shift(word: Tensor, bits: int) -> Tensor:
    """To the right, zeros coming in: int64 holds the bits of an unsigned word."""
    return (word >> bits) & ((1 << (64 - bits)) - 1)


def _mix(z: Tensor) -> Tensor:
    z = (z ^ _shift(z, 30)) * (0xBF58476D1CE4E5B9 - 2**64)
    z = (z ^ _shift(z, 27)) * (0x94D049BB133111EB - 2**64)
    return z ^ _shift(z, 31)


def _multiply_high(a: Tensor, b: Tensor) -> Tensor:
    """The upper 64 bits of the product of two unsigned words."""
    a_high, a_low, b_high, b_low = _shift(a, 32), a & _LOW, _shift(b, 32), b & _LOW
    middle = a_high * b_low + _shift(a_low * b_low, 32)
    other = a_low * b_high + (middle & _LOW)
    return a_high * b_high + _shift(middle, 32) + _shift(other, 32)


def load_tables(features: Sequence[ServedFeature], store: Store) -> dict[str, Tensor]:
    """The rows of every served table, float32 [rows, width], in memory."""
    tables = {}
    for table in served_tables(features):
        rows = torch.empty(table.rows, table.width)
        begin = 0
        for piece in table.pieces(store):
            rows[begin : begin + len(piece)] = torch.from_numpy(piece)
            begin += len(piece)
        tables[table.name] = rows
    return tables
