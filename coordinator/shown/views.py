"""The JSON that people and programs see: jobs, workers, metrics, events, logs, checkpoints."""

from __future__ import annotations

import json
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field, computed_field

from coordinator.life.jobs import FragmentSummary, Job, JobState, Metric
from coordinator.life.pool import Member
from fusion.messages import BlobRef, DataManifest, Device
from fusion.plan import Plan
from fusion.spec import JobSpec


class ChecksView(BaseModel):
    """Spot checks of a job: stretches of a fragment's steps that another worker has run again."""

    passed: int
    failed: int
    void: int = Field(description="They could not be made, or not to the end.")


class ShownPlan(Plan):
    __doc__ = Plan.__doc__
    # What is read back says its id, which follows from the rest.
    model_config = ConfigDict(extra="ignore")

    @computed_field(description="Hash of what decides the bits: cuts and codecs, not placement or epoch.")  # type: ignore[prop-decorator]
    @property
    def id(self) -> str:
        return super().id


class JobView(BaseModel):
    """A job. Times are seconds since the epoch."""

    id: str
    name: str
    state: JobState
    reason: str = Field(description="Why it waits or how it ended, in words; empty when all is well.")
    refused: bool = Field(
        description="It waits, and there is no plan for any of the workers that were idle when it was tried."
    )
    submitted_at: float
    started_at: float | None
    finished_at: float | None
    step: int = Field(description="Last finished step; steps count from 1.")
    steps: int
    loss: float | None
    first_loss: float | None
    step_seconds: float | None
    tokens_per_second: float | None = Field(description="Of text.")
    samples_per_second: float | None = Field(description="Of other data.")
    sent_bytes: int = Field(description="Bytes that its workers sent to each other so far.")
    epoch: int = Field(description="Epoch of the plan; grows when the job starts again with other workers.")
    plan: ShownPlan | None
    workers: list[str]
    fragments: list[FragmentSummary]
    checkpoint: int | None = Field(description="Step of the latest checkpoint.")
    common_step: int | None = Field(
        description="Step whose state other workers hold: from there a lost worker's fragments go on. Null between runs."
    )
    backups: dict[int, str] = Field(description="Fragment -> the worker that takes it over if its host is lost.")
    recoveries: int = Field(description="Losses of workers that cost no step.")
    restarts: int = Field(description="Times that the job went back to its checkpoint.")
    checks: ChecksView


class WorkerView(BaseModel):
    """A worker of the pool."""

    name: str
    incarnation: str
    state: Literal["joined", "idle", "busy", "draining", "lost"]
    job: str | None
    fragments: list[int] = Field(description="Indices of the fragments it hosts.")
    device: Device
    endpoint: str = Field(description="Where its peers connect.")
    fusion_version: str
    torch_version: str
    joined_at: float
    last_heard: float
    memory_used_bytes: int
    refused: int = Field(description="Messages of its peers that it has refused.")


class LinkView(BaseModel):
    """One direction between two workers: a message of n bytes takes `seconds + n / bytes_per_second`."""

    model_config = ConfigDict(populate_by_name=True)

    sender: str = Field(alias="from")
    to: str
    seconds: float | None = Field(description="One-way latency; a probe counts half of the round trip.")
    bytes_per_second: float | None
    source: Literal["declared", "probe", "transfers"] = Field(
        description="A topology file, messages sent to measure it, or the messages of a job."
    )
    age_seconds: float = Field(description="Since it was measured; 0 of what is declared.")
    relay: str | None = Field(
        None, description="Who offers the relay that it goes over, because the two can't reach each other."
    )
    error: str | None = Field(description="Why the last probe failed, in words; no new plan uses the link then.")


class MetricView(Metric):
    """One finished step."""


class EventView(BaseModel):
    """Something that happened, told for people; `event` is its kind. Further keys depend on the kind."""

    model_config = ConfigDict(extra="allow")

    seq: int
    time: float
    job: str | None
    event: str
    message: str


class LogView(BaseModel):
    seq: int
    time: float
    job: str | None
    worker: str
    message: str


class CheckpointView(BaseModel):
    """A consolidated checkpoint; its files are blobs too."""

    job: str
    step: int
    time: float
    model: BlobRef
    optimizer: BlobRef


class JobList(BaseModel):
    jobs: list[JobView]


class WorkerList(BaseModel):
    workers: list[WorkerView]


class LinkList(BaseModel):
    links: list[LinkView]


class MetricList(BaseModel):
    metrics: list[MetricView]


class EventList(BaseModel):
    events: list[EventView]


class LogList(BaseModel):
    logs: list[LogView]


class CheckpointList(BaseModel):
    checkpoints: list[CheckpointView]


class ErrorView(BaseModel):
    """Every answer with a status of 400 or more."""

    error: str = Field(description="One line: what, where, what to do.")


class Health(BaseModel):
    status: Literal["ok"]
    version: str
    protocol_version: int
    workers: int = Field(description="Live workers.")
    jobs: int = Field(description="Jobs that have not ended.")
    unwritten: str | None = Field(
        description="Why nothing can be recorded now, a full disk say; what happens waits in memory."
    )


class ResumeFromCheckpoint(BaseModel):
    """Go on after a checkpoint of a job that this coordinator knows."""

    model_config = ConfigDict(extra="forbid")

    checkpoint: str = Field(pattern=r"^[A-Za-z0-9._-]{1,64}@[0-9]{1,18}$", description="`JOBID@STEP`.")


class ResumeFromBlobs(BaseModel):
    """Go on after `step` steps from uploaded files."""

    model_config = ConfigDict(extra="forbid")

    model: BlobRef
    optimizer: BlobRef | None = None
    step: int = Field(0, ge=0)


class Submission(BaseModel):
    """Body of `POST /api/v1/jobs`; the blobs are uploaded before."""

    model_config = ConfigDict(extra="forbid")

    spec: JobSpec
    dag: BlobRef
    weights: BlobRef
    data: DataManifest
    resume: ResumeFromCheckpoint | ResumeFromBlobs | None = None


def job_view(job: Job) -> dict[str, Any]:
    """The JSON of a job."""
    tokens = job.tokens_per_step
    view = JobView(
        id=job.id,
        name=job.spec.name,
        state=job.state,
        reason=job.reason,
        refused=job.state == "queued" and job.refused_for is not None,
        submitted_at=job.submitted_at,
        started_at=job.started_at,
        finished_at=job.finished_at,
        step=job.step,
        steps=job.train.steps,
        loss=job.loss,
        first_loss=job.first_loss,
        step_seconds=job.step_seconds,
        tokens_per_second=tokens / job.step_seconds if tokens and job.step_seconds else None,
        samples_per_second=job.samples_per_step / job.step_seconds if not tokens and job.step_seconds else None,
        sent_bytes=job.sent_bytes,
        epoch=job.epoch,
        plan=shown_plan(job.plan) if job.plan else None,
        workers=list(job.plan.workers) if job.plan else list(job.hosts),
        fragments=job.fragments,
        checkpoint=job.checkpoint,
        common_step=job.run.common_step if job.run else None,
        backups=job.run.backups if job.run else {},
        recoveries=job.recoveries,
        restarts=job.restarts,
        checks=ChecksView(passed=job.checks_passed, failed=job.checks_failed, void=job.checks_void),
    )
    shown: dict[str, Any] = json.loads(view.model_dump_json())  # JSON has no NaN: a lost loss is shown as null.
    return shown


def shown_plan(plan: Plan) -> ShownPlan:
    return ShownPlan.model_validate(plan, from_attributes=True)


def worker_view(member: Member, job: Job | None) -> dict[str, Any]:
    """The JSON of a worker; `job` is the one it is busy with."""
    fragments = job.plan.fragments_of(member.name) if job is not None and job.plan is not None else ()
    return {
        "name": member.name,
        "incarnation": member.incarnation,
        "state": member.state,
        "job": member.job,
        "fragments": list(fragments),
        "device": member.device.model_dump(mode="json"),
        "endpoint": member.endpoint,
        "fusion_version": member.fusion_version,
        "torch_version": member.torch_version,
        "joined_at": member.joined_at,
        "last_heard": member.last_heard,
        "memory_used_bytes": member.memory_used_bytes,
        "refused": member.refused,
    }
