"""Holds what workers say of their speed against what their tasks take: where both are far apart, the tasks are right. Sans I/O.

The cost model is wrong by some factor for everybody (other operators, cores that are shared), so workers are compared with each
other: the middle one, or the claim itself, stands for what is as it was said. Who works alone is held against the model itself,
but only where it declared its speed, by far more than the model errs, and others who measured theirs are idle: so a job is not
kept by whoever says the largest number.
"""

from __future__ import annotations

from collections import defaultdict
from dataclasses import dataclass
from statistics import median, median_low

from coordinator.life.books import Books
from coordinator.life.events import SaveWorker
from coordinator.life.jobs import Job
from coordinator.life.pool import Member
from fusion.units import format_seconds

_STEPS = 5
"""Of each fragment; the first ones of a run may be slower than the others, so their median counts."""
_LIE = 3.0
_LIE_ALONE = 10.0
_LEAST_SECONDS = 0.05
"""Of work in a step: shorter tasks are mostly overhead."""
_LEAST_SHARE = 0.1
"""Of the arithmetic that each worker would do if all did as much: of less, nobody can say what it should take."""


@dataclass(frozen=True, slots=True)
class Correction:
    """A worker that is so many times slower than the others, by what each said, or alone than it said (below 1: faster)."""

    worker: str
    slower: float
    seconds: float
    """What its fragments take in a step,"""
    expected: float
    """... and what was expected by its own figures."""


def check(books: Books, job: Job) -> None:
    """Count on the real speed of a worker from here on; tell people, and have the job look for a better placement."""
    hosts = books.hosts(job)
    all_found = corrections(job, {member.name: member.slower for member in hosts})
    working = [member for member in hosts if job.plan is not None and member.name in job.plan.workers]
    beside = "the others, by what each said"
    spare = [*books.pool.idle(), *(member for member in hosts if member not in working)]
    if len(working) == 1 and any(map(_measured, spare)):
        all_found, beside = contradicted(job, working[0]), "it said"
    for found in all_found:
        member = books.pool.get(found.worker)
        assert member is not None
        member.slower = found.slower
        books.do(SaveWorker(member.name))
        words = f"worker {member.name} is {_how(found.slower, beside)}"
        speed = f" ({member.device.flops_per_second:.2g} FLOP/s)" if member.device.flops_per_second else ""
        # Of one that is as fast as it said the two times still differ, by what the model is wrong for all.
        times = (
            f": its work takes {format_seconds(found.seconds)} a step, {format_seconds(found.expected)} was expected"
            if found.slower != 1
            else ""
        )
        books.story(
            job,
            "speed-corrected",
            f"{words}{speed}{times}; plans count on that from here on",
            worker=member.name,
            slower=found.slower,
        )
        if job.run is not None:
            job.run.reconsider = words


def corrections(job: Job, known: dict[str, float]) -> list[Correction]:
    """The workers of a running job whose steps show another speed than the one that is `known` so far."""
    measured, expected = _work(job)
    if len(measured) < 2:
        return []  # There is nobody to compare with.
    ratios = {worker: measured[worker] / expected[worker] for worker in measured}
    usual = median_low([1.0, *ratios.values()])
    found = []
    for worker, ratio in ratios.items():
        slower = ratio / usual
        if 1 / _LIE < slower < _LIE or max(measured[worker], expected[worker]) < _LEAST_SECONDS:
            slower = 1.0
        before = known.get(worker, slower)
        if max(slower / before, before / slower) >= _LIE:
            found.append(Correction(worker, slower, measured[worker], expected[worker]))
    return found


def contradicted(job: Job, host: Member) -> list[Correction]:
    """The only host of a running job, if it declared a speed that is out of the question."""
    measured, expected = (found.get(host.name) for found in _work(job))
    if not host.device.declared or not measured or not expected or measured < _LEAST_SECONDS:
        return []
    slower = measured / expected
    if slower < _LIE_ALONE or slower / host.slower < _LIE:
        return []
    return [Correction(host.name, slower, measured, expected)]


def _measured(member: Member) -> bool:
    return member.device.flops_per_second > 0 and not member.device.declared


def _work(job: Job) -> tuple[dict[str, float], dict[str, float]]:
    """Worker -> seconds of a step, as measured and as expected, of those that do enough to be judged by it.

    Empty until enough steps of all workers are known.
    """
    times = job.run.times if job.run is not None else {}
    measured: dict[str, float] = defaultdict(float)
    expected: dict[str, float] = defaultdict(float)
    flops: dict[str, int] = defaultdict(int)
    for fragment in job.fragments:
        flops[fragment.worker] += fragment.flops
        if fragment.seconds is None:
            continue
        known = times.get(fragment.index)
        if known is None or known.worker != fragment.worker or len(known.first) < _STEPS:
            return {}, {}
        measured[fragment.worker] += median(known.first)
        expected[fragment.worker] += fragment.seconds
    least = _LEAST_SHARE * sum(flops.values()) / max(1, len(flops))
    judged = [worker for worker in measured if flops[worker] >= least]
    return {worker: measured[worker] for worker in judged}, {worker: expected[worker] for worker in judged}


def _how(slower: float, beside: str) -> str:
    if slower == 1:
        return "as fast as it said"
    factor = max(slower, 1 / slower)
    times = f"{factor:.1f}" if factor < 10 else f"{factor:.0f}"
    return f"{times} times {'slower' if slower > 1 else 'faster'} than {beside}"
