"""embershard: recommendation models whose embedding tables are too large for one machine.

Public names are imported on first use, so that `import embershard` is quick and a parameter-server process never loads
torch.
"""

from importlib import import_module
from importlib.metadata import PackageNotFoundError, version
from typing import TYPE_CHECKING, Any

try:
    __version__ = version("embershard")
except PackageNotFoundError:  # a source tree that is not installed
    __version__ = "0.0.0"

_PUBLIC: dict[str, str] = {
    "Batch": ".datasets.schema",
    "EmbeddingBagCollection": ".workers.embeddings.collection",
    "Feature": ".workers.embeddings.base",
    "Ids": ".datasets.schema",
    "Optimizer": ".parameter_server.tables",
    "ParquetDataset": ".datasets.torch_dataset",
    "ParquetStream": ".datasets.stream",
    "RunConfig": ".cluster.config",
    "Schema": ".datasets.schema",
    "Store": ".parameter_server.store",
    "TableSpec": ".parameter_server.tables",
    "Trainer": ".cluster.launch",
    "evaluate": ".workers.evaluate",
    "load_schema": ".datasets.files",
    "nn": ".nn",
}

__all__ = [
    "Batch",
    "EmbeddingBagCollection",
    "Feature",
    "Ids",
    "Optimizer",
    "ParquetDataset",
    "ParquetStream",
    "RunConfig",
    "Schema",
    "Store",
    "TableSpec",
    "Trainer",
    "__version__",
    "evaluate",
    "load_schema",
    "nn",
]


def __getattr__(name: str) -> Any:
    if name not in _PUBLIC:
        raise AttributeError(f"module 'embershard' has no attribute {name!r}")
    module = import_module(_PUBLIC[name], __name__)
    return module if _PUBLIC[name] == f".{name}" else getattr(module, name)


def __dir__() -> list[str]:
    return list(__all__)


if TYPE_CHECKING:
    from . import nn
    from .cluster.config import RunConfig
    from .cluster.launch import Trainer
    from .datasets.files import load_schema
    from .datasets.schema import Batch, Ids, Schema
    from .datasets.stream import ParquetStream
    from .datasets.torch_dataset import ParquetDataset
    from .parameter_server.store import Store
    from .parameter_server.tables import Optimizer, TableSpec
    from .workers.embeddings.base import Feature
    from .workers.embeddings.collection import EmbeddingBagCollection
    from .workers.evaluate import evaluate
