"""Puts the step reports of a job's workers together: a step counts when all its fragments have finished it, once.

A fragment may be reported by several workers in turn: one that adopts it runs its last steps again. A metric is given out
in step order. With spot checks, a step waits until it is past them. A step after which an evaluation is due waits for the evaluation's report; it waits no longer than until all
fragments have finished the next step, because a worker evaluates before it goes on.
"""

from __future__ import annotations

from coordinator.life.jobs import Job, Metric, PartialStep
from fusion.messages import EvaluationReport, StepReport

_STEADY = 0.8
_OUTLIER = 3.0


def add_step(job: Job, worker: str, report: StepReport, now: float) -> list[Metric]:
    """Take in a worker's report; return the metrics of steps that are complete now."""
    assert job.plan is not None
    count = len(job.plan.placement)
    fragments = [times.fragment for times in report.fragments if 0 <= times.fragment < count]
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
        if report.loss is not None:
            partial.loss = report.loss
        if report.gradient_norm is not None:
            partial.gradient_norm = report.gradient_norm
        if len(partial.fragments) == count:
            partial.completed_at = now
            # Reports of one fragment come in order, so whatever is missing of earlier steps was lost on the way
            # (a coordinator that was killed, say): those steps are complete too.
            for step, earlier in job.partial.items():
                if step < report.step and earlier.completed_at is None:
                    earlier.completed_at = now
    elif run is None or report.step == job.step == run.again_until:
        job.last_completion = now  # Run again after a restart: the next step's time begins here.
    return _complete(job)


def add_evaluation(job: Job, report: EvaluationReport) -> list[Metric]:
    """Take in the evaluation after a step; return the metrics of steps that are complete now."""
    if report.step > job.step:
        job.partial.setdefault(report.step, PartialStep()).eval_loss = report.loss
    return _complete(job)


def settled(job: Job) -> list[Metric]:
    """The metrics that waited for spot checks which are over now."""
    return _complete(job)


def unsettled(job: Job, step: int) -> bool:
    """Whether what came of `step` may still turn out to be a lie, and must not be given out yet."""
    run, plan = job.run, job.plan
    if not job.spec.verify.fraction or run is None or plan is None or len(plan.workers) < 2:
        return False  # One worker alone is checked by nobody.
    return step > run.settled


def flush(job: Job, through: int | None = None) -> list[Metric]:
    """What is complete, up to the step `through`, waits for no evaluation any more: there won't be another."""
    return _complete(job, wait_for_evaluation=False, through=through)


def evaluation_due(job: Job, step: int) -> bool:
    every = job.train.eval_every
    return bool(every and job.train.eval_batches and step % every == 0)


def _complete(job: Job, wait_for_evaluation: bool = True, through: int | None = None) -> list[Metric]:
    metrics: list[Metric] = []
    for step in sorted(job.partial):
        partial = job.partial[step]
        if partial.completed_at is None or (through is not None and step > through) or unsettled(job, step):
            break
        waiting = wait_for_evaluation and evaluation_due(job, step) and partial.eval_loss is None
        following = job.partial.get(step + 1)
        if waiting and not (following is not None and following.completed_at is not None):
            break
        del job.partial[step]
        metrics.append(_metric(job, step, partial, partial.completed_at))
    return metrics


def _metric(job: Job, step: int, partial: PartialStep, completed_at: float) -> Metric:
    began = job.last_completion if job.last_completion is not None else completed_at
    seconds = max(0.0, completed_at - began)
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
