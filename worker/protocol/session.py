"""One worker's part in a job: what may run, what goes to whom, what is kept for replay. Sans I/O, for one thread.

Events go in (`arrived`, `completed`, `backup`, `commit`, `switch` ...); what must be done then comes out of `take`, in
order. No socket, clock, thread or tensor is touched here: values are parcels that are never looked into. So the property
tests play thousands of failures with this very class.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence, Set
from dataclasses import replace
from typing import Any, Generic, TypeVar

from dag.cut import Partition
from executor.board import TaskBoard
from executor.ordering import Task, TaskKind
from fusion.messages import TrainConfig
from fusion.plan import Plan
from fusion.wire import FrameKind, Header
from worker.protocol.dispatch import Dispatch
from worker.protocol.inbox import Inbox
from worker.protocol.instructions import (
    Instruction,
    LendParameters,
    MissBackup,
    ReportStep,
    SayCaughtUp,
    SayPaused,
    Send,
    TakeSnapshot,
)
from worker.protocol.pacing import STEPS_AHEAD, Pacing
from worker.protocol.replay_log import Key, Parcel, ReplayLog, Sent

P = TypeVar("P", bound=Parcel)


class Session(Generic[P]):
    """The fragments of one worker from `first_step` on, under a plan whose placement may change.

    With `log_bytes` 0 nothing is kept for replay beyond what the next step makes safe to forget; otherwise the log
    is kept since the common snapshot, and no further step is begun while it holds more than that. `empty` is a parcel
    that carries nothing. With `log_own`, what stays on this worker is logged as well, for spot checks; otherwise it is while
    fragments move without a hold.
    """

    def __init__(
        self,
        *,
        job: str,
        worker: str,
        plan: Plan,
        partition: Partition,
        train: TrainConfig,
        first_step: int,
        empty: P,
        log_bytes: int = 0,
        log_own: bool = False,
    ) -> None:
        self._job = job
        self._worker = worker
        self._train = train
        self._partition = partition
        self._plan = plan
        self._log_bytes = log_bytes
        self._log_own = log_own
        self._own_after: int | None = None
        """What stays on this worker is logged after this step."""
        self._empty = empty
        hosted = plan.fragments_of(worker)
        self.board = TaskBoard(
            partition,
            hosted,
            schedule=plan.schedule,
            micro_batches=train.micro_batches,
            in_flight=plan.in_flight,
            steps=train.steps,
            clip=train.clip_grad_norm is not None,
            weights_behind=plan.weights_behind,
            first_step=first_step,
            eval_every=train.eval_every,
            eval_batches=train.eval_batches,
        )
        self.inbox: Inbox[Any] = Inbox()
        self.log: ReplayLog[P] = ReplayLog()
        self.dispatch = Dispatch(plan, partition, worker)
        self._pacing = Pacing(partition, hosted, first_step)
        self.base = first_step - 1
        """The common snapshot: nothing up to this step will be asked for again."""
        # Per fragment: the first step that it is not through with, the last one updated, the last one reported.
        self._floor = dict.fromkeys(hosted, first_step)
        self._updated = dict.fromkeys(hosted, first_step - 1)
        self._reported = dict.fromkeys(hosted, first_step - 1)
        self._orders: dict[int, dict[int, str]] = {}
        self._hold: int | None = None
        self._paused: int | None = None
        self._full = False
        # Fragments that replay, and the last step that anybody had finished when they began.
        self._replaying: set[int] = set()
        self._adopted: tuple[int, ...] = ()
        self._frontier = 0
        self._out: list[Instruction[P]] = []

    # What can be asked ---------------------------------------------------------------------------------------------

    @property
    def plan(self) -> Plan:
        return self._plan

    @property
    def epoch(self) -> int:
        return self._plan.epoch

    @property
    def hosted(self) -> tuple[int, ...]:
        return tuple(self.board.orders)

    @property
    def finished(self) -> bool:
        """Whether all fragments here have done all steps."""
        return self.board.finished

    @property
    def replaying(self) -> Set[int]:
        """The fragments here that others wait for, or that have yet to get to where the others are."""
        return self._replaying

    @property
    def step(self) -> int:
        """The lowest step that a fragment here is in."""
        return min((self.board.position(fragment) for fragment in self.hosted), default=self.base + 1)

    def take(self) -> list[Instruction[P]]:
        """The instructions since the last call, in order."""
        taken, self._out = self._out, []
        return taken

    def next_task(self) -> Task | None:
        """The task to run now, if any may."""
        task = self.board.next_task()
        return self.board.postponed() if task is None or self._pacing.holds(task) else task

    def owed(self) -> list[tuple[str, Key]]:
        """What the next tasks wait for that comes from elsewhere, with the worker that makes it."""
        task = self.board.next_task()
        keys = [*self.board.owed(), *(self._pacing.owed(task) if task is not None else [])]
        sources = ((self._plan.placement[self.dispatch.source(key[0], key[1])], key) for key in keys)
        return [(source, key) for source, key in sources if source != self._worker]

    # What happens --------------------------------------------------------------------------------------------------

    def begin(self) -> None:
        """Training starts."""
        for fragment in self.hosted:
            self._out.append(LendParameters(fragment, self.board.position(fragment)))

    def emit(self, header: Header, parcel: P) -> None:
        """A task has made a message: hand it over here, and send it to the peers that it is for."""
        key = header.key
        for to in self.dispatch.receivers(header.kind, header.edge):
            if to == self._worker:
                self._accept(key, parcel)
                if self._log_own or (self._own_after is not None and header.step > self._own_after):
                    self.log.record(header, parcel)
                continue
            self.log.record(header, parcel)
            if self.dispatch.due(key, to):
                fitting = header if self.dispatch.stayed(key) else Sent(header, parcel).again(self.epoch)
                self._out.append(Send(to, fitting, parcel))

    def arrived(self, header: Header, sender: str, value: Any) -> bool:
        """An admitted message is here. False when it was here already or is not needed any more.

        UNDER_WAY counts for what it names, which has come before it, or never will.
        """
        match header.kind:
            case FrameKind.SWITCHED:
                if self.dispatch.heard(sender, header.epoch, header.step):
                    self._release(sender)
                if header.micro_batch and header.epoch == self.epoch:
                    self._say_switched(self._kept_floor(), (sender,))
                self._restrain()
                return True
            case FrameKind.RESEND | FrameKind.MISSED:
                self._answer(header, sender)
                return True
            case FrameKind.UNDER_WAY:
                lost = (sender, _named(header)) in self.owed()
                if lost:
                    self._out.append(Send(sender, replace(header, epoch=self.epoch, kind=FrameKind.MISSED)))
                return lost
            case _:
                return self._accept(header.key, value)

    def completed(self, task: Task) -> None:
        """A task has run, and what it made was emitted."""
        for key in self.board.completed(task):
            self.inbox.discard(key)
        fragment = task.fragment
        if task.kind is TaskKind.UPDATE:
            self._updated[fragment] = task.step
            if self.board.wants_parameters(task.step + 1):
                self._out.append(LendParameters(fragment, task.step + 1))
            to = self._orders.get(task.step, {}).get(fragment)
            if to is not None:
                self._out.append(TakeSnapshot(fragment, task.step, to))
            self._report_steps()
        if task.kind in (TaskKind.UPDATE, TaskKind.EVALUATE):
            self._advance(fragment)

    def backup(
        self, step: int, backups: Mapping[int, str], hold: bool, *, log_own: bool = False, again: bool = False
    ) -> None:
        """Snapshots after `step` are wanted of the fragments that are hosted here; `again` if that was said before.

        With `log_own`, what they make for each other after that is logged too.
        """
        if again and step in self._orders:
            return
        wanted = {fragment: to for fragment, to in backups.items() if fragment in self._updated}
        concerned = self._updated if log_own else wanted
        late = [fragment for fragment in concerned if self._updated[fragment] >= step]
        if late:
            self._out.extend(MissBackup(fragment, step) for fragment in late)
            return
        self._orders[step] = wanted
        self._own_after = step if log_own else None
        if hold:
            self._hold = step
            self._paused = None
        self._restrain()
        self._maybe_paused()

    def commit(self, step: int) -> None:
        """`step` is the common snapshot now."""
        if step <= self.base:
            return
        self.base = step
        self.log.forget(step)
        self._orders = {at: wanted for at, wanted in self._orders.items() if at > step}
        self._pacing.through(step)
        self.dispatch.settle()
        self.measure_log()
        self._restrain()

    def switch(self, plan: Plan, step: int) -> tuple[int, ...]:
        """Follow a plan with another placement; fragments that are new here go on after `step`. Returns those.

        Their state must be in place before the next task runs.
        """
        self.commit(step)
        before, now = frozenset(self.hosted), frozenset(plan.fragments_of(self._worker))
        others = [fragment for fragment in self.hosted if fragment in now]
        floor = min((self.board.position(fragment) for fragment in others), default=step + 1)
        self._frontier = max([step, *self._updated.values()])
        self._plan = plan
        self._hold = self._paused = self._own_after = None
        self._orders = {}
        for fragment in sorted(before - now):
            for key in self.board.drop(fragment):
                self.inbox.discard(key)
            del self._floor[fragment], self._updated[fragment], self._reported[fragment]
            self._replaying.discard(fragment)
        self._report_steps()  # Of those that stay, which may have waited for one that has gone.
        self.board.weights_behind = plan.weights_behind
        added = tuple(sorted(now - before))
        for fragment in added:
            self.board.add(fragment, step + 1)
            self._floor[fragment] = step + 1
            self._updated[fragment] = self._reported[fragment] = step
        if added:
            self._adopted = added
            self._replaying.update(added)
        self._pacing.host(now, step + 1)
        self.dispatch.switch(plan)
        if self._log_bytes == 0:
            self.log.forget(step)
        self.measure_log()
        self._restrain()
        for sent in self.log:
            # What went to a fragment elsewhere until now, and is needed here.
            if self._worker in self.dispatch.receivers(sent.header.kind, sent.header.edge):
                self._accept(sent.header.key, sent.parcel)
        self._say_switched(floor, self.dispatch.peers)
        # Of those that stay too: what was handed over here is in no log, and its receiver may have moved away.
        lenders = [fragment for fragment, updated in self._updated.items() if updated == step]
        if self.board.wants_parameters(step + 1):
            self._out.extend(LendParameters(fragment, step + 1) for fragment in lenders)
        for peer in self.dispatch.peers:
            self._release(peer)
        return added

    def ask_again(self, peer: str | None = None) -> list[tuple[str, Key]]:
        """Nothing has come for long, or the connection to `peer` is a new one: ask for what is owed, by it alone. Returns it."""
        owed = [(source, key) for source, key in self.owed() if peer in (None, source)]
        for source, (kind, edge, step, micro_batch) in owed:
            header = Header(self._job, self.epoch, FrameKind.RESEND, edge, step, micro_batch, kind.name)
            self._out.append(Send(source, header))
        # The word that we follow the plan may have been lost on either way.
        self._say_switched(self._kept_floor(), self.dispatch.unheard, ask=True)
        return owed

    def measure_log(self) -> int:
        """Look how much the log holds; beyond its limit, no further step is begun. Returns the bytes."""
        held = self.log.nbytes
        # A worker that hosts everything keeps its log for nobody.
        full = bool(self._log_bytes and self.dispatch.peers) and held > self._log_bytes
        if full != self._full:
            self._full = full
            self._restrain()
        return held

    # Pieces --------------------------------------------------------------------------------------------------------

    def _report_steps(self) -> None:
        """The steps that every fragment here is past, one report for all that ran them."""
        through = min(self._updated.values(), default=0)
        while (step := min(self._reported.values(), default=through) + 1) <= through:
            ran = tuple(sorted(fragment for fragment, told in self._reported.items() if told < step))
            self._reported.update(dict.fromkeys(ran, step))
            self._out.append(ReportStep(step, ran))

    def _accept(self, key: Key, value: Any) -> bool:
        if key[0] is FrameKind.DONE:
            self._pacing.heard(key[1], key[2])
            return True
        if not self.board.arrived(*key):
            return False
        self.inbox.put(key, value)
        return True

    def _answer(self, request: Header, to: str) -> None:
        """Send again what is missing. What was asked for may still be in a queue before a slow link, where a copy would
        only make the queue longer: so the answer to a RESEND is, in its place in that queue, that it is under way."""
        key = _named(request)
        sent = self.log.find(key)
        if sent is None or not self.dispatch.ours(key) or to not in self.dispatch.receivers(key[0], key[1]):
            return
        if request.kind is FrameKind.RESEND and sent.parcel.nbytes:
            self._out.append(Send(to, replace(request, epoch=self.epoch, kind=FrameKind.UNDER_WAY)))
        else:
            self._out.append(Send(to, sent.again(self.epoch), sent.parcel))

    def _release(self, peer: str) -> None:
        """Send what has been held back for a peer that follows our plan."""
        for sent in self.dispatch.held_back(peer, self.log):
            self._out.append(Send(peer, sent.again(self.epoch), sent.parcel))

    def _kept_floor(self) -> int:
        """The first step that fragments here which don't replay still need."""
        kept = (self.board.position(fragment) for fragment in self.hosted if fragment not in self._replaying)
        return min(kept, default=self.base + 1)

    def _say_switched(self, floor: int, peers: Sequence[str], *, ask: bool = False) -> None:
        """That we follow the plan; with `ask`, they are to say so too."""
        said = Header(self._job, self.epoch, FrameKind.SWITCHED, 0, floor, int(ask))
        self._out.extend(Send(peer, said) for peer in peers)

    def _restrain(self) -> None:
        """How far tasks may go: to the hold, and with a full log to the next snapshot that was ordered."""
        limits = [] if self._hold is None else [self._hold]
        if self._full:
            # One more than the snapshot's step: it counts when everybody is through with its evaluation, too.
            # What replays may go as far as the others are, or there will be no newer snapshot.
            reached = [self.step, self._frontier, self.dispatch.furthest]
            limit = max([*reached, *(step + 1 for step in self._orders)])
            # So near the end, those who are ahead may have left no step for another snapshot.
            if limit < self._train.steps - 2 - STEPS_AHEAD:
                limits.append(limit)
        self.board.hold_after = min(limits, default=None)

    def _maybe_paused(self) -> None:
        hold = self._hold
        if hold is not None and self._paused != hold and all(floor > hold for floor in self._floor.values()):
            self._paused = hold
            self._out.append(SayPaused(hold))

    def _advance(self, fragment: int) -> None:
        """Let go of what nobody needs any more, now that a fragment may have left a step behind."""
        floor = self.board.position(fragment)
        for step in range(self._floor[fragment], floor):
            for edge in self._pacing.to_say(fragment):
                self.emit(Header(self._job, self.epoch, FrameKind.DONE, edge.index, step, 0), self._empty)
        self._floor[fragment] = floor
        lowest = min(self._floor.values())
        self.inbox.close(lowest - 1)
        if self._log_bytes == 0:
            self.log.forget(lowest - self._pacing.kept_steps)
        self._maybe_paused()
        if fragment in self._replaying and floor > max(self._frontier, self.dispatch.furthest - 1):
            self._replaying.discard(fragment)
            if not self._replaying:
                self._out.append(SayCaughtUp(self._adopted, floor - 1 - self.base))


def _named(request: Header) -> Key:
    """The key of the message that a RESEND, MISSED or UNDER_WAY is about."""
    return (FrameKind[request.codec], request.edge, request.step, request.micro_batch)
