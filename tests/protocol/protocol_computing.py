"""The compute thread of one job: the real session and accounts, under the rules of `worker.jobs.host`."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING

from protocol_values import META, NOTHING, Program, Value, part_of

from executor.ordering import Task, TaskKind
from fusion.messages import (
    Adopted,
    Backup,
    BackupFailed,
    CaughtUp,
    CheckpointPart,
    Commit,
    Finished,
    Paused,
    Prepare,
)
from fusion.plan import CodecChoice, Plan
from fusion.wire import FrameKind, Header
from worker.protocol import instructions as todo
from worker.protocol.accounts import Accounts
from worker.protocol.session import Session
from worker.protocol.waiting import Patience

if TYPE_CHECKING:
    from protocol_worker import Process


@dataclass(frozen=True, slots=True)
class Arrived:
    """A message of a peer, admitted."""

    header: Header
    sender: str
    value: Value | None


@dataclass(frozen=True, slots=True)
class Switch:
    """Follow this plan; the states are those of the fragments that are new here."""

    plan: Plan
    step: int
    states: dict[int, int]


class Computing:
    """Runs what the session lets run and carries out what it decides.

    `transmit(to, header, parcel)` sends to a peer, `ship(fragment, step, to, state)` a snapshot to its backup worker.
    """

    def __init__(
        self,
        process: Process,
        prepare: Prepare,
        first_step: int,
        transmit: Callable[[str, Header, Value | None], None],
        ship: Callable[[int, int, str, int], None],
    ) -> None:
        self.process = process
        self.world = process.world
        self.case = process.world.case
        self.job = prepare.job
        self.prepare = prepare
        self.session: Session[Value] = self.world.session(
            job=prepare.job,
            worker=process.name,
            plan=prepare.plan,
            partition=self.case.partition,
            train=prepare.train,
            first_step=first_step,
            empty=NOTHING,
            log_bytes=prepare.log_bytes,
        )
        self.made: set[tuple[FrameKind, int, int, int]] = set()
        """Keys of what was made here for fragments elsewhere."""
        self.sent: set[tuple[int, int, int]] = set()
        """(edge, step, micro-batch) of the activations that gradients are still to come for."""
        self._kept: dict[tuple[int, int, int], str] = {}
        self.programs: dict[int, Program] = {}
        self.started = False
        self.closed = False
        self._transmit = transmit
        self._ship = ship
        self._accounts = Accounts(prepare.job, prepare.train)
        self._patience = Patience(prepare.failure_timeout)
        self._queue: deque[Arrived | Switch | Backup | Commit] = deque()
        self._computing = False
        self._uploads = 0
        self._finished_epoch = -1
        self._adopted_at = 0.0
        self._quiet_since = self.world.clock.now
        self._timer = False

    @property
    def epoch(self) -> int:
        return self.session.epoch

    def later(self, delay: float, do: Callable[[], None]) -> None:
        self.process.later(delay, lambda: None if self.closed else do())

    def post(self, event: Arrived | Switch | Backup | Commit) -> None:
        self._queue.append(event)
        self._pump()

    def start(self) -> None:
        assert not self.started, "the compute thread was started twice"
        self.started = True
        self.session.begin()
        self._pump()

    def _pump(self) -> None:
        if not self.started or self._computing:
            return
        while self._queue:
            self._take_in(self._queue.popleft())
        self._carry_out()
        task = self.session.next_task()
        if task is not None:
            self._begin(task)
            return
        self._maybe_finished()
        if not self._timer:
            self._timer = True
            self.later(max(0.0, self._left()), self._time_out)

    def _left(self) -> float:
        return self._quiet_since + self._patience.left() - self.world.clock.now

    def _time_out(self) -> None:
        if self._left() > 1e-9:
            self.later(self._left(), self._time_out)
            return
        self._timer = False
        if not self._computing:
            self.session.ask_again()
            self._patience.asked()
            self._quiet_since = self.world.clock.now
            self._pump()

    def _take_in(self, event: Arrived | Switch | Backup | Commit) -> None:
        match event:
            case Arrived(header, sender, value):
                wanted = self.session.arrived(header, sender, value)
                if header.kind in (FrameKind.RESEND, FrameKind.MISSED):
                    return
                if header.kind is FrameKind.UNDER_WAY:
                    if not wanted:
                        self._patience.duplicated()
                    return
                if wanted:
                    self._patience.arrived()
                    self._quiet_since = self.world.clock.now
                else:
                    self._patience.duplicated()
            case Backup():
                if event.epoch == self.epoch:
                    self.session.backup(event.step, event.backups, event.hold, log_own=event.log_own, again=event.again)
            case Commit():
                self.session.commit(event.step)
            case Switch():
                self._adopted_at = self.world.clock.now
                for fragment, state in event.states.items():
                    self.programs[fragment] = Program(self.case.partition, fragment, state)
                added = self.session.switch(event.plan, event.step)
                handed_over = set(self.programs) - set(self.session.hosted)
                for fragment in handed_over:
                    del self.programs[fragment]
                self._accounts.forget(handed_over)
                self.process.send(Adopted(job=self.job, epoch=self.epoch, fragments=list(added)))

    def _begin(self, task: Task) -> None:
        self.world.begins(self, task)
        self._computing = True
        seconds = self.world.seconds(self.process.name, task)
        self.later(seconds, lambda: self._end(task, seconds))

    def _end(self, task: Task, seconds: float) -> None:
        match task.kind:
            case TaskKind.FORWARD:
                self._forward(task)
            case TaskKind.BACKWARD:
                self._backward(task)
            case TaskKind.WEIGHTS:
                self.programs[task.fragment].weights(task.step, task.micro_batch)
            case TaskKind.UPDATE:
                self._update(task)
            case TaskKind.EVALUATE:
                self._evaluate(task)
        if self.prepare.train.clip_grad_norm is not None and self.session.board.completes_gradients(task):
            self._tell_norms(task)
        self._accounts.spent(task, seconds)
        self.session.completed(task)
        if task.kind is TaskKind.UPDATE:
            self._checkpoint(task)
        self._carry_out()
        self._quiet_since = self.world.clock.now
        self._computing = False
        self._pump()

    def _forward(self, task: Task) -> None:
        program = self.programs[task.fragment]
        postpone = self.session.board.postpones(task.fragment)
        made = program.forward(task.step, task.micro_batch, self._arrivals(task), postpone=postpone)
        for edge, value in made.items():
            self._pass_on(FrameKind.ACTIVATION, edge, task.step, task.micro_batch, value)
        loss = program.loss(task.step, task.micro_batch)
        if loss is not None:
            self._accounts.lost(task.fragment, task.step, loss)

    def _backward(self, task: Task) -> None:
        program = self.programs[task.fragment]
        self.sent -= {key[1:] for key in self.session.board.needs(task)}
        for edge, value in program.backward(task.step, task.micro_batch, self._arrivals(task)).items():
            self._pass_on(FrameKind.GRADIENT, edge, task.step, task.micro_batch, value)

    def _tell_norms(self, task: Task) -> None:
        header = Header(self.job, self.epoch, FrameKind.NORMS, task.fragment, task.step, 0, "none", "float32", (1,))
        self._emit(header, Value(self.programs[task.fragment].norms(), 4))

    def _update(self, task: Task) -> None:
        program = self.programs[task.fragment]
        program.update(task.step, self._arrivals(task))
        expected = self.case.undisturbed.states[task.fragment, task.step]
        assert program.state == expected, f"fragment {task.fragment} has another state after step {task.step}"

    def _evaluate(self, task: Task) -> None:
        program = self.programs[task.fragment]
        outputs, loss = program.evaluate(task.step, task.micro_batch, self._arrivals(task))
        for edge, value in outputs.items():
            self._pass_on(FrameKind.EVALUATION, edge, task.step, task.micro_batch, value)
        if loss is not None:
            report = self._accounts.evaluated(self.epoch, task.fragment, task.step, loss)
            if report is not None:
                self.process.send(report)

    def _arrivals(self, task: Task) -> dict[int, int]:
        inbox, edges, found = self.session.inbox, self.case.partition.edges, {}
        for key in self.session.board.needs(task):
            stays = key[0] is FrameKind.NORMS or (
                key[0] is not FrameKind.GRADIENT and edges[key[1]].kind == "parameter"
            )
            arrival = inbox.get(key) if stays else inbox.take(key)
            assert arrival.value == self.case.undisturbed.values[key], f"{key} has other bits"
            found[key[1]] = arrival.value
            if key[0] is FrameKind.ACTIVATION:
                self._kept[key[1:]] = arrival.places
        return found

    def _pass_on(self, kind: FrameKind, edge: int, step: int, micro_batch: int, value: int) -> None:
        choice, key = self.case.codecs.get(edge, CodecChoice()), (edge, step, micro_batch)
        codec, places = choice.forward, self.process.key
        if kind is FrameKind.GRADIENT:
            codec, places = choice.backward, self._kept.pop(key, "")
        elif kind is FrameKind.ACTIVATION:
            self.sent.add(key)
        header = Header(self.job, self.epoch, kind, *key, codec, META.dtype, META.shape)
        self._emit(header, Value(value, places=places))

    def _emit(self, header: Header, value: Value) -> None:
        assert value.value == self.case.undisturbed.values[header.key], f"{header.key} came out with other bits"
        if any(worker != self.process.name for worker in self.session.dispatch.receivers(header.kind, header.edge)):
            self.made.add(header.key)
        self.session.emit(header, value)

    def _carry_out(self) -> None:
        while instructions := self.session.take():
            for instruction in instructions:
                match instruction:
                    case todo.Send(to, header, parcel):
                        self._transmit(to, header, parcel)
                    case todo.LendParameters(fragment, step):
                        for edge, value in self.programs[fragment].parameters().items():
                            self._pass_on(FrameKind.ACTIVATION, edge, step, 0, value)
                    case todo.TakeSnapshot(fragment, step, to):
                        state = self.programs[fragment].state
                        assert state == self.case.undisturbed.states[fragment, step], "a snapshot of another step"
                        self.later(0.02 * self.world.dice.random(), partial(self._ship, fragment, step, to, state))
                    case todo.ReportStep(step, fragments):
                        logged = self.session.measure_log()
                        self.world.measured(self, logged)
                        self.process.send(
                            self._accounts.step_report(self.epoch, step, fragments, {}, 0, logged, self.world.clock.now)
                        )
                    case todo.SayPaused(step):
                        self.process.send(Paused(job=self.job, epoch=self.epoch, step=step))
                    case todo.MissBackup(fragment, step):
                        self.process.send(
                            BackupFailed(job=self.job, epoch=self.epoch, step=step, fragment=fragment, cause="passed")
                        )
                    case todo.SayCaughtUp(fragments, steps):
                        took = self.world.clock.now - self._adopted_at
                        self.process.send(
                            CaughtUp(
                                job=self.job, epoch=self.epoch, fragments=list(fragments), steps=steps, seconds=took
                            )
                        )

    def _checkpoint(self, task: Task) -> None:
        step, train = task.step, self.prepare.train
        if step == train.steps or (train.checkpoint_every and step % train.checkpoint_every == 0):
            self._uploads += 1
            state, fragment = self.programs[task.fragment].state, task.fragment
            self.later(0.02 + 0.3 * self.world.dice.random(), lambda: self._uploaded(step, fragment, state))

    def _uploaded(self, step: int, fragment: int, state: int) -> None:
        if not self.world.upload(self.process, state):
            self.later(0.5, lambda: self._uploaded(step, fragment, state))
            return
        self._uploads -= 1
        self.process.send(
            CheckpointPart(job=self.job, epoch=self.epoch, step=step, fragment=fragment, blob=part_of(state))
        )
        self._pump()

    def _maybe_finished(self) -> None:
        session = self.session
        if not session.finished or not session.hosted or self._finished_epoch == session.epoch or self._uploads:
            return
        self._finished_epoch = session.epoch
        self.process.send(Finished(job=self.job, epoch=session.epoch))
