"""Workers come, go silent and leave: the part of the life cycle that is about the pool's members.

What happens to a job when its worker goes is decided by `Lifecycle`, which builds on this class. Sans-I/O.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterable
from dataclasses import dataclass

from coordinator import events as ev
from coordinator.jobs import Job
from coordinator.pool import Member, Pool
from fusion.messages import Shutdown, Stop
from fusion.units import format_bytes, format_seconds


@dataclass(frozen=True, slots=True)
class Timing:
    """Durations in seconds."""

    failure_timeout: float = 5.0
    """Silence after which a worker without a job counts as lost; a busy one goes by its job's own timeout."""
    drain_patience: float = 60.0
    """How long a leaving worker waits for the next checkpoint of its job."""
    restart_grace: float = 5.0
    """After a restart of the coordinator: time for workers to connect again before silence counts."""
    deaf_after: float = 1.5
    """A longer gap between two ticks means that the coordinator itself was not listening."""


class Membership(ABC):
    """The pool, the jobs by id, and the instructions that have not been handed out yet."""

    def __init__(self, timing: Timing | None = None) -> None:
        self.timing = timing or Timing()
        self.pool = Pool()
        self.jobs: dict[str, Job] = {}
        self._last_tick: float | None = None
        self._evicted: dict[str, float] = {}
        self._out: list[ev.Instruction] = []

    @abstractmethod
    def _restart(self, job: Job, now: float, cause: str) -> None:
        """A worker of `job` is going or gone."""

    def failure_timeout(self, member: Member) -> float:
        """Seconds of silence after which `member` counts as lost."""
        job = self.jobs.get(member.job) if member.job else None
        return job.spec.fault_tolerance.failure_timeout if job else self.timing.failure_timeout

    def all_finished(self, job: Job) -> bool:
        """Whether every worker has done all steps and uploaded its last state: the job no longer needs them."""
        return job.state == "running" and bool(job.hosts) and len(job.finished) == len(job.hosts)

    def _tick(self, now: float) -> None:
        if self._last_tick is not None and now - self._last_tick > self.timing.deaf_after:
            self.pool.excuse(now - self._last_tick)
        self._last_tick = now
        for member in self.pool.silent(now, self.failure_timeout):
            self._lose(member, now, f"no heartbeat for {format_seconds(self.failure_timeout(member))}")
        for member in self.pool.live():
            if member.state == "draining" and member.leave_by is not None and now >= member.leave_by:
                self._move_off(member, now)

    def _joined(self, event: ev.WorkerJoined) -> None:
        earlier = self.pool.get(event.member.name)
        if earlier is not None and earlier.live:
            self._lose(earlier, event.time, "its process was started again")
        member = event.member
        member.state, member.job, member.joined_at, member.last_heard = "joined", None, event.time, event.time
        self.pool.put(member)
        device = member.device
        self._do(ev.SaveWorker(member.name))
        self._story(
            None,
            "worker-joined",
            f"worker {member.name} joined ({device.kind}, {device.threads} thread{'s' if device.threads != 1 else ''}, "
            f"{format_bytes(device.memory_bytes)})",
            worker=member.name,
        )

    def _lose(self, member: Member, now: float, why: str) -> None:
        job = self.jobs.get(member.job) if member.job else None
        where = f" at step {job.step}" if job is not None and job.state == "running" else ""
        member.state, member.job, member.leave_by = "lost", None, None
        self._do(ev.SaveWorker(member.name))
        self._story(job, "worker-lost", f"worker {member.name} lost{where} ({why})", worker=member.name)
        if job is not None and member.name in job.hosts and not self.all_finished(job):
            self._restart(job, now, f"worker {member.name} was lost")

    def _drain(self, member: Member, now: float, why: str) -> None:
        if member.state == "draining":
            return
        job = self.jobs.get(member.job) if member.job else None
        if job is None:
            self._leave(member, why)
            return
        member.state = "draining"
        wait = self._seconds_to_checkpoint(job)
        planned = wait is not None and wait <= self.timing.drain_patience
        member.leave_by = now + self.timing.drain_patience if planned else now
        self._do(ev.SaveWorker(member.name))
        when = "at its next checkpoint" if planned else "now"
        self._story(
            job,
            "worker-draining",
            f"worker {member.name} leaves ({why}); job {job.id} goes on without it {when}",
            worker=member.name,
        )
        if not planned:
            self._move_off(member, now)

    def _seconds_to_checkpoint(self, job: Job) -> float | None:
        """Predicted seconds until the next checkpoint (there is one at the end at the latest); None when unknown."""
        if job.state != "running" or job.step_seconds is None:
            return None
        every = job.train.checkpoint_every
        left = job.train.steps - job.step
        if every:
            left = min(left, every - job.step % every)
        return left * job.step_seconds

    def _move_off(self, member: Member, now: float) -> None:
        """The draining member's job goes on without it; then it may go."""
        job = self.jobs.get(member.job) if member.job else None
        if job is not None and not self.all_finished(job):
            self._restart(job, now, f"worker {member.name} leaves")
        elif job is None:
            self._leave(member, "drained")

    def _leave(self, member: Member, why: str) -> None:
        member.state, member.job, member.leave_by = "left", None, None
        self._do(ev.Send(member.incarnation, Shutdown(reason=why)))
        self._do(ev.SaveWorker(member.name))
        self._story(None, "worker-left", f"worker {member.name} left ({why})", worker=member.name)

    def _release(self, job: Job, reason: str) -> None:
        """Free all workers of a job, and tell them to forget it."""
        for member in self.pool.of_job(job.id):
            self._do(ev.Send(member.incarnation, Stop(job=job.id, reason=reason)))
            member.job = None
            if member.state == "draining":
                self._leave(member, "drained")
            else:
                member.state = "idle"
                self._do(ev.SaveWorker(member.name))

    def _release_unasked(self, job: Job, keep: Iterable[str]) -> None:
        """Free the workers that were taken for a plan but have not heard of the job yet."""
        kept = set(keep)
        for member in self.pool.of_job(job.id):
            if member.name not in kept:
                member.job = None
                if member.state == "draining":
                    self._leave(member, "drained")
                else:
                    member.state = "idle"
                    self._do(ev.SaveWorker(member.name))

    def _evict(self, event: ev.Reported) -> None:
        """Tell a worker that was declared lost to join again; not at each heartbeat that is still on its way."""
        told = self._evicted.get(event.incarnation)
        if told is None or event.time - told >= self.timing.failure_timeout:
            self._evicted[event.incarnation] = event.time
            self._do(ev.Send(event.incarnation, Shutdown(reason="declared lost; join again", evicted=True)))

    # Instructions -------------------------------------------------------------------------------------------------

    def _do(self, instruction: ev.Instruction) -> None:
        self._out.append(instruction)

    def _story(self, job: Job | None, event: str, message: str, **fields: str | int | float | None) -> None:
        self._do(ev.RecordEvent(job.id if job else None, event, message, fields))

    def _taken(self) -> list[ev.Instruction]:
        taken, self._out = self._out, []
        return taken
