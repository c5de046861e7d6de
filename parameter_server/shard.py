"""One shard: who may read and change its rows, and which calls wait for whom. No I/O, no threads.

Calls go in with an opaque token and a deadline; every method returns the calls that can be answered now. A pull that
has to wait, and a push of `sync` whose step is not complete, are kept here and come out of a later call.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import numpy as np

from . import failpoints, ledger
from .clocks import Clocks
from .contents import Contents
from .gate import Gate
from .lease import Lease
from .records import JournalError, Kind, encode_pushes
from .requests import (
    FENCED,
    INVALID,
    LATER,
    NOT_WRITTEN,
    TIMEOUT,
    TOO_OLD,
    BlockStatus,
    Clock,
    Completed,
    PullReply,
    PullRequest,
    PushReply,
    PushRequest,
    Refusal,
    RowSet,
)
from .store import BusyError, FencedError, StoreError
from .sums import sum_decided
from .tables import Layout
from .validation import InvalidRequest, checked_pull, checked_push, readable
from .waiting import WaitingCall, WaitingCalls

MOVED, APPLIED = int(BlockStatus.MOVED), int(BlockStatus.APPLIED)


class Shard(Contents):
    """Pulls and pushes over the contents of a shard; every public method holds `lock`.

    Deadlines are `time.monotonic()` seconds.
    """

    def __init__(self, number: int, layout: Layout, memory_bytes: int | None = None) -> None:
        super().__init__(number, layout, memory_bytes)
        self.clocks = Clocks()
        self.lease = Lease()
        self.threads = 1  # that a call may use; shards that serve a network run on one core each
        self.traffic = np.zeros(layout.blocks, np.int64)  # rows read and changed so far, by block
        self._gate = Gate()
        self._waiting = WaitingCalls()
        refusals = "refused timeouts fenced lease_ended not_written later"
        self._counts = dict.fromkeys(f"pulls pushes rows_pulled rows_pushed duplicates moved {refusals}".split(), 0)

    def begin(self, generation: int, workers: int, step: int) -> list[Completed]:
        """Starts a generation whose next step is `step + 1`; waiting calls of the older one are answered FENCED.

        Beginning the running generation again changes nothing.

        Raises:
            FencedError: a newer generation has begun. ValueError: the same one, with another number of workers.
            BusyError: blocks are changing hands, perhaps to a shard that the caller does not know yet.
        """
        with self.lock:
            if self._gate.closed:
                raise BusyError(f"shard {self.number} is changing blocks with other shards: wait for it")
            running = self.clocks.generation
            if running is not None and generation < running:
                raise FencedError(f"generation {generation} is over: generation {running} is running")
            if generation == running:
                if workers != self.clocks.workers:
                    raise ValueError(f"generation {generation} began with {self.clocks.workers} workers, not {workers}")
                return []
            fenced = Refusal(FENCED, f"generation {generation} has begun: calls of older ones are refused")
            self._record(Kind.BEGIN, {"generation": generation, "workers": workers, "step": step})
            waiting = self._waiting.take_all()
            self.clocks.begin(generation, workers, step)
            self._gate = Gate(step)
            self.ledger.drop_generations_before(generation)
            self._counts["fenced"] += len(waiting)
            return [Completed(call.token, fenced) for call in waiting]

    def join(self, generation: int, workers: int, step: int) -> list[Completed]:
        """As `begin`, for a shard without blocks (StoreError with them): pushes that it missed are done elsewhere."""
        with self.lock:
            if self._held.any():
                raise StoreError(f"shard {self.number} owns blocks already: it cannot join once more")
            if generation != self.clocks.generation:
                return self.begin(generation, workers, step)
            self._record(Kind.JOIN, {"generation": generation, "workers": workers, "step": step})
            self.clocks.advance(step)
            return self._release()

    def pull(self, request: PullRequest, token: object, deadline: float) -> list[Completed]:
        """Reads rows, at once or when the pushes that the clock asks for have been applied."""
        with self.lock:
            if self.lease.ended:
                return self._unleased(token)
            try:
                request = checked_pull(request, self.layout.slabs)
            except InvalidRequest as error:
                return self._refused(token, Refusal(INVALID, str(error)))
            clock = request.clock
            if clock is not None:
                if (refusal := self.clocks.refuse(clock)) is not None:
                    return self._refused(token, refusal)
                if not self._may_pull(clock):
                    self._waiting.pulls.append(WaitingCall(request, clock, token, deadline))
                    return []
            return [Completed(token, self._read(request))]

    def close_gate(self, after: int, lag: int, until: float) -> tuple[Gate, list[Completed]]:
        """Keeps back calls as `Gate` says, until `open_gate`, or `until` (`time.monotonic()` seconds).

        When every shard keeps back the same steps, and every push before them has arrived (`settled`), no worker has a
        call under way: the one moment at which blocks change hands. Returns the gate, and the answers to what was kept
        back before and is let through now.
        """
        with self.lock:
            self._gate.close(after, lag, until)
            return self._gate, self._let_through()

    def settled(self, step: int) -> dict[str, Any]:
        """Where the clocks stand, and settled: whether the pushes of all ranks up to `step` are applied.

        Without a generation there is nothing to wait for.
        """
        with self.lock:
            settled = self.clocks.generation is None or self.clocks.step >= step
            return {"settled": settled, **self.clocks.describe()}

    def open_gate(self) -> list[Completed]:
        """Answers what was kept back, as far as the clocks allow."""
        with self.lock:
            self._gate.open()
            return self._let_through()

    def _let_through(self) -> list[Completed]:
        waiting = self._waiting.pushes
        self._waiting.pushes = []
        completed = []
        for call in waiting:
            assert isinstance(call.request, PushRequest)
            completed += self.push(call.request, call.token, call.deadline)
        return completed + self._release()

    def _may_pull(self, clock: Clock) -> bool:
        return self._gate.lets_pull(clock.step) and self.clocks.step >= clock.step - 1 - clock.staleness

    def push(self, request: PushRequest, token: object, deadline: float) -> list[Completed]:
        """Applies a push, or keeps it until its step is complete (`sync`); answers whoever waited for it, too."""
        with self.lock:
            if self.lease.ended:
                return self._unleased(token)
            clock = request.clock
            if clock is not None and (refusal := self.clocks.refuse(clock)) is not None:
                return self._refused(token, refusal)
            try:
                request = checked_push(request, self.layout.slabs)
            except InvalidRequest as error:
                return self._refused(token, Refusal(INVALID, str(error)))
            if clock is not None and not self._gate.lets_push(clock.step):
                self._waiting.pushes.append(WaitingCall(request, clock, token, deadline))
                return []
            if clock is not None and clock.sync and clock.step > self.clocks.step:
                return self._hold(WaitingCall(request, clock, token, deadline))
            if (refusal := self._later([request])) is not None:
                return self._refused(token, refusal)
            try:
                statuses = self._decide(request)
            except LookupError as error:
                return self._refused(token, Refusal(TOO_OLD, str(error)))
            try:
                self._commit([(request, statuses)])
            except JournalError as error:
                return self._refused(token, Refusal(NOT_WRITTEN, str(error)))
            completed = self._acknowledge([(token, request, statuses)])
            return completed if clock is None else completed + self._release()

    def repeat(self, pushes: Sequence[PushRequest]) -> None:
        """Does again what a record of pushes says (`records.decode_pushes`): all that is in it was applied, as one."""
        with self.lock:
            applied = np.full(self.layout.blocks, APPLIED, np.uint8)
            self._commit([(checked_push(push, self.layout.slabs), applied) for push in pushes])

    def expire(self, now: float) -> list[Completed]:
        """Answers the calls whose deadline has come with TIMEOUT and whom they waited for; nothing is applied."""
        with self.lock:
            late = [(call, self._waits_for(call)) for call in self._waiting if call.deadline <= now]
            completed = [Completed(call.token, Refusal(TIMEOUT, why)) for call, why in late]
            self._waiting.drop_late(now)
            self._counts["timeouts"] += len(late)
            if self._gate.ends <= now:
                completed += self.open_gate()
            return completed

    def next_deadline(self) -> float | None:
        """When `expire` has something to do; None while nothing waits."""
        with self.lock:
            deadlines = [call.deadline for call in self._waiting]
            return min([*deadlines, self._gate.ends] if self._gate.closed else deadlines, default=None)

    def statistics(self) -> dict[str, Any]:
        """What the shard holds and has done."""
        with self.lock:
            held = int(self._held.sum())
            table_bytes = sum(memory.block_bytes[0] for memory in self._memory) * held
            state_bytes = sum(memory.block_bytes[1] for memory in self._memory) * held
            return {
                "shard": self.number,
                "blocks": held,
                "epoch": self.block_map.epoch,
                "generation": self.clocks.generation,
                "step": self.clocks.step,
                "tables": sum(len(memory.slab.tables) for memory in self._memory),
                "table_bytes": table_bytes,
                "state_bytes": state_bytes,
                "clients": len(self.ledger),
                "moving": int(self._transit.leaving.sum() + self._transit.arrived.sum()),
                "waiting": len(list(self._waiting)),
                **self._counts,
                **(self.journal.statistics() if self.journal is not None else {}),
            }

    def _refused(self, token: object, refusal: Refusal) -> list[Completed]:
        self._counts[{FENCED: "fenced", NOT_WRITTEN: "not_written", LATER: "later"}.get(refusal.code, "refused")] += 1
        return [Completed(token, refusal)]

    def _unleased(self, token: object) -> list[Completed]:
        """Not even a clock is recorded: another shard may serve these blocks by now."""
        self._counts["lease_ended"] += 1
        return [Completed(token, Refusal(LATER, f"shard {self.number}: its lease has ended"))]

    def _waits_for(self, call: WaitingCall) -> str:
        kind = "pull" if isinstance(call.request, PullRequest) else "push"
        first = self.clocks.step + 1
        if self._gate.closed:
            return f"blocks change hands after step {self._gate.step} (asked by the {kind} for step {call.clock.step})"
        needed = call.clock.step - 1 - call.clock.staleness if kind == "pull" else call.clock.step
        missing = [rank for rank in self.clocks.behind(needed) if rank not in self._waiting.steps.get(first, {})]
        ranks = ("rank " if len(missing) == 1 else "ranks ") + ", ".join(map(str, missing))
        return f"step {first} still waits for the push of {ranks} (asked by the {kind} for step {call.clock.step})"

    def _read(self, request: PullRequest) -> PullReply:
        statuses, rows = [], []
        if request.clock is not None:
            self._gate.saw(request.clock)
        for part in request.parts:
            served = self._served[part.blocks]
            index, status = part.index, np.zeros(len(served), np.uint8)  # zero is APPLIED
            if not served.all():
                index = readable(part.select(served)[0].index)
                status = np.where(served, APPLIED, MOVED).astype(np.uint8)
                self._counts["moved"] += int(np.count_nonzero(status))
            statuses.append(status)
            rows.append(self._memory[part.slab].read(index, self.threads))
            self._counts["rows_pulled"] += len(index)
            self.traffic[part.blocks] += part.counts
        self._counts["pulls"] += 1
        return PullReply(statuses, rows)

    def _decide(self, request: PushRequest) -> np.ndarray:
        """uint8 [blocks]: what becomes of each block's part, the same over all slabs.

        Raises:
            LookupError: the push is older than a block's window, so that nobody can say whether it was applied.
        """
        blocks = request.touched(self.layout.blocks)
        blocks = blocks[self._served[blocks]]
        known = self.ledger.check(request.client, request.sequence, blocks)
        if (known == ledger.TOO_OLD).any():
            raise LookupError(
                f"push {request.sequence} of client {request.client} is more than {ledger.WINDOW} pushes older than "
                f"the newest in block {int(blocks[(known == ledger.TOO_OLD).argmax()])}: nothing was applied"
            )
        statuses = np.full(self.layout.blocks, MOVED, np.uint8)
        statuses[blocks] = known  # NEW is APPLIED, DUPLICATE is DUPLICATE
        return statuses

    def _later(self, requests: Sequence[PushRequest | PullRequest]) -> Refusal | None:
        """Why pushes have to come again: a cut is written more slowly than rows change, and memory is bounded."""
        rows: dict[int, int] = {}
        for part in (part for request in requests for part in request.parts):
            rows[part.slab] = rows.get(part.slab, 0) + len(part.index)
        if self._makes_room(rows):
            return None
        return Refusal(LATER, f"shard {self.number}: store.memory_bytes are used up until a checkpoint is written")

    def _commit(self, decided: Sequence[tuple[PushRequest, np.ndarray]]) -> None:
        """Writes down, marks and applies what is new of pushes (with their statuses), as one.

        Raises:
            JournalError: nothing was applied.
        """
        failpoints.hit("push.checked")
        updates = sum_decided(decided)  # what may fail for want of memory comes before the record
        if self.journal is not None and any(r.clock is not None or (s == APPLIED).any() for r, s in decided):
            self.journal.append(Kind.PUSHES, *encode_pushes(decided))
        failpoints.hit("push.journalled")
        for request, statuses in decided:
            clock = request.clock
            generation = ledger.NO_GENERATION if clock is None else clock.generation
            blocks = request.touched(self.layout.blocks)
            self.ledger.mark(request.client, request.sequence, blocks[statuses[blocks] == APPLIED], generation)
            if clock is not None:
                self.clocks.record(clock.rank, clock.step)
        for update in updates:
            self._update(*update)
        failpoints.hit("push.applied")

    def _acknowledge(self, applied: Sequence[tuple[object, PushRequest, np.ndarray]]) -> list[Completed]:
        """Not if the lease has ended meanwhile: the process was stopped, perhaps before the record was written."""
        if self.lease.ended:
            return [done for token, _, _ in applied for done in self._unleased(token)]
        completed = []
        for token, request, statuses in applied:
            replies = [statuses[part.blocks] for part in request.parts]
            self._counts["pushes"] += 1
            for reply in (reply for reply in replies if reply.any()):
                self._counts["duplicates"] += int(np.count_nonzero(reply == BlockStatus.DUPLICATE))
                self._counts["moved"] += int(np.count_nonzero(reply == BlockStatus.MOVED))
            completed.append(Completed(token, PushReply(replies)))
        return completed

    def _update(self, slab: int, index: np.ndarray, grads: np.ndarray, rate: float) -> None:
        memory = self._memory[slab]
        self._save_pre_images(slab, index)
        self._transit.note(slab, index, memory.slab.rows_per_block)
        memory.update(index, grads, rate, self.threads)
        self._counts["rows_pushed"] += len(index)

    def _hold(self, call: WaitingCall) -> list[Completed]:
        assert isinstance(call.request, PushRequest)
        ranks = self._waiting.steps.setdefault(call.clock.step, {})
        rates = {part.slab: rate for other in ranks.values() for held in other for part, rate in _rates(held.request)}
        for part, rate in _rates(call.request):
            if not math.isclose(rates.get(part.slab, rate), rate, rel_tol=1e-6):
                text = f"step {call.clock.step}, slab {part.slab}: rank {call.clock.rank} states learning rate {rate}"
                return self._refused(call.token, Refusal(INVALID, f"{text}, another rank {rates[part.slab]}"))
        ranks.setdefault(call.clock.rank, []).append(call)
        completed: list[Completed] = []
        while len(self._waiting.steps.get(self.clocks.step + 1, {})) == self.clocks.workers:
            completed += self._complete(self._waiting.steps.pop(self.clocks.step + 1))
        return completed + self._release() if completed else []

    def _complete(self, ranks: Mapping[int, list[WaitingCall]]) -> list[Completed]:
        """Applies one step of `sync`: the pushes of all ranks added in rank order. A repetition only gets an answer."""
        calls = [call for rank in sorted(ranks) for call in ranks[rank]]
        if (refusal := self._later([call.request for call in calls])) is not None:
            return [done for call in calls for done in self._refused(call.token, refusal)]
        completed: list[Completed] = []
        decided: list[tuple[PushRequest, np.ndarray]] = []
        answered: list[tuple[object, PushRequest, np.ndarray]] = []
        taken: dict[tuple[int, int], np.ndarray] = {}  # (client, sequence) -> blocks that an earlier call brings
        for call in calls:
            request = call.request
            assert isinstance(request, PushRequest)
            try:
                statuses = self._decide(request)
            except LookupError as error:
                completed += self._refused(call.token, Refusal(TOO_OLD, str(error)))
                request = PushRequest(request.client, request.sequence, [], [], [], call.clock)  # its clock counts
                decided.append((request, np.full(self.layout.blocks, MOVED, np.uint8)))
                continue
            before = taken.setdefault((request.client, request.sequence), np.zeros(len(statuses), np.bool_))
            statuses[before & (statuses == APPLIED)] = BlockStatus.DUPLICATE
            before |= statuses == APPLIED
            decided.append((request, statuses))
            answered.append((call.token, request, statuses))
        try:
            self._commit(decided)
        except JournalError as error:
            refusal = Refusal(NOT_WRITTEN, str(error))
            return completed + [done for token, _, _ in answered for done in self._refused(token, refusal)]
        return completed + self._acknowledge(answered)

    def _release(self) -> list[Completed]:
        """Answers the pulls whose clock is satisfied now."""
        waiting = self._waiting
        ready = [call for call in waiting.pulls if self._may_pull(call.clock)]
        if ready:
            waiting.pulls = [call for call in waiting.pulls if not self._may_pull(call.clock)]
            if self.lease.ended:
                return [done for call in ready for done in self._unleased(call.token)]
        return [Completed(c.token, self._read(c.request)) for c in ready if isinstance(c.request, PullRequest)]


def _rates(request: PullRequest | PushRequest) -> Iterable[tuple[RowSet, float]]:
    assert isinstance(request, PushRequest)
    return zip(request.parts, request.learning_rates, strict=True)
