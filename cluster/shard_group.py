"""The shards of a run as Ray actors: created, heard, replaced and ended; who decides about it is the coordinator."""

from __future__ import annotations

import secrets
import threading
import time
from collections.abc import Collection, Iterable, Sequence
from contextlib import suppress
from dataclasses import dataclass
from typing import Any

import ray
from pydantic import SecretStr
from ray import PlacementGroupID
from ray.exceptions import ActorUnavailableError, GetTimeoutError, RayActorError, RayError
from ray.util.placement_group import PlacementGroup, placement_group, remove_placement_group
from ray.util.scheduling_strategies import PlacementGroupSchedulingStrategy

from ..parameter_server.blocks import BlockMap
from ..parameter_server.store import StoreError
from .errors import RunFailed, one_line, root_cause
from .liveness import Liveness
from .run_state import Member, RunState, ShardPlan
from .shard_actor import Pulse, ShardActor, Whereabouts

NAME = "coordinator"
NAME_SECONDS = 30.0  # for Ray to let go of a dead actor's name
ATTEMPTS = 3  # to start a shard with its journal
PULSE_SECONDS = 2.0  # for a last question to shards that may be gone


@dataclass
class _Shard:
    """One process. beat: the heartbeat that is not answered yet. ended: why, once Ray has said that it ended."""

    actor: Any
    address: str
    liveness: Liveness
    beat: Any = None
    ended: str | None = None


class ShardGroup:
    """state: whose plan and members this group follows; it changes nothing else of it."""

    def __init__(self, state: RunState, orphan_timeout: float, token: SecretStr) -> None:
        self._state = state
        self._orphan_timeout = orphan_timeout
        self._token = token
        self._shards: list[_Shard | None] = [None] * len(state.members)
        self._beating = threading.Lock()

    @classmethod
    def create(cls, plan: ShardPlan, orphan_timeout: float, token: SecretStr) -> tuple[RunState, ShardGroup]:
        """The first shards of a run. Raises RunFailed, TableError: see `Coordinator.start`."""
        owners = BlockMap.initial(plan.blocks, ("",) * plan.shards).owners
        end_named(plan.namespace, but=(NAME,))  # of a coordinator that died while it did this
        place = _place_for(plan, plan.shards, "cluster.shards or cluster.shard_cpus")
        members = [Member(place, bundle) for bundle in range(plan.shards)]
        state = RunState(plan, members, BlockMap(0, owners, ()), plan.generation)
        group = cls(state, orphan_timeout, token)
        group._start(range(plan.shards))
        state.block_map = BlockMap(1, owners, group.addresses())
        return state, group

    def take_up(self) -> None:
        """Finds the actors that run; those that do not, or that begin with nothing, are lost."""
        plan, known = self._state.plan, self._state.block_map.addresses
        numbers = range(len(self._state.members))
        # What a coordinator began, or had not ended yet, when it died.
        end_named(plan.namespace, but=(NAME, *map(shard_name, numbers)), groups={m.group for m in self._state.members})
        found: dict[int, Any] = {}
        for number in numbers:
            with suppress(ValueError):
                found[number] = ray.get_actor(shard_name(number), namespace=plan.namespace)
        calls = {number: actor.whereabouts.remote() for number, actor in found.items()}
        for number, actor in found.items():
            address = known[number] if number < len(known) else ""  # one that was about to join owns nothing
            with suppress(RayError):  # one that does not answer may be stopped
                where: Whereabouts = ray.get(calls[number], timeout=PULSE_SECONDS)
                if address not in ("", where.address) and not where.recovered:
                    end_actor(actor)
                    continue
                address = where.address
            # Whatever the last coordinator granted ends within a lease from now.
            self._shards[number] = _Shard(actor, address, Liveness(plan.lease, time.monotonic(), 0.0))

    def addresses(self) -> tuple[str, ...]:
        """gRPC addresses, by number; of one that is lost, the last."""
        known = self._state.block_map.addresses
        return tuple(
            shard.address if shard is not None else known[i] if i < len(known) else ""
            for i, shard in enumerate(self._shards)
        )

    def grow(self, shards: int) -> None:
        """Starts empty shards until there are so many; they own nothing yet. Raises RunFailed."""
        plan, members = self._state.plan, self._state.members
        if (more := shards - len(members)) > 0:
            place = _place_for(plan, more, "cluster.shard_cpus")
            members += [Member(place, bundle) for bundle in range(more)]
            self._shards += [None] * more
        self._start([i for i, shard in enumerate(self._shards[:shards]) if shard is None])

    def shrink(self, shards: int) -> None:
        """Ends all but the first so many shards, which own nothing any more.

        Writes that down first: nobody starts them again, and what is left of them is found by name.
        """
        members, leaving = self._state.members, self._shards[shards:]
        places = {member.group for member in members[shards:]} - {member.group for member in members[:shards]}
        del members[shards:], self._shards[shards:]
        self._state.save()
        for shard in leaving:
            if shard is not None:
                with suppress(RayError):
                    ray.get(shard.actor.forget.remote(), timeout=PULSE_SECONDS)
                end_actor(shard.actor)
        for group in places:
            remove_placement_group(_place(group))

    def cancel_moves(self, epoch: int) -> None:
        """To be called when no move is under way: a shard that was away may have missed the end of one."""
        for call in [shard.actor.cancel_moves.remote(epoch) for shard in self._shards if shard is not None]:
            with suppress(RayError, StoreError):  # one that has not heard of the map hears of both later
                ray.get(call, timeout=self._state.plan.start_timeout)

    def restart_empty(self, number: int) -> None:
        """Starts a shard that owned nothing. Raises RunFailed."""
        self._end(number)
        self._start([number])

    def announce(self, block_map: BlockMap) -> None:
        """Tells every shard that answers; one that does not is lost, and hears of it when it is replaced."""
        calls = [shard.actor.set_block_map.remote(block_map) for shard in self._shards if shard is not None]
        for call in calls:
            with suppress(RayActorError, GetTimeoutError):
                ray.get(call, timeout=self._state.plan.start_timeout)

    def beat(self, timeout: float) -> list[Pulse]:
        """Renews the leases; returns what those shards said that answered within `timeout` seconds."""
        with self._beating:
            return self._beat(timeout)

    def _beat(self, timeout: float) -> list[Pulse]:
        shards = [shard for shard in self._shards if shard is not None and shard.ended is None]
        for shard in shards:
            if shard.beat is None:  # no second one behind a beat that a stopped process has not taken yet
                shard.beat = shard.actor.beat.remote(shard.liveness.grant())
        if not shards:
            return []
        ready, _ = ray.wait([shard.beat for shard in shards], num_returns=len(shards), timeout=timeout)
        now = time.monotonic()
        pulses = []
        for shard in (shard for shard in shards if shard.beat in ready):
            beat, shard.beat = shard.beat, None
            try:
                pulse: Pulse = ray.get(beat)
            except ActorUnavailableError:
                continue  # it, or the way to it, may come back
            except RayActorError as error:
                shard.ended = _ending(error)
                continue
            shard.liveness.answered(now, pulse.now)
            pulses.append(pulse)
        return pulses

    def pulses(self) -> list[Pulse]:
        """One more beat now, for what the shards know."""
        return self.beat(PULSE_SECONDS)

    def lost(self) -> dict[int, str]:
        """The shards that cannot serve any more, by number, and how they were lost."""
        alive = {node["NodeID"] for node in ray.nodes() if node["Alive"]} if any(self._doubtful()) else set()
        lost = {}
        for number, shard in enumerate(self._shards):
            if shard is None:
                lost[number] = "is not there any more"
            elif shard.liveness.may_be_replaced(
                time.monotonic(), ended=shard.ended is not None and self._state.members[number].node in alive
            ):
                silent = f"did not answer for {time.monotonic() - shard.liveness.heard:.0f} s"
                lost[number] = silent if shard.ended is None else f"died: {shard.ended}"
        return lost

    def _doubtful(self) -> Iterable[bool]:
        return (shard is not None and shard.ended is not None for shard in self._shards)

    def replace(self, number: int) -> str | None:
        """Ends a shard and starts it again in the same place, with the same journal.

        Returns why it has not come back with what it held; None if it has.
        """
        self._end(number)
        cause = ""
        for attempt in range(ATTEMPTS):
            time.sleep(attempt)  # the old process may take a moment to let go of its journal
            actor = self._create(number, fresh=False)
            try:
                where: Whereabouts = ray.get(actor.whereabouts.remote(), timeout=self._state.plan.start_timeout)
            except (RayActorError, GetTimeoutError) as error:
                cause = one_line(root_cause(error))
                end_actor(actor)
                if isinstance(error, GetTimeoutError):  # there is no room for it: its machine is gone
                    break
                continue
            self._enter(number, actor, where)
            return None if where.recovered else "its journal is not there"
        return cause

    def replace_all(self) -> None:
        """Ends every shard and starts all of them, empty. Raises RunFailed."""
        for number in range(len(self._shards)):
            self._end(number)
        self._start(range(len(self._shards)))

    def end(self) -> None:
        """Ends the shards for good and gives back their place."""
        forgotten = [shard.actor.forget.remote() for shard in self._shards if shard is not None]
        if forgotten:
            ray.wait(forgotten, num_returns=len(forgotten), timeout=PULSE_SECONDS)
        for number in range(len(self._shards)):
            self._end(number)
        for group in {member.group for member in self._state.members}:
            remove_placement_group(_place(group))

    def _end(self, number: int) -> None:
        shard, self._shards[number] = self._shards[number], None
        if shard is not None:
            end_actor(shard.actor)

    def _start(self, numbers: Iterable[int]) -> None:
        plan = self._state.plan
        actors = {number: self._create(number, fresh=True) for number in numbers}
        calls = {number: actor.whereabouts.remote() for number, actor in actors.items()}
        try:
            found = ray.get(list(calls.values()), timeout=plan.start_timeout)
        except GetTimeoutError:
            late = ", ".join(str(number) for number, call in calls.items() if not ray.wait([call], timeout=0)[0])
            raise RunFailed(
                f"cluster: shard {late} did not start within {plan.start_timeout:g} s; a shard asks for {plan.cpus:g} "
                f"CPUs, and the cluster has {_free('CPU')} CPUs free: make room, or raise cluster.start_timeout"
            ) from None
        for (number, actor), where in zip(actors.items(), found, strict=True):
            self._enter(number, actor, where)

    def _enter(self, number: int, actor: Any, where: Whereabouts) -> None:
        liveness = Liveness(self._state.plan.lease, time.monotonic(), where.now)
        self._shards[number] = _Shard(actor, where.address, liveness)
        self._state.members[number].node = where.node

    def _create(self, number: int, *, fresh: bool) -> Any:
        plan, member = self._state.plan, self._state.members[number]
        actor = ray.remote(ShardActor).options(
            name=shard_name(number),
            namespace=plan.namespace,
            lifetime="detached",
            num_cpus=plan.cpus,
            max_restarts=0,
            max_concurrency=4,  # a beat waits for nobody
            scheduling_strategy=PlacementGroupSchedulingStrategy(
                _place(member.group), placement_group_bundle_index=member.bundle
            ),
        )
        deadline = time.monotonic() + NAME_SECONDS
        while True:
            try:
                return actor.remote(
                    number,
                    plan.blocks,
                    plan.seed,
                    loopback=plan.loopback,
                    lease=plan.lease,
                    orphan_timeout=self._orphan_timeout,
                    token=self._token,
                    journal=plan.journal and f"{plan.journal}/{plan.namespace}/{shard_name(number)}",
                    journal_bytes=plan.journal_bytes,
                    memory_bytes=plan.memory_bytes,
                    fresh=fresh,
                )
            except ValueError as error:  # the name of one that has just been ended
                if time.monotonic() > deadline:
                    raise RunFailed(f"cluster: shard {number} does not end: {one_line(error)}") from None
            with suppress(ValueError):  # or of one that a coordinator began, and died before it wrote that down
                end_actor(ray.get_actor(shard_name(number), namespace=plan.namespace))
            time.sleep(0.1)


def shard_name(number: int) -> str:
    return f"shard-{number}"


def end_actor(actor: Any) -> None:
    """Ends an actor's process for good, also one that does not answer."""
    with suppress(RayError):
        ray.kill(actor)


def end_named(namespace: str, *, but: Sequence[str] = (), groups: Collection[str] = ()) -> None:
    """Ends the actors of a namespace, except those named in `but`, and its placement groups, except `groups`."""
    for actor in ray.util.list_named_actors(all_namespaces=True):
        if actor["namespace"] == namespace and actor["name"] not in but:
            with suppress(ValueError):
                end_actor(ray.get_actor(actor["name"], namespace=namespace))
    for number, group in ray.util.placement_group_table().items():
        ours = group["name"].startswith(f"{namespace}-") and number not in groups
        if ours and group["state"] != "REMOVED":
            remove_placement_group(_place(number))


def _ending(error: RayActorError) -> str:
    """Ray's reason, without the actor's particulars around it."""
    text = one_line(error)
    reason = text.partition("The actor is dead because ")[2].partition(" Worker exit")[0]
    return (reason or text)[:300].rstrip(".")


def _place_for(plan: ShardPlan, shards: int, lower: str) -> str:
    """Reserves room for so many shards, spread over the nodes; returns the placement group's id. Raises RunFailed."""
    name = f"{plan.namespace}-{secrets.token_hex(4)}"  # Ray keeps the name of a group that has been removed, too
    place = placement_group([{"CPU": plan.cpus}] * shards, strategy="SPREAD", lifetime="detached", name=name)
    if not place.wait(plan.start_timeout):
        remove_placement_group(place)
        raise RunFailed(
            f"cluster: {shards} shards ask for {plan.cpus:g} CPUs each, and the cluster has {_free('CPU')} CPUs free; "
            f"after {plan.start_timeout:g} s they were still not there: lower {lower}, or raise cluster.start_timeout"
        )
    group: str = place.id.hex()
    return group


def _place(group: str) -> PlacementGroup:
    return PlacementGroup(PlacementGroupID.from_hex(group))


def _free(resource: str) -> str:
    free = ray.available_resources().get(resource, 0.0)
    return f"{free:g} of {ray.cluster_resources().get(resource, 0.0):g}"
