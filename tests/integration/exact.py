"""The table of tests that compare with a model: sums of whole-numbered gradients are exact in any order."""

from __future__ import annotations

from embershard.parameter_server.tables import Initializer, Optimizer, TableSpec


def exact_table(rows: int, width: int) -> TableSpec:
    zero = Initializer(kind="constant", scale=0.0)
    return TableSpec(name="items", rows=rows, width=width, initializer=zero, optimizer=Optimizer(kind="sgd"))
