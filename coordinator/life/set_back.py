"""Times on record that have yet to come, because the machine's clock was set back while the coordinator was away. Sans-I/O.

Everything that is recorded has happened: what lies ahead counts from now, or it would be waited for until the clock is there.
"""

from __future__ import annotations

from coordinator.life import setbacks
from coordinator.life.jobs import Job
from coordinator.life.pool import Member


def of_member(member: Member, now: float, patience: float) -> None:
    """`patience` is what a draining worker has at most."""
    member.last_heard = min(member.last_heard, now)
    member.joined_at = min(member.joined_at, now)
    if member.leave_by is not None:
        member.leave_by = min(member.leave_by, now + patience)


def of_job(job: Job, now: float) -> None:
    """For one that goes on."""
    job.submitted_at = min(job.submitted_at, now)
    job.started_at = _past(job.started_at, now)
    job.last_completion = _past(job.last_completion, now)
    for partial in job.partial.values():
        partial.completed_at, partial.passed_at = _past(partial.completed_at, now), _past(partial.passed_at, now)
    if job.run is not None:
        job.run.asked_at, job.run.moved_at = _past(job.run.asked_at, now), _past(job.run.moved_at, now)
        setbacks.set_back(job.run, now)


def _past(moment: float | None, now: float) -> float | None:
    return None if moment is None else min(moment, now)
