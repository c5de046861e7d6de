"""The lookup of an exported file in numpy alone. docs/export.md shows this file from the imports on: keep it short."""

import json
from collections.abc import Mapping
from typing import Any

import numpy as np
from safetensors import safe_open

U64, LOW = np.uint64, np.uint64(0xFFFFFFFF)
OPERATIONS: Mapping[str, Any] = {
    "add": np.add,
    "mul": np.multiply,
    "matmul": np.matmul,
    "concat": lambda *parts: np.concatenate(parts, 1),
}


def open_export(path: str) -> tuple[dict[str, Any], dict[str, np.ndarray]]:
    """(description, tensors by name) of a file that `embershard export` wrote."""
    with safe_open(path, "numpy") as file:
        return json.loads(file.metadata()["embershard"]), {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118


def mix(z: np.ndarray) -> np.ndarray:
    """The finaliser of SplitMix64, on uint64 words that wrap."""
    z = (z ^ (z >> U64(30))) * U64(0xBF58476D1CE4E5B9)
    z = (z ^ (z >> U64(27))) * U64(0x94D049BB133111EB)
    mixed: np.ndarray = z ^ (z >> U64(31))
    return mixed


def rows_of(ids: np.ndarray, lookup: dict[str, Any]) -> np.ndarray:
    """int64 ids [N] -> rows [N] of the lookup's table."""
    modulus, limit = lookup["modulus"], lookup["limit"]
    if lookup["wrap"]:
        ids = ids % limit
    elif limit is not None and len(ids) and (ids.min() < 0 or ids.max() >= limit):
        raise ValueError(f"{lookup['table']}: ids must lie in [0, {limit})")
    if lookup["kind"] == "hash":  # the upper 64 bits of the 128-bit product word * modulus
        word, m = mix(mix(ids.astype(U64)) ^ U64(int(lookup["seed"]))), U64(modulus)
        middle = (word >> U64(32)) * (m & LOW) + (((word & LOW) * (m & LOW)) >> U64(32))
        other = (word & LOW) * (m >> U64(32)) + (middle & LOW)
        high: np.ndarray = (word >> U64(32)) * (m >> U64(32)) + (middle >> U64(32)) + (other >> U64(32))
        return high.astype(np.int64)
    rows: np.ndarray = ids // lookup["divisor"] % modulus
    return rows


def compose(steps: list[list[str]], values: dict[str, np.ndarray], tensors: Mapping[str, np.ndarray]) -> np.ndarray:
    """The last step's result; without steps the only row that was read."""
    result = values["row0"]
    for name, operation, *inputs in steps:
        result = OPERATIONS[operation](*(values[i] if i in values else tensors[i] for i in inputs))
        values[name] = result
    return result


def lookup(description: dict[str, Any], tensors: Mapping[str, np.ndarray], ids: Mapping[str, np.ndarray]) -> np.ndarray:
    """int64 ids [B] by feature -> float32 [B, F, d] in the order of the features, or [B, d] if it is per sample."""
    vectors: list[np.ndarray] = []
    sums: dict[str, np.ndarray] = {}
    for feature in description["features"]:
        values = {}
        for i, one in enumerate(feature["lookups"]):
            values[f"row{i}"] = rows = tensors[one["table"]][rows_of(ids[feature["name"]], one)]
            sums[one["table"]] = sums.get(one["table"], np.float32(0)) + rows
        if description["output"] == "feature":
            vectors.append(compose(feature["compose"], values, tensors))
    if description["output"] == "feature":
        return np.stack(vectors, 1)
    return compose(description["compose"], {f"row{i}": total for i, total in enumerate(sums.values())}, tensors)
