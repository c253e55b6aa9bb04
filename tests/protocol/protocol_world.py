"""The world that a job lives in: processes, a coordinator, a network, faults, and what must hold at every moment.

Everything follows from a seed and the faults that are asked for, so a run that went wrong can be played again.
"""

from __future__ import annotations

import random
from collections import Counter
from collections.abc import Callable
from functools import partial
from itertools import count
from typing import Literal

from protocol_computing import Computing
from protocol_coordinator import JOB, Coordinator, Store
from protocol_network import Clock, Network
from protocol_run import JobRun
from protocol_values import CASES, Value, part_of, spec_of
from protocol_worker import Process
from pydantic import BaseModel

from coordinator.life import events as ev
from coordinator.life.jobs import Job
from executor.ordering import Task, TaskKind
from fusion.wire import FrameKind, Header
from worker.protocol.session import Session

COORDINATOR = "coordinator"
_SECONDS = {
    TaskKind.FORWARD: 0.02,
    TaskKind.BACKWARD: 0.03,
    TaskKind.WEIGHTS: 0.01,
    TaskKind.UPDATE: 0.02,
    TaskKind.EVALUATE: 0.01,
}
_CHECK_EVERY = 16  # Events between two looks at what is costly to look at.


class World:
    """One job, and all that happens to it. `session` may be another class, to see that its mistakes are found."""

    def __init__(
        self,
        case: str = "tied",
        seed: int = 0,
        workers: int = 3,
        *,
        backup_every: int | Literal["auto"] = 2,
        log_memory: int = 2**20,
        keep: int = 3,
        stopping: bool = True,
        session: Callable[..., Session[Value]] = Session,
    ) -> None:
        self.case = CASES[case]
        self.dice = random.Random(seed)
        self.clock = Clock()
        self.network = Network(self.clock, self.dice)
        self.store = Store()
        self.coordinator: Coordinator | None = None
        self.stopping = stopping
        """Whether everybody stops for a move, as where snapshots take no time."""
        self.incarnations: dict[str, str] = {}
        """Key -> its last incarnation."""
        self.processes: dict[str, Process] = {}
        """Every process that there was, by key."""
        self.uploads: set[str] = set()
        self.full: set[tuple[str, int]] = set()
        """(worker, fragment) for whose snapshot there is no room."""
        self.damage = 0.0
        """Share of the snapshots that arrive damaged."""
        self.slow: dict[str, float] = {}
        self.story: list[str] = []
        self.sent: Counter[FrameKind] = Counter()
        """Messages between workers."""
        self.events = 0
        self.executed: dict[tuple[int, int], int] = {}
        """(fragment, step) -> how often its update was run."""
        self._numbers = count(1)
        self.session = session
        self._active: dict[tuple[int, int], Computing] = {}
        self._margin = 2
        self._log_memory = log_memory
        self.start_coordinator()
        assert self.coordinator is not None
        pool = self.coordinator.lifecycle.pool
        for index in range(workers):
            self.start_worker("abcdefgh"[index])
        while len(pool.idle()) < workers:
            self.clock.advance()
        self.coordinator.submit(spec_of(self.case.train.checkpoint_every, backup_every, log_memory, keep))

    # What people ask for -----------------------------------------------------------------------------------------

    def log(self, line: str) -> None:
        self.story.append(f"{self.clock.now - 1000:8.3f}  {line}")

    def number(self) -> int:
        return next(self._numbers)

    @property
    def job(self) -> Job:
        """As it was written down last."""
        return Job.model_validate_json(self.store.jobs[JOB])

    @property
    def over(self) -> bool:
        return self.coordinator is not None and self.coordinator.lifecycle.jobs[JOB].terminal

    def live(self) -> list[Process]:
        return [process for process in self.processes.values() if process.alive]

    def process(self, name: str) -> Process | None:
        return next((process for process in self.live() if process.name == name), None)

    def play(self, events: int) -> None:
        """Let so many things happen."""
        for _ in range(events):
            if self.over or not self._advance():
                return

    def play_until(self, condition: Callable[[], bool], limit: int = 100_000) -> None:
        """Let things happen until `condition`; it must come."""
        for _ in range(limit):
            if condition():
                return
            assert self._advance(), "nothing more happens"
        raise AssertionError("it never came")

    def _advance(self) -> bool:
        self.events += 1
        if self.events % _CHECK_EVERY == 0:
            self.check()
        return self.clock.advance()

    def finish(self) -> None:
        """Faults stop, enough workers live: the job must end, and its result must be that of an undisturbed run."""
        self.quieten()
        deadline = self.clock.now + 1500.0
        while not self.over:
            assert self.clock.now < deadline, f"the job does not end: {self._where()}"
            if not self.live():
                self.start_worker("z")
            self.play(100)
        self.check_result()

    def quieten(self) -> None:
        weather = self.network.weather
        weather.drop = weather.repeat = weather.reorder = 0.0
        self.damage = 0.0
        self.full.clear()
        for pair in list(self.network.cuts):
            self.heal(*sorted(pair))
        for process in self.live():
            process.wake()
            process.fuse = None
        if self.coordinator is None:
            self.start_coordinator()
        assert self.coordinator is not None
        self.coordinator.fuse = None

    # Faults ------------------------------------------------------------------------------------------------------

    def start_worker(self, name: str) -> None:
        if self.process(name) is None:
            process = Process(self, name)
            self.processes[process.key] = process
            process.join()

    def start_coordinator(self) -> None:
        if self.coordinator is not None:
            return
        self.log("the coordinator starts")
        coordinator = self.coordinator = Coordinator(self, self.store)
        coordinator.start()

    def coordinator_died(self) -> None:
        self.log("the coordinator dies")
        self.coordinator = None
        for process in self.live():
            process.later(0.2 * self.dice.random(), process.disconnected)

    def process_ended(self, process: Process) -> None:
        """Its connections are closed, and those at their other ends see it; if they are not cut off."""
        if not self.network.apart(process.name, COORDINATOR):
            self.clock.at(0.3 * self.dice.random(), self._connection_closed)
        for peer in self.live():
            if not self.network.apart(peer.name, process.name):
                peer.later(0.3 * self.dice.random(), partial(self._peer_closed, peer, process.key))

    def _connection_closed(self) -> None:
        if self.coordinator is not None:
            self.coordinator.post(ev.ConnectionClosed(self.clock.now))

    def _peer_closed(self, peer: Process, key: str) -> None:
        if peer.run is not None:
            peer.run.peer_closed(key)

    def cut(self, one: str, other: str) -> None:
        self.log(f"{one} and {other} are apart")
        self.network.cut(one, other)
        if COORDINATOR in (one, other):
            self.clock.at(3.1, lambda: self._notice_cut(other if one == COORDINATOR else one))

    def _notice_cut(self, name: str) -> None:
        process, found = self.process(name), self.network.cuts.get(frozenset((name, COORDINATOR)))
        self._connection_closed()
        if process is not None and found is not None and found.broken:
            process.happens(process.disconnected)

    def heal(self, one: str, other: str) -> None:
        self.log(f"{one} and {other} are together again")
        broken = self.network.heal(one, other)
        if broken and COORDINATOR in (one, other):
            process = self.process(other if one == COORDINATOR else one)
            if process is not None:
                process.later(0.2 * self.dice.random(), process.disconnected)

    def drain(self, name: str) -> None:
        if self.coordinator is not None:
            self.coordinator.post(ev.DrainRequested(self.clock.now, name))

    # What parties do to each other -------------------------------------------------------------------------------

    def hear(self, process: Process, message: BaseModel) -> None:
        """A worker says something to the coordinator."""
        coordinator = self.coordinator

        def deliver() -> None:
            if self.coordinator is not None and self.coordinator is coordinator:
                self.coordinator.hear(process.key, message)  # type: ignore[arg-type]

        self.network.control(process.name, COORDINATOR, deliver)

    def tell(self, incarnation: str, message: BaseModel) -> None:
        """The coordinator says something to a worker."""
        process = next((p for p in self.live() if p.incarnation == incarnation), None)
        if process is None:
            return

        def deliver() -> None:
            if process.incarnation == incarnation:
                process.told(message)

        self.network.control(COORDINATOR, process.name, lambda: process.happens(deliver))

    def transmit(self, source: Process, key: str, header: Header, parcel: Value | None) -> None:
        """One worker sends to another."""
        target = self.processes[key]
        self.sent[header.kind] += 1

        def deliver() -> None:
            if target.run is not None and source.key in target.gate:
                target.run.receive(source.key, header, parcel)

        self.network.data(source.name, target.name, lambda: target.happens(deliver))

    def lets_in(self, key: str, process: Process) -> bool:
        """Whether the process with this key has been told of another one, and can be reached."""
        peer = self.processes[key]
        reachable = peer.alive and not peer.stalled and not self.network.apart(peer.name, process.name)
        return reachable and process.key in peer.gate

    def upload(self, process: Process, state: int) -> bool:
        if self.coordinator is None or self.network.apart(process.name, COORDINATOR):
            return False
        self.uploads.add(part_of(state).digest)
        return True

    def weights(self, step: int, fragment: int) -> int | None:
        """A fragment's state after a step from which a run may begin; None when its blob is gone."""
        goes = self.store.checkpoints.get(step) if step else None
        if goes is not None and goes < self.clock.now:
            return None
        return self.case.undisturbed.states[fragment, step]

    def seconds(self, name: str, task: Task) -> float:
        return _SECONDS[task.kind] * self.slow.get(name, 1.0) * (0.5 + self.dice.random())

    # What must hold ----------------------------------------------------------------------------------------------

    def begins(self, run: Computing, task: Task) -> None:
        """No two workers are active for one fragment in one epoch."""
        other = self._active.setdefault((run.epoch, task.fragment), run)
        assert other is run, f"{run.process.key} and {other.process.key} run fragment {task.fragment} in one epoch"
        if task.kind is TaskKind.UPDATE:
            key = (task.fragment, task.step)
            self.executed[key] = self.executed.get(key, 0) + 1

    def measured(self, run: Computing, logged: int) -> None:
        """The log is bounded: its limit, and what the steps make that were begun before it was reached.

        Until the next common snapshot an adopter makes again what the lost worker kept, which may be as much as it keeps itself.
        """
        if self.coordinator is not None and (job := self.coordinator.lifecycle.jobs[JOB]).run is not None:
            self._margin = max(self._margin, job.run.margin)
        step = 8 * len(self.case.undisturbed.values) // self.case.train.steps
        adopted = run.session.dispatch.moved.intersection(run.session.hosted)
        lost = {run.prepare.plan.placement[fragment] for fragment in adopted}
        limit = (1 + len(lost)) * self._log_memory + (self._margin + 3) * step
        assert logged <= limit, f"{run.process.name} keeps {logged} bytes for replay, {limit} at most were expected"

    def saved(self, job: Job) -> None:
        """The coordinator has written the job down: everybody is through with its common step."""
        if job.state != "running" or job.run is None or job.plan is None:
            return
        step = job.run.common_step
        for run in self._runs(job):
            for fragment in run.session.hosted:
                if run.epoch == job.epoch:
                    position = run.session.board.position(fragment)
                    assert position > step, f"{step} is the common step and fragment {fragment} is in {position}"

    def check(self) -> None:
        """Whoever holds a snapshot of the common step has it, and every log has all that was sent since."""
        job = self.coordinator.lifecycle.jobs[JOB] if self.coordinator is not None else self.job
        if job.state != "running" or job.run is None or job.plan is None:
            return
        common = job.run.common_step
        by_name = {run.process.name: run for run in self._runs(job)}
        for fragment, holder in job.run.holders.items():
            run = by_name.get(holder)
            if run is not None and job.plan.placement[fragment] != holder:
                here = run.snapshots.state(fragment, common) is not None or run.snapshots.sent(fragment, common)
                assert here, f"{holder} lacks {fragment} after {common}"
        for run in by_name.values():
            run.computing.made = {key for key in run.computing.made if key[2] > common}
            for key in run.computing.made:
                source = run.session.dispatch.source(key[0], key[1])
                if source in run.session.hosted:
                    assert run.session.log.find(key) is not None, f"{run.process.name} has forgotten {key}"

    def _runs(self, job: Job) -> list[JobRun]:
        hosts = set(job.hosts.values())
        return [
            process.run
            for process in self.live()
            if process.incarnation in hosts
            and process.run is not None
            and job.run is not None
            and process.run.computing.started
            and process.run.prepare.plan.epoch >= job.run.epoch
        ]

    def check_result(self) -> None:
        """Done, each step published once, with the losses of the undisturbed run, and its last state kept."""
        assert self.coordinator is not None
        job, right = self.coordinator.lifecycle.jobs[JOB], self.case.undisturbed
        assert job.state == "done", f"{job.state}: {job.reason}"
        assert sorted(self.store.metrics) == list(range(1, self.case.train.steps + 1))
        for step, (loss, evaluation) in self.store.metrics.items():
            assert loss == right.losses[step], f"step {step} has another loss"
            assert evaluation == right.evaluations.get(step), f"step {step} has another evaluation"
        assert self.case.train.steps in self.store.checkpoints

    def _where(self) -> str:
        assert self.coordinator is not None
        job = self.coordinator.lifecycle.jobs[JOB]
        workers = "; ".join(
            f"{run.process.name} epoch {run.epoch} fragments "
            f"{[(f, run.session.board.position(f)) for f in run.session.hosted]} hold {run.session.board.hold_after} "
            f"waits for {run.session.owed()}"
            for process in self.live()
            if (run := process.run) is not None
        )
        record = job.run.model_dump(exclude={"times"}) if job.run is not None else None
        return f"{job.state} {job.reason} step {job.step}; {workers}; {record}"
