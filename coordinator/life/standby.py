"""When a worker that has no fragment of a job holds its snapshots: where one worker does the whole job and another is idle.

Two workers or more hold each other's snapshots. One alone has nobody, and with it the job would go back to its checkpoint.
"""

from __future__ import annotations

from collections.abc import Iterable

from coordinator.life.jobs import Job
from coordinator.life.pool import Member

_LEAST_SECONDS = 0.5
"""Of work that there must be to lose;"""
_SECONDS_LEFT = 2.0
"""... what is left of a job must take longer than this for another worker to be bothered."""


def wanted(job: Job) -> bool:
    """Whether the job needs a worker to stand by that does not yet."""
    run, plan = job.run, job.plan
    if job.state != "running" or run is None or plan is None or len(plan.workers) > 1 or run.standby:
        return False
    done, left = run.highest - run.start, job.train.steps - run.highest
    return done * run.pace >= _LEAST_SECONDS and left * run.pace >= _SECONDS_LEFT


def keeps(job: Job, member: Member, others: Iterable[Job]) -> bool:
    """Whether a worker that stands by goes on to: not if it leaves, or if another job waits for workers."""
    if job.run is None or member.name not in job.run.standby:
        return False
    return member.state != "draining" and all(other.state != "queued" for other in others)
