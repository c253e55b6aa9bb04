"""Workers come, go silent and leave: the part of the life cycle that is about the pool's members. Sans-I/O.

What a loss or a departure means for a job is for others to say (`Consequences`).
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

from coordinator.life import events as ev
from coordinator.life.books import Books
from coordinator.life.jobs import Job
from coordinator.life.pool import Member
from fusion.messages import Shutdown
from fusion.units import format_bytes, format_seconds, plural


class Consequences(Protocol):
    """What becomes of a job when its workers go."""

    def lost(self, job: Job, members: Sequence[Member], now: float) -> None:
        """These workers of the job are gone."""

    def move_off(self, job: Job, member: Member) -> bool:
        """A worker of the job wants to leave: whether its fragments can move to others now."""

    def moving_takes(self, job: Job) -> float:
        """About how many seconds it takes to move fragments of the job."""

    def hand_over(self, job: Job, member: Member, now: float) -> bool:
        """Let a worker of the job go, and others adopt its fragments; False, and nothing has changed, when they can't."""

    def go_back(self, job: Job, now: float, cause: str) -> None:
        """The job goes on from its checkpoint, without the workers that leave."""


class Membership:
    """Joining, silence, draining and leaving."""

    def __init__(self, books: Books, consequences: Consequences) -> None:
        self._books = books
        self._consequences = consequences
        self._last_tick: float | None = None
        self._evicted: dict[str, float] = {}
        """Incarnations that were told lately that they are not in the pool, and when."""

    def failure_timeout(self, member: Member) -> float:
        """Seconds of silence after which `member` counts as lost."""
        job = self._books.job_of(member)
        return job.spec.fault_tolerance.failure_timeout if job else self._books.timing.failure_timeout

    def tick(self, now: float) -> None:
        """Time has passed: who has been silent for too long is lost, whose patience is over leaves now."""
        pool, timing = self._books.pool, self._books.timing
        if self._last_tick is not None and now - self._last_tick > timing.deaf_after:
            pool.excuse(now - self._last_tick - timing.deaf_after)
        self._last_tick = now
        silent = pool.silent(now, self.failure_timeout)
        self.lose(
            [(member, f"no heartbeat for {format_seconds(self.failure_timeout(member))}") for member in silent], now
        )
        for member in pool.live():
            if member.state == "draining":
                self._mind_leaving(member, now)

    def joined(self, event: ev.WorkerJoined) -> None:
        earlier = self._books.pool.get(event.member.name)
        if earlier is not None and earlier.live:
            self.lose([(earlier, "its process was started again")], event.time)
        member = event.member
        member.state, member.job, member.joined_at, member.last_heard = "joined", None, event.time, event.time
        self._books.pool.put(member)
        device = member.device
        self._books.do(ev.SaveWorker(member.name))
        self._books.story(
            None,
            "worker-joined",
            f"worker {member.name} joined ({device.kind}, {device.threads} {plural('thread', device.threads)}, "
            f"{format_bytes(device.memory_bytes)})",
            worker=member.name,
        )

    def lose(self, gone: Sequence[tuple[Member, str]], now: float) -> None:
        """These workers are lost, for these reasons; a job that loses several at once deals with all of them at once."""
        losses: dict[str, list[Member]] = {}
        for member, why in gone:
            job = self._books.job_of(member)
            where = f" at step {job.step}" if job is not None and job.state == "running" else ""
            member.state, member.job, member.leave_by = "lost", None, None
            self._books.do(ev.SaveWorker(member.name))
            self._books.story(job, "worker-lost", f"worker {member.name} lost{where} ({why})", worker=member.name)
            if job is not None and job.hosts.get(member.name) == member.incarnation:
                losses.setdefault(job.id, []).append(member)
        for name, members in losses.items():
            self._consequences.lost(self._books.jobs[name], members, now)

    def expel(self, member: Member, job: Job, why: str) -> None:
        """A worker has been found to cheat: it leaves for good, and its name may not come back."""
        member.state, member.job, member.leave_by, member.barred = "left", None, None, why
        self._books.do(ev.Send(member.incarnation, Shutdown(reason=f"evicted: {why}")))
        self._books.do(ev.SaveWorker(member.name))
        self._books.story(job, "worker-evicted", f"worker {member.name} is evicted: {why}", worker=member.name)

    # Leaving ------------------------------------------------------------------------------------------------------

    def drain(self, member: Member, now: float, why: str) -> None:
        """Let a worker leave in good order: its fragments move first, or its job comes to a checkpoint."""
        if member.state == "draining":
            return
        job = self._books.job_of(member)
        if job is None:
            self._books.leave(member, why)
            return
        timing = self._books.timing
        member.state, member.leave_by = "draining", now + timing.drain_patience
        member.moving = not _handed_over(job, member) and self._consequences.move_off(job, member)
        if member.moving and (takes := self._consequences.moving_takes(job)) > timing.drain_patience:
            member.leave_by = now
            when = f"its fragments would take {format_seconds(takes)} to move, so others adopt them"
        elif member.moving:
            when = "its fragments move to other workers first"
        elif _handed_over(job, member):
            when = "it has no fragments"
        else:
            when = self._wait_for_checkpoint(job, member, now)
        self._books.do(ev.SaveWorker(member.name))
        self._books.story(job, "worker-draining", f"worker {member.name} leaves ({why}); {when}", worker=member.name)
        self._mind_leaving(member, now)

    def _wait_for_checkpoint(self, job: Job, member: Member, now: float) -> str:
        """The way that is left when no fragment can move; returns when the worker goes, in words."""
        member.moving = False
        wait = _seconds_to_checkpoint(job)
        planned = wait is not None and wait <= self._books.timing.drain_patience
        if not planned:
            member.leave_by = now
        return f"job {job.id} goes on without it {'at its next checkpoint' if planned else 'now'}"

    def _mind_leaving(self, member: Member, now: float) -> None:
        job = self._books.job_of(member)
        if job is not None and _handed_over(job, member):
            return
        if job is not None and member.moving and not self._consequences.move_off(job, member):
            when = self._wait_for_checkpoint(job, member, now)
            self._books.do(ev.SaveWorker(member.name))
            self._books.story(
                job,
                "worker-draining",
                f"worker {member.name} can't hand its fragments over; {when}",
                worker=member.name,
            )
        if member.leave_by is not None and now >= member.leave_by:
            self._leave_now(member, now)

    def leave_at_checkpoint(self, job: Job, now: float) -> None:
        """A checkpoint was written: workers that waited for it may go."""
        for member in self._books.pool.of_job(job.id):
            if member.state == "draining" and not member.moving and not _handed_over(job, member):
                self._leave_now(member, now)
                return

    def _leave_now(self, member: Member, now: float) -> None:
        """The draining member's job goes on without it; then it may go."""
        job = self._books.job_of(member)
        if job is None:
            self._books.leave(member, "drained")
        elif not all_finished(job) and not (member.moving and self._consequences.hand_over(job, member, now)):
            self._consequences.go_back(job, now, f"worker {member.name} leaves")

    def evict(self, event: ev.Reported) -> None:
        """Tell a worker that is not in the pool so; not at each heartbeat that is still on its way.

        One that was declared lost joins again; one that was to leave has not heard of it.
        """
        member = self._books.pool.of_incarnation(event.incarnation)
        lately = event.time - self._books.timing.failure_timeout
        self._evicted = {who: told for who, told in self._evicted.items() if told > lately}
        if event.incarnation not in self._evicted:
            self._evicted[event.incarnation] = event.time
            left = member is not None and member.state == "left"
            order = Shutdown(reason="left") if left else Shutdown(reason="declared lost; join again", evicted=True)
            self._books.do(ev.Send(event.incarnation, order))


def all_finished(job: Job) -> bool:
    """Whether every fragment is through with all steps and its last state is uploaded: the job needs no worker more."""
    return job.state == "running" and job.plan is not None and set(job.finished) >= set(job.plan.workers)


def _handed_over(job: Job, member: Member) -> bool:
    """Whether its fragments are with others; what the job still needs of it, its recovery knows."""
    return job.state == "running" and job.plan is not None and member.name not in job.plan.workers


def _seconds_to_checkpoint(job: Job) -> float | None:
    """Predicted seconds until the next checkpoint (there is one at the end at the latest); None when unknown."""
    if job.state != "running" or job.step_seconds is None:
        return None
    every = job.train.checkpoint_every
    left = job.train.steps - job.step
    if every:
        left = min(left, every - job.step % every)
    return left * job.step_seconds
