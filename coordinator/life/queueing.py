"""Who may start now: first in, first out over the idle workers, with a reason in words for each job that has to wait.

A job that could start if all live workers were idle holds back the jobs behind it, so that small jobs can't starve a
large one; a job that the pool is too small for, or was refused for all that the pool has, holds nobody back. A job that lost a worker comes before fresh ones, and
takes its own workers first.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

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
        if taken is not None and job.refused_for != _incarnations(taken):
            return Queueing((job, taken), reasons)
        best = _take(job, usable)
        hopeless = best is None or job.refused_for == _incarnations(best)
        if job.refused_for is not None and (taken is not None or hopeless):
            reasons[job.id] = job.refused_reason
        else:
            reasons[job.id] = _shortage(_needed(job), len(idle), len(usable), _prefix(job))
        if not hopeless:
            blocker = job
    return Queueing(None, reasons)


def _incarnations(members: Sequence[Member]) -> list[str]:
    return sorted(member.incarnation for member in members)


def _needed(job: Job) -> int:
    return 1 if job.plan is not None else job.spec.plan.workers or 1


def _take(job: Job, idle: Sequence[Member]) -> tuple[Member, ...] | None:
    """The workers that `job` would start on now; None when there are too few."""
    if len(idle) < _needed(job):
        return None
    if job.plan is None:
        if job.spec.plan.workers is None:
            return tuple(idle)
        if job.refused_for is not None:
            # The first choice did not fit; memory is the usual reason, so the roomiest workers get a try.
            idle = sorted(idle, key=lambda member: -member.device.memory_bytes)
        return tuple(idle[: job.spec.plan.workers])
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
