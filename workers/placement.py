"""Where a run's tables live: on the shards, or whole in every worker."""

from __future__ import annotations

from typing import Literal

from ..datasets.files import load_schema
from ..datasets.schema import DataError
from .embeddings.collection import distinct_tables
from .embeddings.planning import build_method
from .job import TrainingJob
from .network import NetworkSpec

# With `auto`: most bytes of tables and optimizer state that every worker holds.
REPLICATED_BYTES = 256 << 20


def choose_placement(job: TrainingJob) -> tuple[Literal["sharded", "replicated"], str]:
    """The placement of all tables, and a line that says why. The same for all who ask.

    Raises:
        DataError, EmbeddingError: as planning the features does.
    """
    asked = job.embedding.placement
    if asked != "auto":
        return asked, f"placement {asked}: as embedding.placement says"
    if job.data.path is None:
        raise DataError("data.path: nothing to train on; give a Parquet file, a folder of them or a URL")
    optimizer = job.optimizer.sparse.update
    schema = load_schema(job.data.path, job.data)
    features = NetworkSpec.plan(schema, job.embedding, job.model, optimizer, job.seed).features
    tables = distinct_tables([build_method(feature, optimizer) for feature in features])
    size = 4 * sum(table.rows * (table.width + table.optimizer.state_width(table.width)) for table in tables)
    chosen: Literal["sharded", "replicated"] = "replicated" if size <= REPLICATED_BYTES else "sharded"
    relation = "no more" if chosen == "replicated" else "more"
    return chosen, (
        f"placement {chosen}: tables and optimizer state take {size / 1e6:.1f} MB, {relation} than the "
        f"{REPLICATED_BYTES / 1e6:.1f} MB that every worker would hold"
    )
