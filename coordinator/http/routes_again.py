"""HTTP routes that submit a job anew with other settings: its model is here already, so nothing has to be captured for it."""

from __future__ import annotations

from aiohttp import web
from pydantic import BaseModel, ConfigDict, Field

from coordinator.http.bodies import read_body
from coordinator.http.routes_jobs import find_job, queue
from coordinator.http.routing import CANT_RECORD, ENGINE, Answer, HttpError, Parameter, Route
from coordinator.life.jobs import Job
from coordinator.shown.views import ErrorView, JobView, ResumeFromCheckpoint, Submission
from fusion.spec import (
    NAME_PATTERN,
    CheckpointSpec,
    CompressionSpec,
    FaultToleranceSpec,
    PlanSpec,
    TrainSpec,
    VerifySpec,
)


class JobSettings(BaseModel):
    """What of a job's spec may be changed without its model and its data."""

    model_config = ConfigDict(extra="forbid")

    name: str = Field(pattern=NAME_PATTERN)
    train: TrainSpec
    plan: PlanSpec = Field(default_factory=PlanSpec)
    compression: CompressionSpec = Field(default_factory=CompressionSpec)
    fault_tolerance: FaultToleranceSpec = Field(default_factory=FaultToleranceSpec)
    verify: VerifySpec = Field(default_factory=VerifySpec)
    checkpoint: CheckpointSpec = Field(default_factory=CheckpointSpec)


class Again(BaseModel):
    """Body of `POST /api/v1/jobs/{id}/again`."""

    model_config = ConfigDict(extra="forbid")

    settings: JobSettings
    after: int | None = Field(None, ge=0, lt=10**18, description="Go on after the job's checkpoint of this step.")


def settings_of(job: Job) -> JobSettings:
    return JobSettings(**{name: getattr(job.spec, name) for name in JobSettings.model_fields})


async def settings(request: web.Request) -> web.Response:
    return web.json_response(settings_of(find_job(request)).model_dump(mode="json"))


async def again(request: web.Request) -> web.Response:
    job, asked = find_job(request), await read_body(request, Again)
    changes = {name: getattr(asked.settings, name) for name in JobSettings.model_fields}
    if asked.settings.train.precision != job.spec.train.precision:
        raise HttpError(
            400, "settings.train.precision is part of the captured model; submit the job from its own folder"
        )
    if job.origin_step and asked.after is None:
        raise HttpError(
            400, f"job {job.id} itself went on from a checkpoint; say after which of its own this one begins"
        )
    resume = ResumeFromCheckpoint(checkpoint=f"{job.id}@{asked.after}") if asked.after is not None else None
    spec = job.spec.model_copy(update=changes)
    return await queue(
        request.app[ENGINE], Submission(spec=spec, dag=job.dag, weights=job.weights, data=job.data, resume=resume)
    )


_ID = Parameter("id", "The job's id.")
_NO_JOB = Answer(404, "No such job.", ErrorView)

ROUTES = (
    Route(
        "GET",
        "/api/v1/jobs/{id}/settings",
        settings,
        "What of the job's spec may be changed without capturing its model again.",
        (Answer(200, "The settings as they are.", JobSettings), _NO_JOB),
        (_ID,),
        right="viewer",
    ),
    Route(
        "POST",
        "/api/v1/jobs/{id}/again",
        again,
        "Submit the job's model and data anew, with these settings.",
        (
            Answer(201, "Queued.", JobView),
            Answer(400, "It does not pass the checks; nothing is queued.", ErrorView),
            _NO_JOB,
            CANT_RECORD,
            Answer(507, "The disk is full.", ErrorView),
        ),
        (_ID,),
        body=Again,
        right="operator",
    ),
)
