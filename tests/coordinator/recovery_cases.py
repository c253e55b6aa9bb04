"""A running job without any I/O: what its workers say goes into the life cycle, what they are told is kept."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, TypeVar

from coordinator_cases import job_record, job_spec

from coordinator.life import events as ev
from coordinator.life.books import Timing
from coordinator.life.jobs import FragmentSummary, Job
from coordinator.life.lifecycle import Lifecycle
from coordinator.life.pool import Member
from coordinator.life.run import Run
from fusion.messages import (
    Adopt,
    Adopted,
    Backup,
    CaughtUp,
    Connect,
    Connected,
    Device,
    Finished,
    FragmentTimes,
    Heartbeat,
    Holding,
    Leaving,
    Paused,
    Ready,
    StepReport,
    ToCoordinator,
)
from fusion.plan import Plan

Message = TypeVar("Message")
TIMING = Timing(failure_timeout=5.0, drain_patience=20.0)


class Play:
    """One job of several fragments on a pool; the first `hosts` workers take part, fragment i is on the i-th of them."""

    def __init__(
        self,
        workers: str = "abc",
        hosts: int | None = None,
        *,
        fragments: int | None = None,
        steps: int = 1000,
        memory: dict[str, int] | None = None,
        fragment_bytes: int = 0,
        every: int | None = None,
        eval_every: int | None = None,
        **fault_tolerance: Any,
    ) -> None:
        self.now = 1000.0
        self.out: list[ev.Instruction] = []
        self.lifecycle = Lifecycle(TIMING)
        self.born = 0
        self.fragment_bytes = fragment_bytes
        self.seconds: dict[str, float] = {}
        """Worker -> what each of its fragments takes in a step."""
        for name in workers[:hosts]:
            self.join(name, (memory or {}).get(name, 0))
        count = fragments or len(workers[:hosts])
        self.submit(steps, every, eval_every, fault_tolerance)
        asked = self.asked_plan()
        placement = tuple(asked.workers[index * len(asked.workers) // count] for index in range(count))
        self.answer(asked, placement)
        for name in self.job.hosts:
            self.say(name, Ready(job="job", epoch=0))
        assert self.job.state == "running"
        for name in workers[len(workers[:hosts]) :]:
            self.join(name, (memory or {}).get(name, 0))

    def submit(self, steps: int, every: int | None, eval_every: int | None, fault_tolerance: dict[str, Any]) -> None:
        spec = job_spec(
            train={"steps": steps, "global_batch": 1, "micro_batch": 1, "eval_every": eval_every},
            checkpoint={"every": every},
            fault_tolerance={"failure_timeout": 5.0, "backup_every": 5, **fault_tolerance},
        )
        self.post(ev.JobSubmitted(self.now, job_record(spec)))

    # What is so ---------------------------------------------------------------------------------------------------

    @property
    def job(self) -> Job:
        return self.lifecycle.jobs["job"]

    @property
    def run(self) -> Run:
        assert self.job.run is not None
        return self.job.run

    @property
    def plan(self) -> Plan:
        assert self.job.plan is not None
        return self.job.plan

    def member(self, name: str) -> Member:
        member = self.lifecycle.pool.get(name)
        assert member is not None
        return member

    # What came out ------------------------------------------------------------------------------------------------

    def sent(self, kind: type[Message], *, clear: bool = True) -> dict[str, Message]:
        """Worker -> the last message of this kind since `out` was cleared."""
        names = {member.incarnation: member.name for member in self.lifecycle.pool}
        found: dict[str, Message] = {
            names[instruction.incarnation]: instruction.message
            for instruction in self.out
            if isinstance(instruction, ev.Send) and isinstance(instruction.message, kind)
        }
        if clear:
            self.out = [each for each in self.out if not (isinstance(each, ev.Send) and isinstance(each.message, kind))]
        return found

    def stories(self) -> list[str]:
        return [each.message for each in self.out if isinstance(each, ev.RecordEvent)]

    def metrics(self) -> list[int]:
        return [each.metric.step for each in self.out if isinstance(each, ev.RecordMetric)]

    def asked_plan(self) -> ev.MakePlan:
        """The last question to the scheduler."""
        asked = [each for each in self.out if isinstance(each, ev.MakePlan)][-1]
        self.out = [each for each in self.out if not isinstance(each, ev.MakePlan)]
        return asked

    # What goes in -------------------------------------------------------------------------------------------------

    def post(self, event: ev.Event) -> None:
        self.out += self.lifecycle.handle(event)

    def join(self, name: str, memory: int = 0) -> None:
        self.born += 1
        device = Device(memory_bytes=memory)
        incarnation = f"{name}{self.born}"
        member = Member(
            name=name, incarnation=incarnation, device=device, endpoint="tcp://x:1", public_key=f"{self.born}"
        )
        self.post(ev.WorkerJoined(self.now, member))
        self.say(name, Heartbeat(incarnation=incarnation))
        self.tick(0)

    def say(self, name: str, message: ToCoordinator) -> None:
        self.post(ev.Reported(self.now, self.member(name).incarnation, message))

    def tick(self, seconds: float = 0.1, silent: str = "") -> None:
        """Time passes in small ticks; all but `silent` send heartbeats."""
        end = self.now + seconds
        while True:
            self.now = min(end, self.now + 0.5)
            for member in self.lifecycle.pool.live():
                if member.name not in silent:
                    self.say(member.name, Heartbeat(incarnation=member.incarnation))
            self.post(ev.ClockTicked(self.now))
            if self.now >= end:
                return

    def state(self) -> str:
        return self.job.state

    def lose(self, *names: str) -> None:
        """The heartbeats of these workers end, all at once."""
        self.tick(6.0, silent="".join(names))

    def vanish(self, name: str) -> None:
        """The worker's port refuses connections."""
        self.post(ev.WorkerUnreachable(self.now, self.member(name).incarnation))

    def report(self, name: str, step: int, *, epoch: int | None = None, log_bytes: int = 0) -> None:
        """A worker is through with a step for all its fragments."""
        self.report_fragments(name, step, self.plan.fragments_of(name), epoch=epoch, log_bytes=log_bytes)

    def report_fragments(
        self, name: str, step: int, fragments: Sequence[int], *, epoch: int | None = None, log_bytes: int = 0
    ) -> None:
        forward = self.seconds.get(name, 0.0)
        times = [FragmentTimes(fragment=index, forward=forward, backward=0, update=0) for index in fragments]
        epoch = self.job.epoch if epoch is None else epoch
        message = StepReport(job="job", epoch=epoch, step=step, fragments=times, sent_bytes=1, log_bytes=log_bytes)
        self.say(name, message)

    def train(self, first: int, last: int, *, seconds: float = 0.1) -> None:
        """Everybody goes through these steps."""
        for step in range(first, last + 1):
            self.tick(seconds)
            for name in self.plan.workers:
                self.report(name, step)

    def hold_all(self, order: Backup, but: Sequence[int] = ()) -> None:
        """The backup workers of an order have the snapshots."""
        for fragment, worker in order.backups.items():
            if fragment not in but:
                self.say(worker, Holding(job="job", epoch=order.epoch, step=order.step, fragment=fragment))

    def backed_up(self, first: int = 1) -> int:
        """Train until a round is ordered and complete; returns its step."""
        step = first
        while not (orders := self.sent(Backup)):
            self.train(step, step)
            step += 1
        order = next(iter(orders.values()))
        self.train(step, order.step)
        self.hold_all(order)
        self.train(order.step + 1, order.step + 1)
        assert self.run.common_step == order.step
        return order.step

    def all_adopted(self, *, steps: int = 1) -> Adopt:
        """Everybody follows the new placement, and who adopted has caught up."""
        orders = self.sent(Adopt)
        behind = list(self.run.switch.behind) if self.run.switch else []
        for name, order in orders.items():
            self.say(name, Adopted(job="job", epoch=order.plan.epoch))
        for name, order in orders.items():
            mine = [index for index in behind if self.plan.placement[index] == name]
            if mine:
                caught_up = CaughtUp(job="job", epoch=order.plan.epoch, fragments=mine, steps=steps, seconds=0.5)
                self.say(name, caught_up)
        return next(iter(orders.values()))

    def leave(self, name: str) -> None:
        self.say(name, Leaving(reason="SIGTERM"))

    def pause_all(self, order: Backup) -> None:
        """All hosts come to the end of the order's step and stop there."""
        self.train(self.run.highest + 1, order.step)
        for name in self.plan.workers:
            self.say(name, Paused(job="job", epoch=order.epoch, step=order.step))

    def connect_all(self) -> None:
        """Everybody connects to the newcomers, and these are ready."""
        for name, order in self.sent(Connect).items():
            self.say(name, Connected(job="job", peers=[peer.worker for peer in order.peers]))
        for name in list(self.run.move.newcomers if self.run.move else ()):
            self.say(name, Ready(job="job", epoch=self.job.epoch))

    def finish(self) -> None:
        for name in self.plan.workers:
            self.say(name, Finished(job="job", epoch=self.job.epoch))

    def answer(
        self,
        asked: ev.MakePlan,
        placement: tuple[str, ...],
        *,
        seconds: float | None = None,
        current: float | None = None,
        fresh: float | None = None,
    ) -> None:
        """The scheduler answers."""
        cuts = asked.previous.cuts if asked.previous is not None else tuple(range(1, len(placement)))
        plan = Plan(
            policy="x",
            cuts=cuts,
            placement=placement,
            in_flight=(1,) * len(placement),
            weights_behind=tuple(range(len(placement))),
            predicted_step_seconds=seconds,
        )
        summaries = tuple(
            FragmentSummary(
                index=index,
                worker=worker,
                ops=1,
                first_module="",
                last_module="",
                parameter_bytes=self.fragment_bytes,
                flops=1,
            )
            for index, worker in enumerate(placement)
        )
        self.post(ev.PlanMade(self.now, asked.job, asked.attempt, plan, summaries, current, fresh))

    def restart_coordinator(self) -> None:
        """Only what is written down survives."""
        jobs = [Job.model_validate_json(job.model_dump_json()) for job in self.lifecycle.jobs.values()]
        members = [Member.model_validate_json(member.model_dump_json()) for member in self.lifecycle.pool]
        self.lifecycle = Lifecycle(TIMING)
        self.out = self.lifecycle.restore(jobs, members, self.now)
