"""`qr`: several small tables whose rows together belong to one id alone (Shi et al. 2020, arXiv 1909.02107)."""

from __future__ import annotations

from collections.abc import Hashable, Sequence

from torch import Tensor

from ...parameter_server.tables import Optimizer, TableSpec
from .base import EmbeddingError, Feature, Lookup, Method, RowMap
from .composition import combine, part_initializer, part_width
from .moduli import Moduli, chinese_remainder, problem, quotient_remainder, smallest, within


class QR(Method):
    """`partition0`, `partition1`, ...: m_1, m_2, ... rows, whose product reaches n; one row of each composes a vector.

    quotient_remainder: row j = (id div (m_1 ... m_(j-1))) mod m_j, so with two of them id mod m_1 and id div m_1.
    chinese_remainder: row j = id mod m_j, pairwise coprime. Without a known cardinality each row is a hash of its own,
    which tells as many ids apart as hashing into a table of m_1 m_2 ... rows would.

    Sizes: `rows` m_1 (the ids that share a row of the quotient table, DLRM's "collisions"; the same for all tables but
    the last), `moduli` for each, or `ratio`. mult and add multiply and add vectors of width d, concat joins vectors of
    width d / k; generate leaves them apart: the model takes each partition's vector as a feature of its own (the
    paper's feature generation; `planning.generated`). A feature with at most `threshold` rows (200, as in DLRM), or
    where qr has no fewer, stays full.
    Bags are pooled after composing; DLRM's code pools each table first, which for mult is another function.
    """

    options = frozenset({"ratio", "rows", "moduli", "operation", "partitions", "scheme", "threshold"})
    threshold = 200

    def __init__(self, feature: Feature, optimizer: Optimizer) -> None:
        operation = feature.operation or "mult"
        moduli = moduli_of(feature, operation)
        own = range(len(moduli)) if feature.part is None else [feature.part]
        tables = [
            TableSpec(
                name=f"{feature.column or feature.name}.partition{j}",
                rows=moduli[j],
                width=part_width(feature, operation, len(moduli)),
                # A vector that stands alone begins as that of a full table of its rows.
                initializer=part_initializer(
                    operation, len(moduli), moduli[j] if operation == "generate" else feature.full_rows
                ),
                optimizer=optimizer,
            )
            for j in own
        ]
        maps = row_maps(feature, moduli)
        super().__init__(feature, tables, [Lookup(i, maps[j]) for i, j in enumerate(own)])
        self.operation = operation

    def compose(self, rows: Sequence[Tensor]) -> Tensor:
        if len(rows) == 1:
            return rows[0]
        if self.operation == "generate":
            raise EmbeddingError(
                f"feature {self.feature.name!r}: operation generate gives {len(rows)} vectors: make a feature of each "
                f"with planning.generated, or choose mult, add or concat"
            )
        return combine(self.operation, rows)

    def together(self) -> Hashable:
        return "qr", self.operation, len(self.lookups)


def row_maps(feature: Feature, moduli: Moduli) -> list[RowMap]:
    """ids to rows of each partition's table."""
    if feature.cardinality is None:
        return [feature.hashed(modulus, f"qr/{j}") for j, modulus in enumerate(moduli)]
    if feature.scheme == "chinese_remainder":
        return [feature.indexed(modulus) for modulus in moduli]
    maps, divisor = [], 1
    for modulus in moduli:
        maps.append(feature.indexed(modulus, divisor))
        divisor *= modulus
    return maps


def moduli_of(feature: Feature, operation: str, sizes: Sequence[str] = ("rows", "moduli", "ratio")) -> Moduli:
    """Rows of each partition's table, from the one of the options `sizes` that is set.

    Raises:
        EmbeddingError: none or several of them, or one that cannot tell all ids apart or cannot be reached.
    """
    coprime = feature.scheme == "chinese_remainder"
    family = chinese_remainder if coprime else quotient_remainder
    given = [option for option in sizes if getattr(feature, option) is not None]
    if len(given) != 1:
        raise EmbeddingError(
            f"feature {feature.name!r}: method {feature.method} needs one of "
            f"{', '.join(f'embedding.{option}' for option in sizes)}, found {' and '.join(given) or 'none'}"
        )
    n, parts = feature.full_rows, feature.partitions or len(feature.moduli or (0, 0))
    if parts < 2 or parts != len(feature.moduli or range(parts)):
        raise EmbeddingError(
            f"feature {feature.name!r}: method {feature.method} has embedding.partitions=2 or more, one for each of "
            f"embedding.moduli where they are given, not {parts}"
        )
    if feature.moduli is not None:
        if found := problem(feature.moduli, n, coprime=coprime):
            raise EmbeddingError(f"feature {feature.name!r}: embedding.moduli={list(feature.moduli)}: {found}")
        return feature.moduli
    if feature.rows is not None:
        return family(n, parts, feature.rows)
    width = part_width(feature, operation, parts)
    moduli = within(n, parts, feature.budget // width, family)
    if moduli is None:
        raise feature.unreachable(width * sum(smallest(n, parts, family)[1]))
    return moduli
