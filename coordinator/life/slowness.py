"""Notices a worker that has become slower than it was: its fragments' times against their own earlier median."""

from __future__ import annotations

from collections import defaultdict
from statistics import median, median_low

from coordinator.life.jobs import Job
from coordinator.life.run import Times
from fusion.messages import FragmentTimes

_FIRST = 10
_LAST = 10
_SLOW = 2.0


def note(job: Job, worker: str, times: FragmentTimes) -> bool:
    """Take in how long a fragment took in one step; True while it is one of its first."""
    seconds = times.forward + times.backward + times.update
    if job.run is None or job.plan is None or not 0 <= times.fragment < len(job.plan.placement) or seconds <= 0:
        return False
    known = job.run.times.get(times.fragment)
    if known is None or known.worker != worker:
        known = job.run.times[times.fragment] = Times(worker=worker)
    early = len(known.first) < _FIRST
    if early:
        known.first.append(seconds)
    known.last = [*known.last[1 - _LAST :], seconds]
    return early


def factors(job: Job) -> dict[str, float]:
    """Worker -> how many times slower it is than at first, of those for which enough is known."""
    found: dict[str, list[float]] = defaultdict(list)
    for known in job.run.times.values() if job.run is not None else ():
        if len(known.first) == _FIRST and len(known.last) == _LAST and job.hosts.get(known.worker):
            found[known.worker].append(median(known.last) / median(known.first))
    return {worker: median(each) for worker, each in found.items()}


def slow_worker(job: Job) -> str | None:
    """The worker that has slowed down the most, if that is by two times or more, and so much more than most have.

    Where all have become slower (they share a machine that got busy, say) no placement is better than it was.
    """
    found = factors(job)
    worst = max(found, key=lambda worker: found[worker], default=None)
    if worst is None:
        return None
    usual = max(1.0, median_low(found.values()))
    return worst if found[worst] >= _SLOW * usual else None
