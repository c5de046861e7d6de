"""The three formats of an export: each writes a file, and opens it again as (dense, ids) -> logits.

docs/export.md describes the safetensors file; `export_lookup` reads it without torch.
"""

from __future__ import annotations

import json
import logging
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.fx.experimental.proxy_tensor import make_fx

from ..parameter_server.store import Store
from . import export_lookup
from .embeddings.base import EmbeddingError, Method
from .network import Network
from .serving import ServedFeature, ServingNetwork, load_tables, served_tables

FORMATS = ("safetensors", "torch", "onnx")
ONNX_BYTES = 2_000_000_000  # protobuf's limit for a message is 2 GiB
# What a description may say of a composition, by torch's name of the operation.
_OPERATIONS = {
    torch.ops.aten.add.Tensor: "add",
    torch.ops.aten.mul.Tensor: "mul",
    torch.ops.aten.mm.default: "matmul",
    torch.ops.aten.cat.default: "concat",
}

Answer = Callable[[Tensor, Tensor], np.ndarray]


class ExportError(ValueError):
    """An export that cannot be made: the message says what would work."""


class ExportDiffers(RuntimeError):
    """A written model does not answer as the trained one."""


@dataclass(frozen=True)
class Entry:
    """A float32 tensor of a safetensors file, and its values in their order, piece by piece."""

    name: str
    shape: tuple[int, ...]
    pieces: Callable[[], Iterator[np.ndarray]]

    @property
    def bytes(self) -> int:
        return 4 * int(np.prod(self.shape, dtype=np.int64))


def entries(network: Network, features: Sequence[ServedFeature], store: Store) -> list[Entry]:
    """table/NAME, and dense/NAME for the model and for what methods compose with."""

    def of_table(table: Any) -> Entry:
        return Entry(f"table/{table.name}", (table.rows, table.width), lambda: table.pieces(store))

    def of_parameter(name: str, value: Tensor) -> Entry:
        return Entry(f"dense/{name}", tuple(value.shape), lambda: iter([value.detach().cpu().numpy()]))

    found = [of_table(table) for table in served_tables(features)]
    found += [of_parameter(f"model.{name}", value) for name, value in network.model.named_parameters()]
    for feature in features:
        if feature.composed:
            own = feature.method.named_parameters(prefix=feature.method.feature.name)
            found += [of_parameter(name, value) for name, value in own]
    return found


def description(network: Network, features: Sequence[ServedFeature]) -> dict[str, Any]:
    """What docs/export.md calls the description.

    Raises:
        EmbeddingError: a method composes with an operation that the description has no word for.
    """
    spec = network.spec
    described = []
    for served in features:
        feature = served.method.feature
        lookups = [
            {
                "table": f"table/{table.name}",
                "kind": m.kind,
                "modulus": m.modulus,
                "divisor": m.divisor,
                "limit": m.limit,
                "wrap": m.wrap,
                "seed": str(m.seed),
            }
            for table, m in served.lookups
        ]
        per_id = served.composed and network.embeddings.output == "feature"
        described.append(
            {
                "name": feature.name,
                "method": feature.method,
                "dim": feature.dim,
                "pooling": feature.pooling,
                "lookups": lookups,
                "compose": _steps(served.method, [table.width for table, _ in served.lookups]) if per_id else [],
            }
        )
    whole: dict[str, Any] = {"format": 1, "output": network.embeddings.output, "features": described}
    if network.embeddings.output == "sample":
        widths = [table.width for table in served_tables(features)]
        whole["compose"] = _steps(features[0].method, widths, per_sample=True)
    columns = {"dense": spec.data.dense_names, "dense_transform": spec.data.dense_transform, "label": spec.data.label}
    return whole | columns | {"model": spec.model.model_dump(mode="json")}


def _steps(method: Method, widths: Sequence[int], *, per_sample: bool = False) -> list[list[str]]:
    """[result, operation, input, ...] of each step of a composition, traced; the last result is the vector."""
    parameters = dict(method.named_parameters())
    names = list(parameters)

    def run(values: Sequence[Tensor], rows: Sequence[Tensor]) -> Tensor:
        given = {f"method.{name}": value for name, value in zip(names, values, strict=True)}
        out: Tensor = torch.func.functional_call(_Composition(method, per_sample), given, (list(rows),))
        return out

    rows = [torch.zeros(3, width) for width in widths]
    traced = make_fx(run)([p.detach() for p in parameters.values()], rows)
    inputs = [f"dense/{method.feature.name}.{name}" for name in names] + [f"row{i}" for i in range(len(widths))]
    known: dict[Any, str] = {}
    steps: list[list[str]] = []
    for node in traced.graph.nodes:
        if node.op == "placeholder":
            known[node] = inputs[len(known)]
        elif node.op == "call_function":
            operation = _OPERATIONS.get(node.target)
            parts, rest = (node.args[0], node.args[1:]) if operation == "concat" else (node.args, (1,))
            if operation is None or node.kwargs or rest not in ((1,), (-1,)) or any(p not in known for p in parts):
                raise EmbeddingError(
                    f"feature {method.feature.name!r}: method {method.feature.method} composes with {node.target}, "
                    f"which the safetensors layout has no word for: use --format torch or --format onnx"
                )
            known[node] = f"step{len(steps)}"
            steps.append([known[node], operation, *(known[part] for part in parts)])
    return steps


class _Composition(torch.nn.Module):
    """A method's composition as a module's forward, so that its parameters can be replaced."""

    def __init__(self, method: Method, per_sample: bool) -> None:
        super().__init__()
        self.method = method
        self.per_sample = per_sample

    def forward(self, rows: Sequence[Tensor]) -> Tensor:
        return self.method.compose_sample(rows) if self.per_sample else self.method.compose(rows)


def header_of(found: Sequence[Entry], described: Mapping[str, Any]) -> bytes:
    """The beginning of a safetensors file: its length, then where each tensor stands."""
    header: dict[str, Any] = {"__metadata__": {"embershard": json.dumps(described)}}
    begin = 0
    for entry in found:
        end = begin + entry.bytes
        header[entry.name] = {"dtype": "F32", "shape": list(entry.shape), "data_offsets": [begin, end]}
        begin = end
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    return len(text).to_bytes(8, "little") + text


def write_safetensors(path: Path, found: Sequence[Entry], described: Mapping[str, Any]) -> None:
    """Table by table and piece by piece: no table is ever held whole."""
    with path.open("wb") as file:
        file.write(header_of(found, described))
        for entry in found:
            for piece in entry.pieces():
                file.write(np.ascontiguousarray(piece, "<f4").tobytes())


def open_safetensors(path: Path, network: Network) -> Answer:
    """Vectors by `export_lookup`, the model with the file's own weights."""
    described, tensors = export_lookup.open_export(str(path))
    prefix = "dense/model."
    weights = {n.removeprefix(prefix): torch.from_numpy(t) for n, t in tensors.items() if n.startswith(prefix)}
    names = [feature["name"] for feature in described["features"]]

    def answer(dense: Tensor, ids: Tensor) -> np.ndarray:
        columns = {name: ids[:, f].numpy() for f, name in enumerate(names)}
        vectors = torch.from_numpy(export_lookup.lookup(described, tensors, columns))
        out: np.ndarray = torch.func.functional_call(network.model, weights, (dense, vectors)).numpy()
        return out

    return answer


def serving_network(network: Network, features: Sequence[ServedFeature], store: Store) -> ServingNetwork:
    """With the tables in memory."""
    return ServingNetwork(features, load_tables(features, store), network.model).eval()


def write_torch(path: Path, module: ServingNetwork, example: tuple[Tensor, Tensor]) -> None:
    batch = torch.export.Dim("batch")
    with _quietly():
        program = torch.export.export(module, example, dynamic_shapes=({0: batch}, {0: batch}))
        torch.export.save(program, path)


def open_torch(path: Path, network: Network) -> Answer:
    with _quietly():
        module = torch.export.load(path).module()
    return lambda dense, ids: module(dense, ids).numpy()


def check_onnx(bytes_of_tensors: int) -> None:
    """Raises ExportError: ONNX cannot be written here, or cannot hold the model."""
    try:
        import onnx  # noqa: F401
        import onnxruntime  # noqa: F401
        import onnxscript  # noqa: F401
    except ImportError as error:
        raise ExportError(f'--format onnx: {error.name} is not installed: pip install "embershard[export]"') from None
    if bytes_of_tensors > ONNX_BYTES:
        raise ExportError(
            f"--format onnx: a file holds 2 GB at most, this model has {bytes_of_tensors / 1e9:.1f} GB: "
            f"use --format safetensors, or a method that makes the tables smaller"
        )


def write_onnx(path: Path, module: ServingNetwork, example: tuple[Tensor, Tensor]) -> None:
    batch = torch.export.Dim("batch")
    with _quietly():
        program = torch.onnx.export(
            module,
            example,
            dynamo=True,
            verbose=False,
            dynamic_shapes=({0: batch}, {0: batch}),
            input_names=["dense", "ids"],
            output_names=["logits"],
        )
        assert program is not None
        program.save(path)


def open_onnx(path: Path, network: Network) -> Answer:
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = 1
    session = onnxruntime.InferenceSession(path, options, providers=["CPUExecutionProvider"])
    taken = {one.name for one in session.get_inputs()}  # a model without dense columns does not read them

    def answer(dense: Tensor, ids: Tensor) -> np.ndarray:
        inputs = {"dense": dense.numpy(), "ids": ids.numpy()}
        out: np.ndarray = session.run(None, {name: value for name, value in inputs.items() if name in taken})[0]
        return out

    return answer


@contextmanager
def _quietly() -> Iterator[None]:
    """torch's exporters tell of their own parts: nothing that the user could act on."""
    level = logging.root.manager.disable
    logging.disable(logging.WARNING)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        logging.disable(level)
