"""One job in a worker process, with the real admission, under the rules of `worker.jobs.job_run`."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterable
from functools import partial
from typing import TYPE_CHECKING

from protocol_computing import Arrived, Computing, Switch
from protocol_snapshots import POKE_SECONDS, Snapshots
from protocol_values import Program, Value

from compress.settings import reuses
from fusion.messages import (
    Adopt,
    Backup,
    BackupFailed,
    CantAdopt,
    Commit,
    Connect,
    Connected,
    Failure,
    PeerAddress,
    PeerLost,
    Prepare,
    Ready,
    Start,
    Warned,
)
from fusion.plan import Plan
from fusion.wire import FrameKind, Header
from worker.protocol.admission import Admission, Refused
from worker.protocol.session import Session

if TYPE_CHECKING:
    from protocol_worker import Process

HANDSHAKE_PATIENCE = 30.0
_SNAPSHOTS = (FrameKind.SNAPSHOT, FrameKind.SNAPSHOT_WANT)

Order = Start | Backup | Commit | Adopt | Connect


class JobRun:
    """From `Prepare` until it is dropped."""

    def __init__(self, process: Process, prepare: Prepare) -> None:
        self.process = process
        self.world = process.world
        self.case = process.world.case
        self.job = prepare.job
        self.prepare = prepare
        self.first_step = prepare.resume.step + 1 if prepare.resume is not None else 1
        self.hosted = prepare.plan.fragments_of(process.name)
        self.route: dict[str, str] = {}
        """Peer -> key."""
        self.snapshots = Snapshots(
            prepare.job,
            self._transmit,
            process.send,
            lambda: self.epoch,
            lambda fragment: (process.name, fragment) not in self.world.full,
            lambda: self.world.dice.random() < self.world.damage,
        )
        self.computing = Computing(process, prepare, self.first_step, self._transmit, self.snapshots.offer)
        self._admission = self._admit(prepare.plan)
        self._orders: deque[Order] = deque()
        self._standby: dict[int, bool] = {}
        """Fragment -> whether it is built."""
        self._backup_workers = prepare.backups
        self._ready = self._following = False

    @property
    def epoch(self) -> int:
        return self.computing.epoch

    @property
    def session(self) -> Session[Value]:
        return self.computing.session

    def is_about(self, prepare: Prepare) -> bool:
        return not self.computing.started and prepare == self.prepare

    def close(self) -> None:
        self.computing.closed = True
        self.process.gate.clear()

    def later(self, delay: float, do: Callable[[], None]) -> None:
        self.computing.later(delay, do)

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
            self.computing.programs[fragment] = Program(self.case.partition, fragment, state)
        self._shake_hands(peers, self._built, lambda: self._fail("can't reach a peer"))

    def _fail(self, why: str) -> None:
        self.process.send(Failure(job=self.job, epoch=self.prepare.plan.epoch, message=why))

    def _built(self) -> None:
        self._ready = True
        if not self.hosted:
            self.computing.start()
        self.process.send(Ready(job=self.job, epoch=self.prepare.plan.epoch))
        self.later(POKE_SECONDS, self._poke)
        self._follow()

    def _poke(self) -> None:
        self.snapshots.poke()
        if not self.computing.started:
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
                if order.epoch == self.epoch and not self.computing.started:
                    self.computing.start()
                    self._stand_by(self._backup_workers)
                self._followed()
            case Backup():
                self.computing.post(order)
                self._backup_workers = order.backups
                self._followed()
            case Commit():
                self.computing.post(order)
                if self.snapshots.commit(order.step):
                    self._stand_by(self._backup_workers)
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
        for fragment in set(self.hosted) - set(order.plan.fragments_of(self.process.name)):
            self.snapshots.keep(fragment, order.step)
        self.hosted = order.plan.fragments_of(self.process.name)
        self.computing.post(Switch(order.plan, order.step, states))
        if order.step > self.first_step - 1:
            self.snapshots.commit(order.step)
        self._backup_workers = order.backups
        self._followed()

    def _stand_by(self, backups: dict[int, str]) -> None:
        mine = {fragment for fragment, worker in backups.items() if worker == self.process.name} - set(self.hosted)
        self._standby = {fragment: built for fragment, built in self._standby.items() if fragment in mine}
        for fragment in sorted(mine - set(self._standby)):
            self._standby[fragment] = False
            self.later(0.1 + self.world.dice.random(), partial(self._stands_by, fragment))

    def _stands_by(self, fragment: int) -> None:
        if fragment not in self._standby:
            return
        if self.world.weights(self.first_step - 1, fragment) is not None:
            self._standby[fragment] = True
        else:
            step, epoch = self.first_step, self.epoch
            self.process.send(BackupFailed(job=self.job, epoch=epoch, step=step, fragment=fragment, cause="memory"))

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
        if value is not None and reuses(header.codec):
            if header.key[1:] not in self.computing.sent:
                return  # It has come twice, or what it answers is not made again yet: it is asked for, whole.
            assert value.places == self.process.key, f"{header.key} has the places of an activation from elsewhere"
        if header.kind in _SNAPSHOTS:
            self.snapshots.handle(header, sender, value)
        else:
            self.computing.post(Arrived(header, sender, value))

    def peer_closed(self, key: str) -> None:
        """The connection to this peer was closed from the other side."""
        for name, known in self.route.items():
            if known == key and self._ready:
                self.process.send(PeerLost(job=self.job, peer=name))
