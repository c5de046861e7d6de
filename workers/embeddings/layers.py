"""The methods alone: modules that stand in for torch.nn.EmbeddingBag, without a store.

A layer holds a method's tables as parameters. Ids become rows as on the store, `Method.compose` is the same code, and
initial values are those of a store of the same seed and table name, so whatever trains here trains there.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar, Literal, Unpack

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ...parameter_server.kernels import initialise_share, rows_of_share
from ...parameter_server.memory import reserve
from ...parameter_server.store import Store
from ...parameter_server.tables import Optimizer, TableSpec
from .base import EmbeddingError, Feature
from .layers_arguments import Common, Mode, check_ids, feature_of, in_own_words, refuse
from .layers_stored import StoredTables
from .planning import METHODS, check_options
from .torch_rows import map_rows


class Layer(nn.Module):
    """What stands in for torch.nn.EmbeddingBag. Each id's vector is composed first; bags are pooled after that.

    Arguments are torch's, by name or in torch's order; sizes and what is ours follow by name.

    num_embeddings: ids lie in [0, num_embeddings). embedding_dim: d. mode: how a bag's vectors become one ("mean" as in
    torch). padding_idx: an id that bags leave out. _weight: the table itself, for `Full` only. max_norm,
    scale_grad_by_freq, sparse: errors, unless as torch has them by default. out_of_range: ids beyond are an error, or
    taken modulo. seed and name: a table's initial values are those of the table `name.ROLE` in a store of that seed;
    ROLE is also the name of its parameter. dtype: of the parameters; values are drawn in float32. Where ids are hashed,
    `hash_seeds` in the state keeps a layer that hashes otherwise from loading it.

    store: the tables live there, from the same initial values on, and are trained by `step` with `optimizer`
    (row-wise Adagrad without one), never by a torch optimizer; the layer's parameters are then the method's dense ones,
    on the CPU in float32. For several features over one store `EmbeddingBagCollection` is quicker: one message for all.

    Raises:
        EmbeddingError: sizes that the method cannot work with, or an argument of torch's that no layer honours.
    """

    hash_seeds: Tensor
    # What the options of a run's `embedding` section are called here.
    words: ClassVar[Mapping[str, str]] = {}

    def __init__(
        self,
        method: str,
        num_embeddings: int,
        embedding_dim: int,
        sizes: Mapping[str, Any],
        max_norm: float | None = None,
        norm_type: float = 2.0,
        scale_grad_by_freq: bool = False,
        mode: Mode = "mean",
        sparse: bool = False,
        _weight: Tensor | None = None,
        include_last_offset: bool = False,
        padding_idx: int | None = None,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
        *,
        out_of_range: Literal["error", "modulo"] = "error",
        seed: int = 0,
        name: str = "embedding",
        store: Store | None = None,
        optimizer: Optimizer | None = None,
    ) -> None:
        super().__init__()
        if mode not in ("sum", "mean", "max"):
            raise EmbeddingError(f"mode: {mode!r} is none of sum, mean and max")
        refuse(max_norm, scale_grad_by_freq, sparse)
        options = {"out_of_range": out_of_range, "seed": seed, **sizes}
        shape = {"method": method, "cardinality": num_embeddings, "dim": embedding_dim}
        feature = feature_of(self.words, name=name, **shape, **options)
        if padding_idx is not None and not -num_embeddings <= padding_idx < num_embeddings:
            raise EmbeddingError(f"padding_idx: {padding_idx} lies outside the {num_embeddings} ids")
        if _weight is not None and (method != "full" or store is not None):
            raise EmbeddingError("_weight: only Full without a store has the table that this would be; leave it out")
        if _weight is not None and _weight.shape != (num_embeddings, embedding_dim):
            raise EmbeddingError(f"_weight: has {list(_weight.shape)}, not {[num_embeddings, embedding_dim]}")
        self.num_embeddings = num_embeddings
        self.embedding_dim = embedding_dim
        self.mode = mode
        self.padding_idx = None if padding_idx is None else padding_idx % num_embeddings
        self.include_last_offset = include_last_offset
        self.stored = None
        try:
            check_options(feature)
            if store is not None:
                self.stored = StoredTables(feature, mode, _suits(store, feature, device, dtype), optimizer)
                return
            self.method = METHODS[method](feature, Optimizer()).to(device=device, dtype=dtype)
        except EmbeddingError as error:
            error.args = (in_own_words(str(error), name, self.words),)
            raise
        for table in self.method.tables:
            values = torch.empty(table.rows, table.width, device=device, dtype=dtype) if _weight is None else _weight
            self.register_parameter(_role(table), nn.Parameter(values))
        if (seeds := self._hash_seeds()).numel():
            self.register_buffer("hash_seeds", seeds.to(device))
        if _weight is None:
            self.reset_parameters()

    @torch.no_grad()
    def reset_parameters(self) -> None:
        """Gives the tables their initial values; those of a store keep what they have."""
        if self.stored is not None:
            return
        if "hash_seeds" in self._buffers and self.hash_seeds.device.type != "meta":
            self.hash_seeds.copy_(self._hash_seeds())
        for table in self.method.tables:
            parameter = self.get_parameter(_role(table))
            if parameter.device.type != "meta":
                parameter.copy_(torch.from_numpy(initial_rows(table, self.method.feature.seed)))

    def forward(self, input: Tensor, offsets: Tensor | None = None, per_sample_weights: Tensor | None = None) -> Tensor:
        """Vectors [B, d] of bags: as torch.nn.EmbeddingBag takes them, ids [B, L], or ids [N] with offsets [B].

        input: int64 or int32. offsets: where each bag begins; with `include_last_offset` also where the last one ends.
        per_sample_weights: one per id, with mode "sum" only. An empty bag gives zeros.

        Raises:
            EmbeddingError: an id outside [0, num_embeddings) (on a GPU and when compiled a RuntimeError, without it);
                ids of another dtype.
            ValueError: shapes that do not go together.
        """
        check_ids(input, offsets)
        if self.stored is not None:
            last, padding = self.include_last_offset, self.padding_idx
            out: Tensor = self.stored(input, offsets, per_sample_weights, last=last, padding=padding)
            return out
        ids = input.reshape(-1).long()
        vectors = self.compose(self._checked(ids))
        places = torch.arange(len(ids), device=ids.device)
        padding = None
        if self.padding_idx is not None:
            # A row of its own for what bags leave out: its values are never read.
            padding = len(ids)
            places = torch.where(ids == self.padding_idx, padding, places)
            vectors = F.pad(vectors, (0, 0, 0, 1))

        def pooled(rows: Tensor, mode: str) -> Tensor:
            return F.embedding_bag(
                places.view_as(input),
                rows,
                None if offsets is None else offsets.long(),
                mode=mode,
                per_sample_weights=per_sample_weights,
                include_last_offset=self.include_last_offset,
                padding_idx=padding,
            )

        if self.mode != "mean" or per_sample_weights is not None:
            return pooled(vectors, self.mode)
        # Divided as on the store; torch's kernel multiplies by the reciprocal, which rounds otherwise.
        sizes = pooled(torch.ones(len(vectors), 1, device=ids.device), "sum")
        return pooled(vectors, "sum") / sizes.clamp_(min=1).to(vectors.dtype)

    def step(self, learning_rate: float | None = None) -> None:
        """With a store: sends the gradients of everything forwarded since the last step.

        Raises:
            EmbeddingError: no store; torch's optimizers train the parameters. GradientError, StoreError: as
                `EmbeddingBagCollection.step`.
        """
        if self.stored is None:
            raise EmbeddingError("step: this layer has no store; give its parameters to an optimizer of torch")
        self.stored.collection.step(learning_rate)

    def compose(self, ids: Tensor) -> Tensor:
        """The vectors [N, d] of ids int64 [N], before any pooling."""
        tables = [self.get_parameter(_role(table)) for table in self.method.tables]
        return self.method.compose(
            [F.embedding(map_rows(own.map, ids), tables[own.table]) for own in self.method.lookups]
        )

    def _checked(self, ids: Tensor) -> Tensor:
        """Raises EmbeddingError: an id outside [0, num_embeddings), where such ids are not taken modulo."""
        if not any(own.map.limit and not own.map.wrap for own in self.method.lookups):
            return ids
        inside = (ids >= 0) & (ids < self.num_embeddings)
        if torch.compiler.is_compiling() or ids.device.type != "cpu":
            torch._assert_async(inside.all(), "an id lies outside [0, num_embeddings)")
        elif not inside.all():
            raise EmbeddingError(
                f"id {int(ids[~inside][0])} lies outside [0, {self.num_embeddings}): give the layer more "
                f"num_embeddings, or out_of_range='modulo'"
            )
        return ids

    def _hash_seeds(self) -> Tensor:
        """int64 [hashed lookups]: kept in the state, for rows mean nothing to a layer that hashes otherwise."""
        seeds = [own.map.seed for own in self.method.lookups if own.map.kind == "hash"]
        return torch.from_numpy(np.array(seeds, np.uint64).view(np.int64))

    def _load_from_state_dict(self, state_dict: dict[str, Tensor], prefix: str, *rest: Any) -> None:
        if isinstance(self, Full) and f"{prefix}weight" in state_dict:  # saved by torch.nn.EmbeddingBag
            state_dict[f"{prefix}full"] = state_dict.pop(f"{prefix}weight")
        saved = state_dict.get(f"{prefix}hash_seeds")
        if saved is not None and not torch.equal(saved.cpu(), self._hash_seeds()):
            *_, errors = rest
            errors.append(f"{prefix}hash_seeds: saved by a layer of another seed or name, which hashes ids otherwise")
        super()._load_from_state_dict(state_dict, prefix, *rest)

    def extra_repr(self) -> str:
        return f"{self.num_embeddings}, {self.embedding_dim}, mode={self.mode!r}, padding_idx={self.padding_idx}"


class Full(Layer):
    """One row per id: parameter `full`, num_embeddings x d. Loads the state of a torch.nn.EmbeddingBag too."""

    def __init__(self, num_embeddings: int, embedding_dim: int, *bag: Any, **common: Unpack[Common]) -> None:
        super().__init__("full", num_embeddings, embedding_dim, {}, *bag, **common)


class Hash(Layer):
    """The hashing trick: parameter `hashed`. Takes hashed_rows or ratio; see `workers.embeddings.hash.Hash`."""

    words: ClassVar = {"rows": "hashed_rows"}

    def __init__(
        self,
        num_embeddings: int,
        embedding_dim: int,
        *bag: Any,
        hashed_rows: int | None = None,
        ratio: float | None = None,
        **common: Unpack[Common],
    ) -> None:
        super().__init__("hash", num_embeddings, embedding_dim, {"rows": hashed_rows, "ratio": ratio}, *bag, **common)


class QR(Layer):
    """Quotient and remainder, and their generalisation: parameters `partition0`, `partition1`, ...

    Takes remainder_rows, moduli or ratio; see `workers.embeddings.qr.QR`.
    """

    words: ClassVar = {"rows": "remainder_rows"}

    def __init__(
        self,
        num_embeddings: int,
        embedding_dim: int,
        *bag: Any,
        remainder_rows: int | None = None,
        moduli: tuple[int, ...] | None = None,
        ratio: float | None = None,
        operation: Literal["mult", "add", "concat"] = "mult",
        partitions: int | None = None,
        scheme: Literal["quotient_remainder", "chinese_remainder"] = "quotient_remainder",
        **common: Unpack[Common],
    ) -> None:
        if operation not in ("mult", "add", "concat"):
            raise EmbeddingError(f"operation: {operation!r} is none of mult, add and concat")
        sizes = {"rows": remainder_rows, "moduli": moduli, "ratio": ratio, "partitions": partitions}
        shape = {"operation": operation, "scheme": scheme}
        super().__init__("qr", num_embeddings, embedding_dim, {**sizes, **shape}, *bag, **common)


class QRPath(Layer):
    """A row of `base` through functions that the remainders choose. Takes remainder_rows or moduli.

    inner_dim: hidden units of a function; None: one matrix. See `workers.embeddings.qr_path.QRPath`.
    """

    words: ClassVar = {"rows": "remainder_rows"}

    def __init__(
        self,
        num_embeddings: int,
        embedding_dim: int,
        *bag: Any,
        remainder_rows: int | None = None,
        moduli: tuple[int, ...] | None = None,
        partitions: int | None = None,
        inner_dim: int | None = None,
        **common: Unpack[Common],
    ) -> None:
        sizes = {"rows": remainder_rows, "moduli": moduli, "partitions": partitions, "inner_dim": inner_dim}
        super().__init__("qr_path", num_embeddings, embedding_dim, sizes, *bag, **common)


class MEmCom(Layer):
    """Shared rows times one weight per id: parameters `hashed`, `weight` and with bias=True `bias`.

    Takes hashed_rows or ratio; see `workers.embeddings.memcom.MEmCom`.
    """

    words: ClassVar = {"rows": "hashed_rows"}

    def __init__(
        self,
        num_embeddings: int,
        embedding_dim: int,
        *bag: Any,
        hashed_rows: int | None = None,
        ratio: float | None = None,
        bias: bool = False,
        hashing: Literal["modulo", "seeded"] = "modulo",
        **common: Unpack[Common],
    ) -> None:
        sizes = {"rows": hashed_rows, "ratio": ratio, "bias": bias, "hashing": hashing}
        super().__init__("memcom", num_embeddings, embedding_dim, sizes, *bag, **common)


class DoubleHash(Layer):
    """Two hashed rows per id: parameter `hashed0`, with tables=2 also `hashed1`.

    Takes hashed_rows (of each table) or ratio; see `workers.embeddings.double_hash.DoubleHash`.
    """

    words: ClassVar = {"rows": "hashed_rows", "partitions": "tables"}

    def __init__(
        self,
        num_embeddings: int,
        embedding_dim: int,
        *bag: Any,
        hashed_rows: int | None = None,
        ratio: float | None = None,
        operation: Literal["add", "mult", "concat"] = "add",
        tables: Literal[1, 2] = 1,
        **common: Unpack[Common],
    ) -> None:
        sizes = {"rows": hashed_rows, "ratio": ratio, "operation": operation, "partitions": tables}
        super().__init__("double_hash", num_embeddings, embedding_dim, sizes, *bag, **common)


def _suits(store: Store, feature: Feature, device: Any, dtype: torch.dtype | None) -> Store:
    """Raises EmbeddingError: the store draws or holds other numbers than this layer was asked for."""
    if store.layout.seed != feature.seed:
        raise EmbeddingError(f"seed: {feature.seed} beside the store's {store.layout.seed}: give both the same")
    if dtype not in (None, torch.float32) or torch.device(device or "cpu").type != "cpu":
        raise EmbeddingError("store: a layer on a store has vectors in float32 on the CPU; leave device and dtype out")
    return store


def initial_rows(table: TableSpec, seed: int) -> np.ndarray:
    """float32 [rows, width], in row order: what a store of that seed gives the table."""
    share, order = np.empty((table.rows, table.width), np.float32), np.empty(table.rows, np.int64)
    initialise_share(share, table, 0, 1, seed)
    rows_of_share(0, 1, table.rows, np.uint64(table.key), order)
    # At the beginning of a page, so that no row lies across more cache lines than it must, and in huge pages.
    space = reserve(share.nbytes, f"table {table.name!r}", huge_pages=True)
    rows = np.frombuffer(space, np.float32, count=share.size).reshape(share.shape)
    rows[order] = share
    return rows


def _role(table: TableSpec) -> str:
    return table.name.rpartition(".")[2]
