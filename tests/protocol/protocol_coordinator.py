"""A coordinator process: the real life cycle, with the engine's rules of what is written down before what is said."""

from __future__ import annotations

import random
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING

from protocol_values import Case, part_of, weights_of
from pydantic import BaseModel

from coordinator.life import events as ev
from coordinator.life.books import Timing
from coordinator.life.jobs import FragmentSummary, Job
from coordinator.life.lifecycle import Lifecycle
from coordinator.life.pool import Member
from fusion.messages import CheckpointPart, DataManifest, Device, Prepare, Resume, ToCoordinator
from fusion.plan import Plan
from fusion.spec import JobSpec

if TYPE_CHECKING:
    from protocol_world import World

NAME = "coordinator"
TIMING = Timing(failure_timeout=5.0, drain_patience=30.0, restart_grace=5.0, move_pause=4.0)
TICK_SECONDS = 0.25
MERCY_SECONDS = 30.0
JOB = "job-1"


@dataclass
class Store:
    """What outlives the process: records as they were saved, checkpoints, metrics."""

    jobs: dict[str, str] = field(default_factory=dict)
    members: dict[str, str] = field(default_factory=dict)
    metrics: dict[int, tuple[float | None, float | None]] = field(default_factory=dict)
    """Step -> loss, evaluation."""
    checkpoints: dict[int, float | None] = field(default_factory=dict)
    """Step -> when its blobs go, once it is out of the books."""
    events: list[str] = field(default_factory=list)


class Died(Exception):
    """The process was killed in the middle of what it did."""


class Coordinator:
    """One process. `post` feeds an event in and carries out what follows."""

    def __init__(self, world: World, store: Store) -> None:
        self._world = world
        self._case: Case = world.case
        self.store = store
        self.lifecycle = Lifecycle(TIMING if world.stopping else replace(TIMING, longest_stop=-1.0))
        self.alive = True
        self.fuse: int | None = None
        """Dies before the so-and-so-manieth message that it sends; 0: before it writes anything down."""
        self._dice: random.Random = world.dice
        self._unsaved: set[str] = set()
        self._heard: set[str] = set()
        self._waiting: dict[str, list[BaseModel]] = {}

    @property
    def now(self) -> float:
        return self._world.clock.now

    def start(self) -> None:
        jobs = [Job.model_validate_json(record) for record in self.store.jobs.values()]
        members = [Member.model_validate_json(record) for record in self.store.members.values()]
        members.sort(key=lambda member: member.joined_at)
        self._guarded(lambda: self._carry_out(self.lifecycle.restore(jobs, members, self.now)))
        self._later(TICK_SECONDS, self._tick)

    def die(self) -> None:
        self.alive = False
        self._world.coordinator_died()

    def submit(self, spec: JobSpec) -> None:
        blob = weights_of(0)
        data = DataManifest(kind="arrays", blob=blob, samples=1, train_samples=1)
        job = Job(id=JOB, number=1, spec=spec, dag=blob, weights=blob, data=data, train=self._case.train)
        self.post(ev.JobSubmitted(self.now, job))

    def post(self, event: ev.Event) -> None:
        if self.alive:
            self._guarded(lambda: self._carry_out(self.lifecycle.handle(event)))

    def join(self, name: str, key: str) -> str | None:
        """Admit a worker; returns its incarnation, or None when the name is taken."""
        for other in self.lifecycle.pool.live():
            if other.name == name and other.public_key != key:
                self.post(ev.NameClaimed(self.now, other.incarnation))
                quiet = other.silence(self.now) > self.lifecycle.failure_timeout(other) / 3
                if not self.alive or not quiet:
                    return None
        incarnation = f"{name}-{self._world.number()}"
        member = Member(name=name, incarnation=incarnation, device=Device(), endpoint=key, public_key=key)
        self._world.incarnations[key] = incarnation
        self.post(ev.WorkerJoined(self.now, member))
        self.post(ev.WorkerGreeted(self.now, incarnation))
        return incarnation if self.alive else None

    def hear(self, key: str, message: ToCoordinator) -> None:
        """A message of the control channel."""
        incarnation = self._world.incarnations.get(key)
        if not self.alive or incarnation is None:
            return
        if incarnation not in self._heard:
            self._heard.add(incarnation)
            for kept in self._waiting.pop(incarnation, []):
                self._world.tell(incarnation, kept)
        if isinstance(message, CheckpointPart) and message.blob.digest not in self._world.uploads:
            return
        self.post(ev.Reported(self.now, incarnation, message))

    # Instructions ------------------------------------------------------------------------------------------------

    def _guarded(self, work: Callable[[], None]) -> None:
        try:
            work()
        except Died:
            self.die()

    def _carry_out(self, instructions: list[ev.Instruction]) -> None:
        if self.fuse == 0:
            raise Died
        saved: set[str] = set()
        for instruction in instructions:
            if isinstance(instruction, ev.SaveJob):
                if not instruction.soon:
                    saved.add(instruction.job)
                else:
                    self._unsaved.add(instruction.job)
            elif isinstance(instruction, ev.SaveWorker):
                member = self.lifecycle.pool.get(instruction.worker)
                assert member is not None
                self.store.members[member.name] = member.model_dump_json()
            elif not isinstance(instruction, ev.Send):
                self._do(instruction)
        self._save(saved)
        for instruction in instructions:
            if isinstance(instruction, ev.Send):
                self._send(instruction.incarnation, instruction.message)

    def _save(self, jobs: set[str]) -> None:
        for job in jobs:
            self._unsaved.discard(job)
            self.store.jobs[job] = self.lifecycle.jobs[job].model_dump_json()
            self._world.saved(self.lifecycle.jobs[job])

    def _send(self, incarnation: str, message: BaseModel) -> None:
        if self.fuse is not None:
            self.fuse -= 1
            if self.fuse <= 0:
                raise Died
        if incarnation in self._heard:
            self._world.tell(incarnation, message)
        else:
            self._waiting.setdefault(incarnation, []).append(message)

    def _do(self, instruction: ev.Instruction) -> None:
        dice = self._dice
        match instruction:
            case ev.MakePlan():
                self._later(dice.random() * 0.5, lambda: self._plan(instruction))
            case ev.PrepareWorkers():
                self._later(dice.random() * 0.2, lambda: self._prepare(instruction))
            case ev.ProbeWorker():
                self._later(0.01 + dice.random() * 0.2, lambda: self._probe(instruction))
            case ev.WriteCheckpoint():
                self._later(dice.random() * 0.5, lambda: self._write(instruction))
            case ev.RecordMetric(_, metric):
                assert metric.step not in self.store.metrics, f"step {metric.step} was published twice"
                self.store.metrics[metric.step] = (metric.loss, metric.eval_loss)
            case ev.RecordEvent(_, _, message, _):
                self.store.events.append(message)
                self._world.log(message)
            case _:
                pass

    def _later(self, delay: float, do: Callable[[], None]) -> None:
        self._world.clock.at(delay, lambda: self._guarded(do) if self.alive else None)

    def _tick(self) -> None:
        self.post(ev.ClockTicked(self.now))
        self._save(set(self._unsaved))
        self._later(TICK_SECONDS, self._tick)

    # Slow work ---------------------------------------------------------------------------------------------------

    def _plan(self, asked: ev.MakePlan) -> None:
        """The scheduler's answer: any placement, of the same cuts."""
        dice, case = self._dice, self._case
        job = self.lifecycle.jobs[asked.job]
        running = job.state == "running"
        if running and dice.random() < 0.1:
            self.post(ev.PlanRefused(self.now, asked.job, asked.attempt, "no plan fits these workers"))
            return
        workers = list(asked.workers)
        dice.shuffle(workers)
        placement = tuple(workers[index % len(workers)] for index in range(case.fragments))
        if dice.random() < 0.5:
            placement = tuple(sorted(placement))
        plan = Plan(
            policy="any",
            schedule=case.schedule,
            cuts=case.partition.positions,
            placement=placement,
            in_flight=case.in_flight,
            weights_behind=tuple(dice.randrange(3) for _ in range(case.fragments)),
            codecs=case.codecs,
            predicted_step_seconds=1.0,
        )
        summaries = tuple(
            FragmentSummary(
                index=index, worker=host, ops=1, first_module="", last_module="", parameter_bytes=8, flops=1
            )
            for index, host in enumerate(placement)
        )
        current = 2.0 if dice.random() < 0.7 else 1.0
        self.post(ev.PlanMade(self.now, asked.job, asked.attempt, plan, summaries, current if running else None))

    def _prepare(self, asked: ev.PrepareWorkers) -> None:
        job = self.lifecycle.jobs[asked.job]
        resume = None
        if asked.checkpoint is not None:
            if self.store.checkpoints.get(asked.checkpoint, 0.0) is not None:
                reason = f"checkpoint {asked.checkpoint} is not recorded"
                self.post(ev.PreparationFailed(self.now, job.id, asked.epoch, reason))
                return
            resume = Resume(step=asked.checkpoint)
        if job.state != ("running" if asked.joining else "preparing") or job.epoch != asked.epoch:
            return
        message = Prepare(
            job=job.id,
            plan=asked.plan,
            dag=job.dag,
            weights=weights_of(asked.checkpoint or 0),
            data=job.data,
            train=job.train,
            peers=list(asked.peers),
            resume=resume,
            failure_timeout=job.spec.fault_tolerance.failure_timeout,
            backups=asked.backups,
            log_bytes=job.spec.fault_tolerance.log_memory,
        )
        for incarnation in asked.hosts:
            self._send(incarnation, message)

    def _probe(self, asked: ev.ProbeWorker) -> None:
        if not self._world.processes[asked.endpoint].alive:
            self.post(ev.WorkerUnreachable(self.now, asked.incarnation, asked.unless_heard_after))

    def _write(self, asked: ev.WriteCheckpoint) -> None:
        for fragment in range(self._case.fragments):
            state = self._case.undisturbed.states[fragment, asked.step]
            assert asked.parts[fragment] == part_of(state), f"checkpoint {asked.step} has a wrong fragment {fragment}"
        if self._dice.random() < 0.05 and asked.step != self._case.train.steps:
            self.post(ev.CheckpointFailed(self.now, asked.job, asked.step, "disk full"))
            return
        self.store.checkpoints[asked.step] = None
        kept = [step for step, goes in self.store.checkpoints.items() if goes is None]
        run = self.lifecycle.jobs[asked.job].run
        needed = None if run is None or run.from_origin else run.start
        for step in sorted(kept)[: -asked.keep]:
            if step != needed:
                self.store.checkpoints[step] = self.now + MERCY_SECONDS
        self.post(ev.CheckpointWritten(self.now, asked.job, asked.step, 1))
