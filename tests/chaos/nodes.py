"""A Ray cluster of several nodes on this machine, which come and go."""

from __future__ import annotations

from typing import Any

import psutil
from ray.cluster_utils import Cluster
from train_run import processes

NODE = {"include_dashboard": False, "object_store_memory": 100 << 20}


class Nodes:
    """The head holds the driver and is never removed."""

    def __init__(self, cpus: int) -> None:
        self._cluster = Cluster(initialize_head=True, head_node_args={"num_cpus": cpus, **NODE})
        self.head = self._cluster.head_node
        self.address: str = self._cluster.address

    def add(self, cpus: int) -> Any:
        return self._cluster.add_node(num_cpus=cpus, **NODE)

    def remove(self, node: Any) -> None:
        """As when its machine loses power: nothing on it is told."""
        self._cluster.remove_node(node, allow_graceful=False)

    def processes(self, node: Any, name: str) -> list[psutil.Process]:
        """The processes of actors of the class `name` on a node."""
        return processes(name, node.all_processes["raylet"][0].process.pid)

    def close(self) -> None:
        self._cluster.shutdown()
