"""Whether a running job should go on with other cuts, from its next checkpoint: after its pool has changed for long. Sans-I/O.

Moves keep the cuts, so what four workers shared evenly is uneven on three. As long as values travel as they are, the bits
are the same wherever most models are cut (`dag.cut.bits_follow_cuts`); others, and jobs with a lossy codec, keep their
cuts. To begin anew costs some seconds, and what was trained since the checkpoint is run again: it has to pay.
"""

from __future__ import annotations

from coordinator.life import events as ev
from coordinator.life.jobs import Job
from fusion.units import format_seconds

LEAST_GAIN = 0.05
"""Of the step time: both predictions are for the same workers, and what is wrong with their speeds is wrong with both."""
LEAST_SAVING = 30.0
"""Seconds until the end of the job: ten times what beginning anew takes."""


def possible(job: Job) -> bool:
    """Whether other cuts would leave the bits as they are, and there will be a checkpoint to begin from."""
    compression = job.spec.compression
    as_they_are = compression.codec == "none" and compression.forward is None and compression.backward is None
    return as_they_are and _steps_after_checkpoint(job) > 0


def consider(job: Job, made: ev.PlanMade) -> str:
    """Note in the job's run whether other cuts pay, now that the scheduler has predicted; returns what to tell people, if so."""
    run = job.run
    assert run is not None
    told, run.recut = bool(run.recut), ""
    kept, current, fresh = made.plan.predicted_step_seconds, made.current_seconds, made.fresh_seconds
    if kept is None or current is None or fresh is None or not possible(job):
        return ""
    kept = min(kept, current)
    # What a step really takes stands to the prediction of the present placement as it will to that of another.
    saving = run.pace * (kept - fresh) / current * _steps_after_checkpoint(job)
    if fresh > (1 - LEAST_GAIN) * kept or saving < LEAST_SAVING:
        return ""
    run.recut = f"other cuts are predicted to take {1 - fresh / kept:.0%} off a step"
    if told:
        return ""
    return f"job {job.id} is to be cut anew at its next checkpoint: {run.recut}, about {format_seconds(saving)} in all"


def _steps_after_checkpoint(job: Job) -> int:
    """Steps that remain after the next checkpoint; 0 when there is none before the end."""
    every = job.train.checkpoint_every
    if not every or job.run is None:
        return 0
    return max(0, job.train.steps - (job.run.highest // every + 1) * every)
