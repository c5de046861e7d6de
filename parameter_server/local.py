"""The store in this process: the same shards, without network and without Ray."""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

from .administration import Administration, Fetched
from .blocks import BlockMap
from .requests import Completed, PullRequest, PushRequest
from .shard import Shard
from .sharded import CONTROL_SECONDS, OnAnswer, ShardedStore
from .tables import DEFAULT_BLOCKS, Layout

PREFIX = "local-"


class LocalStore(ShardedStore):
    """`shards` shards in this process. Several workers on threads of one process may share the shards: see `attach`."""

    def __init__(
        self,
        *,
        shards: int = 1,
        blocks: int = DEFAULT_BLOCKS,
        seed: int = 0,
        timeout: float = 60.0,
        members: list[Shard] | None = None,
    ) -> None:
        block_map = BlockMap.initial(blocks, tuple(f"{PREFIX}{i}" for i in range(shards)))
        super().__init__(Layout(blocks, seed), block_map, timeout)
        self.members = members if members is not None else [Shard(i, Layout(blocks, seed)) for i in range(shards)]
        self._administrations = [Administration(shard, self._deliver, self._fetch) for shard in self.members]
        if members is None:
            for shard in self.members:
                shard.threads = len(os.sched_getaffinity(0))
                shard.set_block_map(block_map)

    def attach(self) -> LocalStore:
        """Another worker's view of the same shards, with a client number and sequence of its own."""
        other = LocalStore(
            shards=self.shards,
            blocks=self.layout.blocks,
            seed=self.layout.seed,
            timeout=self.timeout,
            members=self.members,
        )
        other.layout.add(list(self.layout.tables))
        return other

    def _send(self, shard: int, request: PullRequest | PushRequest, timeout: float, on_answer: OnAnswer) -> None:
        member = self.members[shard]
        deadline = time.monotonic() + timeout

        def answer(done: Completed) -> None:
            newer = member.block_map if member.block_map.epoch > request.epoch else None
            on_answer(done.reply, newer)

        if isinstance(request, PushRequest):
            completed = member.push(request, answer, deadline)
        else:
            completed = member.pull(request, answer, deadline)
        self._deliver(completed)
        if not any(done.token is answer for done in completed):
            self._timer.later(timeout, lambda: self._deliver(member.expire(time.monotonic())))

    def control_at(
        self, address: str, method: str, arguments: Mapping[str, Any], within: float = CONTROL_SECONDS
    ) -> Any:
        return self._administrations[int(address.removeprefix(PREFIX))].call(method, arguments)

    def _fetch(self, blocks: Sequence[int], source: int, move: str, *, changes: bool, seal: bool) -> Iterator[Fetched]:
        member = self.members[source]
        for block in blocks:
            tensors = member.changes_of(block, move, seal=seal) if changes else member.begin_move(block, move)
            yield block, tensors, sum(tensor.nbytes for tensor in tensors.values())

    @staticmethod
    def _deliver(completed: list[Completed]) -> None:
        for done in completed:
            token: Callable[[Completed], None] = done.token  # type: ignore[assignment]
            token(done)
