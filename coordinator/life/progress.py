"""Puts the step reports of a job's workers together: a step counts when all its fragments have finished it, once.

A fragment may be reported by several workers in turn: one that adopts it runs its last steps again. A metric is given out
in step order. With spot checks, a step waits until it is past them. A step after which an evaluation is due waits for the
evaluation's report.

What one worker reports comes in order, except where a connection breaks: then something later may be here before what was lost is said
again. So a step that lacks a report waits for a moment after a later step is complete, and goes without after that.
"""

from __future__ import annotations

from coordinator.life.jobs import Job, Metric, PartialStep
from fusion.messages import EvaluationReport, StepReport

PATIENCE = 2.0
"""Seconds in which reports that a broken connection lost are said again. Only steps that lack one wait for so long."""
_LONGEST_GAP = 1000
"""Steps before a complete one that may all be missing: no honest worker loses so many reports, and any can say any number."""
_STEADY = 0.8
_OUTLIER = 3.0


def add_step(job: Job, worker: str, report: StepReport, now: float) -> list[Metric]:
    """Take in a worker's report; return the metrics of steps that are complete now."""
    assert job.plan is not None
    count = len(job.plan.placement)
    fragments = [*dict.fromkeys(times.fragment for times in report.fragments if 0 <= times.fragment < count)]
    run = job.run
    if run is not None:
        run.highest = max(run.highest, report.step)
        run.log_bytes[worker] = report.log_bytes
        for fragment in fragments:
            run.reached[fragment] = max(report.step, run.reached.get(fragment, run.start))
    if report.step > job.step:
        partial = job.partial.setdefault(report.step, PartialStep())
        fresh = [fragment for fragment in fragments if fragment not in partial.fragments]
        if not fresh:
            return []
        partial.fragments.extend(fresh)
        partial.sent_bytes += report.sent_bytes
        if report.seconds is not None:
            partial.seconds.append(report.seconds)
        if report.loss is not None:
            partial.loss = report.loss
        if report.gradient_norm is not None:
            partial.gradient_norm = report.gradient_norm
        if len(partial.fragments) == count:
            partial.completed_at = now
            for step in range(max(job.step + 1, report.step - _LONGEST_GAP), report.step):
                earlier = job.partial.setdefault(step, PartialStep())
                if earlier.passed_at is None:
                    earlier.passed_at = now
    elif run is None or report.step == job.step == run.again_until:
        job.last_completion = now  # Run again after a restart: the next step's time begins here.
    return _complete(job, now)


def add_evaluation(job: Job, report: EvaluationReport, now: float) -> list[Metric]:
    """Take in the evaluation after a step; return the metrics of steps that are complete now."""
    if report.step > job.step:
        job.partial.setdefault(report.step, PartialStep()).eval_loss = report.loss
    return _complete(job, now)


def settled(job: Job, now: float) -> list[Metric]:
    """The metrics that waited, for spot checks that are over now or for reports that will not come any more."""
    return _complete(job, now)


def unsettled(job: Job, step: int) -> bool:
    """Whether what came of `step` may still turn out to be a lie, and must not be given out yet."""
    run, plan = job.run, job.plan
    if not job.spec.verify.fraction or run is None or plan is None or len(plan.workers) < 2:
        return False  # One worker alone is checked by nobody.
    return step > run.settled


def all_said(job: Job, now: float) -> bool:
    """Call when every worker has said to be finished: whether nothing of the last steps may still be on its way."""
    for partial in job.partial.values():
        if partial.passed_at is None:
            partial.passed_at = now
    return all(_given_up(partial, now) for partial in job.partial.values())


def flush(job: Job, through: int | None = None) -> list[Metric]:
    """What is left, up to the step `through`, waits for no report any more: there won't be another.

    A step that lacks some counts when a later one is complete.
    """
    return _complete(job, None, through)


def evaluation_due(job: Job, step: int) -> bool:
    """Whether the held-out data is evaluated after this step of the job."""
    every = job.train.eval_every
    return bool(every and job.train.eval_batches and step % every == 0 and 0 < step <= job.train.steps)


def _complete(job: Job, now: float | None, through: int | None = None) -> list[Metric]:
    """The metrics of the steps, the earliest first, that lack nothing or wait no longer; without `now` none waits."""
    metrics: list[Metric] = []
    for step in sorted(job.partial):
        partial = job.partial[step]
        late = now is None or _given_up(partial, now)
        completed_at = partial.passed_at if partial.completed_at is None and late else partial.completed_at
        if completed_at is None or (through is not None and step > through) or unsettled(job, step):
            break
        if evaluation_due(job, step) and partial.eval_loss is None and not late:
            break
        del job.partial[step]
        metrics.append(_metric(job, step, partial, completed_at))
    return metrics


def _given_up(partial: PartialStep, now: float) -> bool:
    """Whether what a step lacks can't be on its way any more."""
    return partial.passed_at is not None and now - partial.passed_at >= PATIENCE


def _metric(job: Job, step: int, partial: PartialStep, completed_at: float) -> Metric:
    began = job.last_completion if job.last_completion is not None else completed_at
    seconds = max(0.0, completed_at - began)
    if partial.seconds:
        # Reports that were late, as after a restart of the coordinator, come all at once: workers know better.
        seconds = min(max(seconds, min(partial.seconds)), max(partial.seconds))
    job.last_completion = completed_at
    job.step = step
    job.step_seconds = seconds
    if job.run is not None:
        job.run.pace = _average(job.run.pace, seconds)
    job.sent_bytes += partial.sent_bytes
    if partial.loss is not None:
        job.loss = partial.loss
        if job.first_loss is None:
            job.first_loss = partial.loss
    tokens = job.tokens_per_step
    return Metric(
        step=step,
        loss=partial.loss,
        step_seconds=seconds,
        sent_bytes=partial.sent_bytes,
        tokens=tokens,
        samples=None if tokens is not None else job.samples_per_step,
        epoch=job.epoch,
        gradient_norm=partial.gradient_norm,
        eval_loss=partial.eval_loss,
    )


def _average(before: float, seconds: float) -> float:
    """Over the last few steps; a step that a recovery fell into counts little."""
    return _STEADY * before + (1 - _STEADY) * min(seconds, _OUTLIER * before) if before else seconds
