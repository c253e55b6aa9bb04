"""Who may start now: first in, first out over the idle workers, with a reason in words for each job that has to wait.

A job that could start if all live workers were idle holds back the jobs behind it, so that small jobs can't starve a
large one; a job that the pool is too small for, or was refused for all that the pool has, holds nobody back. A job that lost
a worker comes before fresh ones, and takes its own workers first. A fresh one is offered all that are idle, also where it asks
for fewer: the scheduler chooses, and the others are free again when its plan is made.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from math import inf

from coordinator.life.jobs import Job
from coordinator.life.pool import Member
from fusion.units import plural


@dataclass(frozen=True, slots=True)
class Queueing:
    """The outcome: at most one job to start, with its workers, and why the others wait."""

    start: tuple[Job, tuple[Member, ...]] | None
    reasons: dict[str, str] = field(default_factory=dict)


def decide(queued: Sequence[Job], live: Sequence[Member]) -> Queueing:
    """Choose the next job to start among `queued`."""
    idle = [member for member in live if member.state == "idle"]
    usable = [member for member in live if member.state in ("idle", "busy")]
    reasons: dict[str, str] = {}
    blocker: Job | None = None
    for job in sorted(queued, key=lambda job: (job.plan is None, job.number)):
        if blocker is not None:
            reasons[job.id] = f"waits behind job {blocker.id} in the queue"
            continue
        taken = _take(job, idle)
        if taken is not None and not _refused(job, taken):
            return Queueing((job, taken), reasons)
        best = _take(job, usable)
        hopeless = best is None or _refused(job, best)
        if job.refused_for is not None and (taken is not None or hopeless):
            reasons[job.id] = job.refused_reason
        else:
            reasons[job.id] = _shortage(_needed(job), len(idle), len(usable), _prefix(job))
        if not hopeless:
            blocker = job
    return Queueing(None, reasons)


def _refused(job: Job, taken: Sequence[Member]) -> bool:
    """Whether the last plan was refused, and these workers would change nothing about that."""
    if job.refused_for is None:
        return False
    if job.plan is None and job.spec.plan.workers is not None:
        # Memory is the usual reason, and the roomiest workers were among those to choose from.
        taken = sorted(taken, key=_room, reverse=True)[: job.spec.plan.workers]
        return {member.incarnation for member in taken} <= set(job.refused_for)
    return job.refused_for == sorted(member.incarnation for member in taken)


def _room(member: Member) -> float:
    return member.room_bytes or inf


def _needed(job: Job) -> int:
    return 1 if job.plan is not None else job.spec.plan.workers or 1


def _take(job: Job, idle: Sequence[Member]) -> tuple[Member, ...] | None:
    """The workers that `job` would be planned for now; None when there are too few."""
    if len(idle) < _needed(job):
        return None
    if job.plan is None:
        return tuple(idle)
    before = job.plan.workers
    # Its own workers first: their weights may still be in the page cache, and nobody else's job has to wait for them.
    own_first = sorted(idle, key=lambda member: before.index(member.name) if member.name in before else len(before))
    most = (job.spec.plan.workers or len(idle)) if job.recut else len(before)
    return tuple(own_first[:most])


def _prefix(job: Job) -> str:
    return f"to go on from step {job.restart_step} it " if job.plan is not None else ""


def _shortage(needed: int, idle: int, usable: int, prefix: str) -> str:
    workers = f"{needed} {plural('worker', needed)}"
    if usable == 0:
        return f"{prefix}waits for {workers}: the pool is empty; start one with `fusion worker --join URL`"
    if usable < needed:
        return f"{prefix}waits for {workers}: the pool has {usable}; start {needed - usable} more"
    if idle == 0:
        busy = "the only worker is" if usable == 1 else f"all {usable} workers are"
        return f"{prefix}waits for {workers}: {busy} busy"
    return f"{prefix}waits for {workers}: {idle} of {usable} {'is' if idle == 1 else 'are'} idle"
