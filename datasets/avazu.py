"""Avazu's click log: comma-separated with a header, 22 categorical columns, some in hexadecimal."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Any

import numpy as np

from .convert import BadRows, LineBlocks, Source, convert
from .field_kernels import HEX, LABEL, OPTIONAL, SKIP
from .fields import Layout, read_fields
from .schema import DataError
from .writer import Block

_SITE, _APP = ("site_id", "site_domain", "site_category"), ("app_id", "app_domain", "app_category")
_HEX = (*_SITE, *_APP, "device_id", "device_ip", "device_model")
NAMES = (
    *("id", "click", "hour", "C1", "banner_pos"),
    *_HEX,
    *("device_type", "device_conn_type"),
    *(f"C{k}" for k in range(14, 22)),
)
CATEGORICAL_NAMES = NAMES[2:]
_KINDS = [SKIP, LABEL, *(HEX if name in _HEX else OPTIONAL for name in CATEGORICAL_NAMES)]
_LAYOUT = Layout(NAMES, _KINDS, b",", header=True)


def convert_avazu(
    inputs: Sequence[str],
    output: str,
    *,
    on_bad_rows: str = "fail",
    progress: Callable[[int, int], None] | None = None,
) -> dict[str, Any]:
    """Converts Avazu's `train` files to Parquet: label and the 22 columns from `hour` to `C21` as int64 ids.

    Hexadecimal ids are taken as numbers; -1 is a missing value; `id` is left out. Arguments, result and errors as
    `convert_criteo`.
    """
    source = Source("avazu", (), CATEGORICAL_NAMES, parse)
    return convert(source, inputs, output, on_bad_rows=on_bad_rows, progress=progress)


def parse(text: LineBlocks, bad: BadRows) -> Iterator[Block]:
    """Blocks of one file."""
    header = text.peek().partition(b"\n")[0].rstrip(b"\r").decode("latin-1")
    if tuple(header.split(",")) != NAMES:
        raise DataError(f"{text.name}, line 1: the header must be {','.join(NAMES[:5])}, ..., C21 (24 columns)")
    for values, null in read_fields(text, bad, _LAYOUT):
        nothing = np.empty((0, values.shape[1]), np.int32)
        yield Block(values[1].astype(np.int8), nothing, nothing.astype(np.bool_), values[2:], null[2:])
