"""One job in a worker process: the real session, accounts and admission, under the rules of `worker.job_run` and `worker.host`."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import TYPE_CHECKING

from protocol_snapshots import POKE_SECONDS, Snapshots
from protocol_values import META, NOTHING, Program, Value, part_of

from executor.ordering import Task, TaskKind
from fusion.messages import (
    Adopt,
    Adopted,
    Backup,
    BackupFailed,
    CantAdopt,
    CaughtUp,
    CheckpointPart,
    Commit,
    Connect,
    Connected,
    Failure,
    Finished,
    Paused,
    PeerAddress,
    PeerLost,
    Prepare,
    Ready,
    Start,
    Warned,
)
from fusion.plan import Plan
from fusion.wire import FrameKind, Header
from worker import session as todo
from worker.accounts import Accounts
from worker.admission import Admission, Refused
from worker.session import Session
from worker.waiting import Patience

if TYPE_CHECKING:
    from protocol_worker import Process

HANDSHAKE_PATIENCE = 30.0
_SNAPSHOTS = (FrameKind.SNAPSHOT, FrameKind.SNAPSHOT_WANT)

Order = Start | Backup | Commit | Adopt | Connect


@dataclass(frozen=True, slots=True)
class Arrived:
    header: Header
    sender: str
    value: Value | None


@dataclass(frozen=True, slots=True)
class Switch:
    plan: Plan
    step: int
    states: dict[int, int]


class JobRun:
    """From `Prepare` until it is dropped."""

    def __init__(self, process: Process, prepare: Prepare) -> None:
        self.process = process
        self.world = process.world
        self.case = process.world.case
        self.job = prepare.job
        self.prepare = prepare
        self.first_step = prepare.resume.step + 1 if prepare.resume is not None else 1
        self.session: Session[Value] = self.world.new_session(
            job=prepare.job,
            worker=process.name,
            plan=prepare.plan,
            partition=self.case.partition,
            train=prepare.train,
            first_step=self.first_step,
            empty=NOTHING,
            log_bytes=prepare.log_bytes,
        )
        self.hosted = prepare.plan.fragments_of(process.name)
        self.route: dict[str, str] = {}
        """Peer -> key."""
        self.made: set[tuple[FrameKind, int, int, int]] = set()
        """Keys of what was made here for fragments elsewhere."""
        self._admission = self._admit(prepare.plan)
        self._programs: dict[int, Program] = {}
        self._accounts = Accounts(prepare.job, prepare.train)
        self._patience = Patience(prepare.failure_timeout)
        self.snapshots = Snapshots(
            prepare.job,
            self._transmit,
            process.send,
            lambda: self.session.epoch,
            lambda fragment: (process.name, fragment) not in self.world.full,
            lambda: self.world.dice.random() < self.world.damage,
        )
        self._queue: deque[Arrived | Switch | Backup | Commit] = deque()
        self._orders: deque[Order] = deque()
        self._standby: dict[int, bool] = {}
        """Fragment -> whether it is built."""
        self._ready = self._following = False
        self.started = self._computing = self._closed = False
        self._uploads = 0
        self._finished_epoch = -1
        self._adopted_at = 0.0
        self._wait_until = 0.0
        self._timer = False

    @property
    def epoch(self) -> int:
        return self.session.epoch

    def close(self) -> None:
        self._closed = True
        self.process.gate.clear()

    def later(self, delay: float, do: Callable[[], None]) -> None:
        self.process.later(delay, lambda: None if self._closed else do())

    # Getting ready -----------------------------------------------------------------------------------------------

    def make_ready(self) -> None:
        peers = self._others(self.prepare.peers)
        self.process.gate.update(peer.public_key for peer in peers)
        self.later(0.02 + 0.2 * self.world.dice.random(), lambda: self._build(peers))

    def _build(self, peers: list[PeerAddress]) -> None:
        for fragment in self.hosted:
            state = self.world.weights(self.first_step - 1, fragment)
            if state is None:
                self._fail(f"no weights after step {self.first_step - 1}")
                return
            self._programs[fragment] = Program(self.case.partition, fragment, state)
        self._shake_hands(peers, self._built, lambda: self._fail("can't reach a peer"))

    def _fail(self, why: str) -> None:
        self.process.send(Failure(job=self.job, epoch=self.prepare.plan.epoch, message=why))

    def _built(self) -> None:
        self._ready = True
        if not self.hosted:
            self._start()
        self.process.send(Ready(job=self.job, epoch=self.prepare.plan.epoch))
        self.later(POKE_SECONDS, self._poke)
        self._follow()

    def _poke(self) -> None:
        self.snapshots.poke()
        if not self.started:
            self.process.send(Ready(job=self.job, epoch=self.prepare.plan.epoch))
        self.later(POKE_SECONDS, self._poke)

    def _others(self, peers: Iterable[PeerAddress]) -> list[PeerAddress]:
        return [peer for peer in peers if peer.worker != self.process.name]

    def _shake_hands(self, peers: list[PeerAddress], done: Callable[[], None], failed: Callable[[], None]) -> None:
        """Connect to these; `done` when all have let us in, `failed` when they have not for long."""
        self.process.gate.update(peer.public_key for peer in peers)
        self.route.update({peer.worker: peer.public_key for peer in peers})
        self._await_hands(peers, done, failed, self.world.clock.now + HANDSHAKE_PATIENCE)

    def _await_hands(
        self, peers: list[PeerAddress], done: Callable[[], None], failed: Callable[[], None], until: float
    ) -> None:
        if all(self.world.lets_in(peer.public_key, self.process) for peer in peers):
            done()
        elif self.world.clock.now >= until:
            for peer in peers:
                self.route.pop(peer.worker, None)
            failed()
        else:
            self.later(0.1, lambda: self._await_hands(peers, done, failed, until))

    # Orders ------------------------------------------------------------------------------------------------------

    def take(self, order: Order) -> None:
        self._orders.append(order)
        self._follow()

    def _follow(self) -> None:
        if not self._ready or self._following or not self._orders:
            return
        self._following = True
        order = self._orders.popleft()
        match order:
            case Start():
                if order.epoch == self.epoch and not self.started:
                    self._start()
                    self._stand_by(self.prepare.backups)
                self._followed()
            case Backup():
                self._post(order)
                self._stand_by(order.backups)
                self._followed()
            case Commit():
                self._post(order)
                self.snapshots.commit(order.step)
                self._followed()
            case Connect():
                self._connect(order.peers, self._followed)
            case Adopt():
                self._adopt(order)

    def _followed(self) -> None:
        self._following = False
        self._follow()

    def _connect(self, peers: list[PeerAddress], then: Callable[[], None]) -> None:
        new = [peer for peer in self._others(peers) if peer.worker not in self.route]

        def done() -> None:
            self.process.send(Connected(job=self.job, peers=[peer.worker for peer in peers]))
            then()

        def failed() -> None:
            self.process.send(Warned(job=self.job, message="can't reach a peer"))
            then()

        self._shake_hands(new, done, failed)

    def _adopt(self, order: Adopt) -> None:
        if order.plan.epoch <= self.epoch:
            self._followed()
            return
        added = [f for f in order.plan.fragments_of(self.process.name) if f not in self.hosted]
        delay = 0.05 * self.world.dice.random() * len(added)
        self.later(delay, lambda: self._install(order, added))

    def _install(self, order: Adopt, added: list[int]) -> None:
        states: dict[int, int] = {}
        for fragment in added:
            built = self._standby.pop(fragment, False)
            initial = self.world.weights(self.first_step - 1, fragment)
            state = self.snapshots.state(fragment, order.step)
            if state is None and order.step == self.first_step - 1:
                state = self.case.undisturbed.states[fragment, order.step]
            if state is None or (initial is None and not built):
                message = f"no snapshot of fragment {fragment} after step {order.step} is held here"
                self.process.send(CantAdopt(job=self.job, epoch=order.plan.epoch, message=message))
                self._followed()
                return
            states[fragment] = state
        wanted = {peer.worker: peer.public_key for peer in order.peers}
        for name, key in list(self.route.items()):
            if wanted.get(name) != key:
                del self.route[name]
                self.process.gate.discard(key)
        if any(peer.worker not in self.route for peer in self._others(order.peers)):
            self._connect(order.peers, lambda: self._switch_over(order, states))
        else:
            self._switch_over(order, states)

    def _switch_over(self, order: Adopt, states: dict[int, int]) -> None:
        self._admission = self._admit(order.plan)
        self.hosted = order.plan.fragments_of(self.process.name)
        self._post(Switch(order.plan, order.step, states))
        if order.step > self.first_step - 1:
            self.snapshots.commit(order.step)
        self._stand_by(order.backups)
        self._followed()

    def _stand_by(self, backups: dict[int, str]) -> None:
        mine = {fragment for fragment, worker in backups.items() if worker == self.process.name} - set(self.hosted)
        self._standby = {fragment: built for fragment, built in self._standby.items() if fragment in mine}
        for fragment in sorted(mine - set(self._standby)):
            self._standby[fragment] = False
            self.later(0.1 + self.world.dice.random(), lambda fragment=fragment: self._stands_by(fragment))  # type: ignore[misc]

    def _stands_by(self, fragment: int) -> None:
        if fragment not in self._standby:
            return
        if self.world.weights(self.first_step - 1, fragment) is not None:
            self._standby[fragment] = True
        else:
            step, cause = self.first_step, "memory"
            self.process.send(
                BackupFailed(job=self.job, epoch=self.epoch, step=step, fragment=fragment, cause=cause)  # type: ignore[arg-type]
            )

    def _admit(self, plan: Plan) -> Admission:
        train = self.prepare.train
        return Admission(
            self.job,
            plan,
            self.case.partition,
            self.process.name,
            micro_batches=train.micro_batches,
            last_step=train.steps,
            eval_batches=train.eval_batches if train.eval_every is not None else 0,
            norms=[1] * self.case.fragments if train.clip_grad_norm is not None else (),
            first_epoch=self.prepare.plan.epoch,
        )

    # The data plane ----------------------------------------------------------------------------------------------

    def _transmit(self, to: str, header: Header, parcel: Value | None) -> None:
        key = self.route.get(to)
        if key is not None:
            self.process.burns()
            self.world.transmit(self.process, key, header, parcel)

    def receive(self, source: str, header: Header, value: Value | None) -> None:
        """A message of the process with this key."""
        sender = next((name for name, key in self.route.items() if key == source), "")
        try:
            self._admission.check(header, sender, [value.nbytes] if value is not None and value.nbytes else [])
        except Refused:
            return
        if header.kind in _SNAPSHOTS:
            self.snapshots.handle(header, sender, value)
        else:
            self._post(Arrived(header, sender, value))

    def peer_closed(self, key: str) -> None:
        """The connection to this peer was closed from the other side."""
        for name, known in self.route.items():
            if known == key and self._ready:
                self.process.send(PeerLost(job=self.job, peer=name))

    # The compute thread ------------------------------------------------------------------------------------------

    def _post(self, event: Arrived | Switch | Backup | Commit) -> None:
        self._queue.append(event)
        self._pump()

    def _start(self) -> None:
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
        self._wait_until = self.world.clock.now + self._patience.left()
        if not self._timer:
            self._timer = True
            self.later(self._patience.left(), self._time_out)

    def _time_out(self) -> None:
        left = self._wait_until - self.world.clock.now
        if left > 1e-9:
            self.later(left, self._time_out)
            return
        self._timer = False
        if not self._computing:
            self.session.ask_again()
            self._patience.asked()
            self._pump()

    def _take_in(self, event: Arrived | Switch | Backup | Commit) -> None:
        match event:
            case Arrived(header, sender, value):
                if self.session.arrived(header, sender, value):
                    self._patience.arrived()
                else:
                    self._patience.duplicated()
            case Backup():
                if event.epoch == self.epoch:
                    self.session.backup(event.step, event.backups, event.hold)
            case Commit():
                self.session.commit(event.step)
            case Switch():
                self._adopted_at = self.world.clock.now
                for fragment, state in event.states.items():
                    self._programs[fragment] = Program(self.case.partition, fragment, state)
                added = self.session.switch(event.plan, event.step)
                for fragment in set(self._programs) - set(self.session.hosted):
                    del self._programs[fragment]
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
            case TaskKind.UPDATE:
                self._update(task)
            case TaskKind.EVALUATE:
                self._evaluate(task)
        self._accounts.spent(task, seconds)
        self.session.completed(task)
        if task.kind is TaskKind.UPDATE:
            self._checkpoint(task)
        self._carry_out()
        self._computing = False
        self._pump()

    def _forward(self, task: Task) -> None:
        program = self._programs[task.fragment]
        for edge, value in program.forward(task.step, task.micro_batch, self._arrivals(task)).items():
            self._pass_on(FrameKind.ACTIVATION, edge, task.step, task.micro_batch, value)
        loss = program.loss(task.step, task.micro_batch)
        if loss is not None:
            self._accounts.lost(task.step, loss)

    def _backward(self, task: Task) -> None:
        program = self._programs[task.fragment]
        for edge, value in program.backward(task.step, task.micro_batch, self._arrivals(task)).items():
            self._pass_on(FrameKind.GRADIENT, edge, task.step, task.micro_batch, value)
        train = self.prepare.train
        if train.clip_grad_norm is not None and task.micro_batch == train.micro_batches - 1:
            header = Header(self.job, self.epoch, FrameKind.NORMS, task.fragment, task.step, 0, "none", "float32", (1,))
            self._emit(header, Value(program.norms(), 4))

    def _update(self, task: Task) -> None:
        program = self._programs[task.fragment]
        program.update(task.step, self._arrivals(task))
        expected = self.case.undisturbed.states[task.fragment, task.step]
        assert program.state == expected, f"fragment {task.fragment} has another state after step {task.step}"

    def _evaluate(self, task: Task) -> None:
        program = self._programs[task.fragment]
        outputs, loss = program.evaluate(task.step, task.micro_batch, self._arrivals(task))
        for edge, value in outputs.items():
            self._pass_on(FrameKind.EVALUATION, edge, task.step, task.micro_batch, value)
        if loss is not None:
            report = self._accounts.evaluated(self.epoch, task.step, loss)
            if report is not None:
                self.process.send(report)

    def _arrivals(self, task: Task) -> dict[int, int]:
        inbox, edges, found = self.session.inbox, self.case.partition.edges, {}
        for key in self.session.board.needs(task):
            stays = key[0] is FrameKind.NORMS or (
                key[0] is not FrameKind.GRADIENT and edges[key[1]].kind == "parameter"
            )
            value = (inbox.get(key) if stays else inbox.take(key)).value
            assert value == self.case.undisturbed.values[key], f"{key} has other bits"
            found[key[1]] = value
        return found

    def _pass_on(self, kind: FrameKind, edge: int, step: int, micro_batch: int, value: int) -> None:
        header = Header(self.job, self.epoch, kind, edge, step, micro_batch, "none", META.dtype, META.shape)
        self._emit(header, Value(value))

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
                        for edge, value in self._programs[fragment].parameters().items():
                            self._pass_on(FrameKind.ACTIVATION, edge, step, 0, value)
                    case todo.TakeSnapshot(fragment, step, to):
                        state = self._programs[fragment].state
                        assert state == self.case.undisturbed.states[fragment, step], "a snapshot of another step"
                        self.later(0.02 * self.world.dice.random(), lambda i=instruction, s=state: self._ship(i, s))  # type: ignore[misc]
                    case todo.ReportStep(step, fragments):
                        logged = self.session.measure_log()
                        self.world.measured(self, logged)
                        self.process.send(self._accounts.step_report(self.epoch, step, fragments, {}, 0, logged))
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

    def _ship(self, taken: todo.TakeSnapshot, state: int) -> None:
        self.snapshots.offer(taken.fragment, taken.step, taken.to, state)

    def _checkpoint(self, task: Task) -> None:
        step, train = task.step, self.prepare.train
        if step == train.steps or (train.checkpoint_every and step % train.checkpoint_every == 0):
            self._uploads += 1
            state, fragment = self._programs[task.fragment].state, task.fragment
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
