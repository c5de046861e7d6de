"""Embeddings and dense model as one module, built alike for training and for evaluation."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch
from pydantic import BaseModel, ConfigDict
from torch import Tensor, nn

from ..datasets.schema import Batch, Schema
from ..parameter_server.checkpoint import CheckpointError
from ..parameter_server.store import Store
from ..parameter_server.tables import Optimizer
from .embeddings.base import EmbeddingError, Feature, Method
from .embeddings.collection import EmbeddingBagCollection
from .embeddings.planning import EmbeddingConfig, plan_features
from .embeddings.ticket import Ticket
from .models.build import ModelConfig, build_model
from .objectives import objective_of, ranked


class NetworkSpec(BaseModel):
    """All that a network depends on besides its weights; kept in every checkpoint."""

    model_config = ConfigDict(extra="forbid")
    features: list[Feature]
    model: ModelConfig
    data: Schema
    optimizer: Optimizer
    seed: int

    @classmethod
    def plan(
        cls, schema: Schema, embedding: EmbeddingConfig, model: ModelConfig, optimizer: Optimizer, seed: int
    ) -> NetworkSpec:
        """A ranker's items to be found are a column of the data, but no feature.

        Raises:
            EmbeddingError: features that cannot be as asked, or of a width that the model cannot take. DataError:
                columns that the model cannot do without.
        """
        embedded = schema
        if model.ranks:
            model = ranked(model, schema)
            left = [column for column in schema.categorical if column.name != model.target]
            embedded = schema.model_copy(update={"categorical": left})
        features = plan_features(embedded, embedding, seed)
        if not features:
            raise EmbeddingError("data.categorical: no columns, so there is nothing to embed; name at least one")
        other = next((f for f in features if f.dim != features[0].dim), None)
        if other is not None:
            raise EmbeddingError(
                f"feature {other.name!r}: dim {other.dim} beside {features[0].dim}: model {model.name} takes vectors "
                f"of one width only; set embedding.dim for all"
            )
        return cls(features=features, model=model, data=schema, optimizer=optimizer, seed=seed)


class Network(nn.Module):
    """From a batch's dense columns and pulled rows to a model's outputs. Its parameters are those of every worker."""

    def __init__(self, spec: NetworkSpec, store: Store, device: torch.device) -> None:
        super().__init__()
        self.spec = spec
        self.objective = objective_of(spec.model)
        self.embeddings = EmbeddingBagCollection(spec.features, store=store, optimizer=spec.optimizer, device=device)
        self.model = build_model(
            spec.model,
            dense=len(spec.data.dense),
            features=len(spec.features),
            dim=spec.features[0].dim,
            seed=spec.seed,
            per_sample=self.embeddings.output == "sample",
        ).to(device)
        for method in self.embeddings.methods:
            if isinstance(method, Method) and method.output not in self.model.accepts:
                raise EmbeddingError(
                    f"feature {method.feature.name!r}: method {method.feature.method} gives one vector per "
                    f"{method.output}, which model {spec.model.name} cannot take; choose another method or model"
                )

    def forward(self, dense: Tensor, ticket: Ticket) -> Tensor:
        """dense float32 [B, D] and the ticket of the batch's ids -> logits [B], or a ranker's scores [B, items]."""
        outputs: Tensor = self.model(dense, self.embeddings(ticket))
        return outputs


def on_device(array: np.ndarray, device: torch.device) -> Tensor:
    """A view on the CPU; on cuda a copy that is under way, from pinned memory."""
    tensor = torch.from_numpy(array)
    return tensor if device.type == "cpu" else tensor.pin_memory().to(device, non_blocking=True)


def dense_inputs(batch: Batch, device: torch.device) -> tuple[Tensor, Tensor]:
    """(dense [B, D], labels [B])."""
    return on_device(batch.dense, device), on_device(batch.labels, device)


def dense_tensors(network: nn.Module, optimizer: torch.optim.Optimizer) -> dict[str, np.ndarray]:
    """Dense parameters and their optimizer's state by name: "NAME" and "optimizer/KEY/NAME"."""
    tensors = {}
    for name, parameter in network.named_parameters():
        tensors[name] = parameter.detach().cpu().numpy()
        for key, value in optimizer.state.get(parameter, {}).items():
            tensors[f"optimizer/{key}/{name}"] = torch.as_tensor(value).detach().cpu().numpy()
    return tensors


def load_dense(
    network: nn.Module, tensors: Mapping[str, np.ndarray], optimizer: torch.optim.Optimizer | None = None
) -> list[str]:
    """Copies what `dense_tensors` returned; returns the parameters whose optimizer state was of another optimizer.

    Raises:
        CheckpointError: a parameter is missing or of another shape.
    """
    fresh = []
    for name, parameter in network.named_parameters():
        saved = tensors.get(name)
        if saved is None or saved.shape != tuple(parameter.shape):
            found = "nothing" if saved is None else list(saved.shape)
            raise CheckpointError(
                f"checkpoint: dense parameter {name} should be {list(parameter.shape)}, found {found}: "
                f"the run's model, embedding or data section has changed since"
            )
        with torch.no_grad():
            parameter.copy_(torch.from_numpy(saved))
        if optimizer is not None and not _load_state(optimizer, parameter, name, tensors):
            fresh.append(name)
    return fresh


def _load_state(
    optimizer: torch.optim.Optimizer, parameter: nn.Parameter, name: str, tensors: Mapping[str, np.ndarray]
) -> bool:
    """False if the checkpoint holds state of another kind of optimizer; this one then begins anew."""
    saved = {
        key.split("/")[1]: torch.from_numpy(value.copy())
        for key, value in tensors.items()
        if key.startswith("optimizer/") and key.split("/", 2)[2] == name
    }
    if set(saved) != _state_names(optimizer):
        return False
    if saved:
        # The step count stays on the CPU, as torch keeps it.
        optimizer.state[parameter] = {k: v if k == "step" else v.to(parameter.device) for k, v in saved.items()}
    return True


def _state_names(optimizer: torch.optim.Optimizer) -> set[str]:
    """Names of the state per parameter of this kind of optimizer, found by running it on one number."""
    probe = nn.Parameter(torch.zeros(1))
    probe.grad = torch.zeros(1)
    trial = type(optimizer)([probe], lr=0.0)  # type: ignore[call-arg]
    trial.step()
    return set(trial.state[probe])


def describe(network: Network) -> dict[str, Any]:
    """Sizes for the summary of a run. Bytes are float32; optimizer state is not among them."""
    size = network.embeddings.size
    return {
        "embedding_parameters": size.parameters,
        "embedding_bytes": size.bytes,
        "full_embedding_bytes": size.full_bytes,
        "compression_ratio": size.ratio,
    }


def methods_of(features: Sequence[Feature]) -> str:
    """The methods in use, for the summary: "full", or "full+hash" where features differ."""
    return "+".join(sorted({feature.method for feature in features}))
