"""What can be found out before anything is started: the data, the tables, the kernels."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from ..datasets.files import load_schema
from ..datasets.schema import Schema
from ..parameter_server.blocks import BlockMap
from ..workers.embeddings.base import Method
from ..workers.embeddings.planning import build_method, feature_table
from ..workers.network import NetworkSpec
from ..workers.placement import choose_placement
from . import compilation
from .config import RunConfig
from .errors import ConfigError
from .formatting import aligned
from .progress import ProgressReporter


def prepare(config: RunConfig, progress: ProgressReporter) -> Schema:
    """Checks what the driver can check, prints the table of features, and compiles the kernels once for all processes.

    Raises:
        ConfigError, DataError, TableError, EmbeddingError: the input cannot be right.
    """
    if config.data.path is None:
        raise ConfigError(
            "data.path: nothing to train on; give data.path=PARQUET, or no argument at all for generated data"
        )
    # More shards than the blocks can serve: refused here rather than by an actor.
    BlockMap.initial(config.store.blocks, ("",) * config.cluster.shards)
    schema = load_schema(config.data.path, config.data, labels=True)
    if config.data.eval_path is not None:
        load_schema(config.data.eval_path, config.data, labels=True)
    methods = planned_methods(config, schema)
    for line in feature_lines(feature_table(methods)):
        progress.note(line)
    config.embedding.placement, reason = choose_placement(config.job())  # once, for all workers
    progress.note(reason)
    progress.note("loading kernels (the first time on a machine compiles them)")
    compilation.finish()
    return schema


def planned_methods(config: RunConfig, schema: Schema) -> list[Method]:
    """The method of every feature, its sizes settled.

    Raises:
        EmbeddingError, DataError: embeddings or a model that cannot be as asked.
    """
    optimizer = config.optimizer.sparse.update
    spec = NetworkSpec.plan(schema, config.embedding, config.model, optimizer, config.seed)
    return [build_method(feature, optimizer) for feature in spec.features]


def feature_lines(records: Sequence[Mapping[str, Any]]) -> list[str]:
    """The table of features, aligned."""
    return aligned(records, list(records[0])) if records else []
