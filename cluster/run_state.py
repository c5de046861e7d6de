"""What a coordinator must know to come back: kept in Ray's own key-value store, which outlives every actor.

Written whole before anything that follows from it is announced, and confirmed by the cluster's head before the call
returns. It is gone with the cluster; a run then goes on from its newest checkpoint with --resume.
"""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
from ray.experimental.internal_kv import _internal_kv_del, _internal_kv_get, _internal_kv_put

from ..parameter_server.blocks import BlockMap
from ..parameter_server.store import DEFAULT_JOURNAL_BYTES

_SPACE = b"embershard"


@dataclass(frozen=True)
class ShardPlan:
    """The shards of a run: how many, what each asks of Ray, and how the store is laid out.

    generation: the first one of this start. lease: seconds that a shard serves without hearing from the coordinator.
    max_restarts: how often the workers of this start may begin again. journal: the folder, on each shard's own machine,
    of their journals, one folder each; None: they keep none.
    """

    namespace: str
    shards: int
    cpus: float
    blocks: int
    seed: int
    loopback: bool
    start_timeout: float
    generation: int = 1
    lease: float = 30.0
    max_restarts: int = 0
    journal: str | None = None
    journal_bytes: int = DEFAULT_JOURNAL_BYTES
    memory_bytes: int | None = None


@dataclass
class Member:
    """Where a shard's process runs: bundle `bundle` of the placement group with this id, in hexadecimal."""

    group: str
    bundle: int
    node: str = ""


@dataclass
class RunState:
    """generation: the one that runs, or ran last. reached: the highest step seen since steps were last redone.

    broken: why the shards have to begin afresh, from when that is known until they have. workers: of that generation.
    wanted: how many the user asked for while it runs. resting: it is asked to make place for another number of them;
    rested: the generation that has done so.
    """

    plan: ShardPlan
    members: list[Member]
    block_map: BlockMap
    generation: int
    joined: bool = False
    reached: int = 0
    restarts: int = 0
    steps_redone: int = 0
    stop: bool = False
    broken: str | None = None
    workers: int = 0
    wanted: int | None = None
    resting: bool = False
    rested: int | None = None
    resizes: int = 0

    def save(self) -> None:
        """Raises RuntimeError: the cluster's head does not answer."""
        _internal_kv_put(_key(self.plan.namespace), json.dumps(_encoded(self)).encode(), True, namespace=_SPACE)


def load(namespace: str) -> RunState | None:
    """The state of the run in this namespace; None: it has not begun, or has ended."""
    data = _internal_kv_get(_key(namespace), namespace=_SPACE)
    return None if data is None else _decoded(json.loads(data))


def forget(namespace: str) -> None:
    """The run has ended."""
    _internal_kv_del(_key(namespace), namespace=_SPACE)


def _key(namespace: str) -> bytes:
    return f"run/{namespace}".encode()


def _encoded(state: RunState) -> dict[str, Any]:
    block_map = state.block_map
    owners = block_map.owners.tolist()
    shown = {name: getattr(state, name) for name in state.__dataclass_fields__}
    return shown | {
        "plan": asdict(state.plan),
        "members": [asdict(member) for member in state.members],
        "block_map": {"epoch": block_map.epoch, "owners": owners, "addresses": list(block_map.addresses)},
    }


def _decoded(content: dict[str, Any]) -> RunState:
    block_map = content["block_map"]
    owners = np.array(block_map["owners"], np.uint16)
    return RunState(
        **content
        | {
            "plan": ShardPlan(**content["plan"]),
            "members": [Member(**member) for member in content["members"]],
            "block_map": BlockMap(block_map["epoch"], owners, tuple(block_map["addresses"])),
        }
    )
