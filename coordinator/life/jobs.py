"""One job as the coordinator knows it: what was asked, where it stands, and what its workers have said so far.

States: `queued` (with a reason in words) -> `preparing` -> `running` -> `done` | `failed` | `cancelled`; a job that loses
a worker goes on with the others, or back to `queued` and on from its last checkpoint. The record is a pydantic model, so
that a restart of the coordinator finds everything again, half-reported steps and half-collected checkpoints included.
"""

from __future__ import annotations

from typing import Literal

from pydantic import BaseModel, Field

from coordinator.life.run import Run
from fusion.messages import BlobRef, DataManifest, TrainConfig
from fusion.plan import Plan
from fusion.spec import JobSpec

JobState = Literal["queued", "preparing", "running", "done", "failed", "cancelled"]
TERMINAL: frozenset[JobState] = frozenset({"done", "failed", "cancelled"})


class FragmentSummary(BaseModel):
    """What a person wants to know of one fragment of a plan."""

    index: int
    worker: str
    ops: int
    first_module: str
    last_module: str
    parameters: int = Field(0, description="How many numbers they are.")
    parameter_bytes: int
    flops: int = Field(description="Forward operations for one micro-batch.")
    backward_flops: int = Field(0, description="Backward operations for one micro-batch.")
    traffic: dict[int, int] = Field(
        default_factory=dict,
        description="Other fragment -> bytes that the two exchange for one micro-batch, both ways, as their codecs make them.",
    )
    seconds: float | None = Field(
        None,
        description="What its work of a step takes by the figures that its worker gave of itself; null after a loss.",
    )


class PartialStep(BaseModel):
    """A step that some of the job's fragments have finished."""

    fragments: list[int] = Field(default_factory=list)
    loss: float | None = None
    gradient_norm: float | None = None
    eval_loss: float | None = None
    sent_bytes: int = 0
    seconds: list[float] = Field(default_factory=list)
    """What it took, by the clocks of workers."""
    completed_at: float | None = None
    passed_at: float | None = None
    """When something later was known to be done, which all that belongs to this step should have come before."""


class Metric(BaseModel):
    """One finished step: a line of the metrics file."""

    step: int
    loss: float | None
    step_seconds: float
    sent_bytes: int
    tokens: int | None = None
    samples: int | None = None
    epoch: int
    gradient_norm: float | None = None
    eval_loss: float | None = None


class Job(BaseModel):
    """A job's record. Times are seconds since the epoch."""

    id: str
    number: int = Field(description="Order of submission.")
    spec: JobSpec
    dag: BlobRef
    weights: BlobRef
    data: DataManifest
    train: TrainConfig
    origin_step: int = 0
    origin_optimizer: BlobRef | None = None
    """A job that resumes another's checkpoint starts after `origin_step` with this optimiser state."""

    state: JobState = "queued"
    reason: str = ""
    submitted_at: float = 0.0
    started_at: float | None = None
    finished_at: float | None = None

    step: int = 0
    """Last step that was reported; each step is reported once, whatever is run again."""
    loss: float | None = None
    first_loss: float | None = None
    step_seconds: float | None = None
    sent_bytes: int = 0

    epoch: int = 0
    attempt: int = 0
    """Counts the requests for a plan, so that a late answer to an old one is recognised."""
    plan: Plan | None = None
    planning: bool = False
    recut: bool = False
    """The next plan need not keep the cuts of this one."""
    fragments: list[FragmentSummary] = Field(default_factory=list)
    checkpoint: int | None = None
    refused_for: list[str] | None = None
    """Incarnations of the workers for which the last plan was refused; asked again only for others."""

    refused_reason: str = ""

    hosts: dict[str, str] = Field(default_factory=dict)
    """Worker name -> incarnation, of the workers that take part in this job."""
    ready: list[str] = Field(default_factory=list)
    finished: list[str] = Field(default_factory=list)
    partial: dict[int, PartialStep] = Field(default_factory=dict)
    parts: dict[int, dict[int, BlobRef]] = Field(default_factory=dict)
    """Step -> fragment -> its uploaded state, of checkpoints that are not written yet."""
    writing: list[int] = Field(default_factory=list)
    last_completion: float | None = None

    run: Run | None = None
    recoveries: int = 0
    """Losses of workers after which the others went on."""
    restarts: int = 0
    """Times that the job went back to a checkpoint or to its start."""
    commits: int = 0
    """Common snapshots that were complete."""
    checks_drawn: int = 0
    """Spot checks that were drawn; of these:"""
    checks_passed: int = 0
    checks_failed: int = 0
    accusations: list[tuple[str, str]] = Field(default_factory=list)
    """Pairs of workers (host, checker) that said different things of the same work (`coordinator.life.accusations`)."""

    @property
    def checks_void(self) -> int:
        """Spot checks that could not be made, or not to the end."""
        inspection = self.run.inspection if self.run is not None else None
        under_way = len(inspection.checks) if inspection is not None and inspection.epoch == self.epoch else 0
        return max(0, self.checks_drawn - self.checks_passed - self.checks_failed - under_way)

    @property
    def terminal(self) -> bool:
        return self.state in TERMINAL

    @property
    def restart_step(self) -> int:
        """The step after which the job goes on if it has to start again now."""
        return self.checkpoint if self.checkpoint is not None else self.origin_step

    def whole(self, step: int) -> bool:
        """Whether the checkpoint of `step` is collected, and not written yet."""
        return self.plan is not None and len(self.parts.get(step, {})) == len(self.plan.placement)

    @property
    def samples_per_step(self) -> int:
        return self.train.micro_batches * self.train.micro_batch_size

    @property
    def tokens_per_step(self) -> int | None:
        if self.data.kind != "tokens" or self.data.sequence_length is None:
            return None
        return self.samples_per_step * self.data.sequence_length

    def forget_run(self) -> None:
        """Drop what belongs to one epoch: hosts, reports and parts that no longer count."""
        self.hosts = {}
        self.ready = []
        self.finished = []
        self.partial = {}
        self.parts = {step: parts for step, parts in self.parts.items() if step in self.writing}
        self.last_completion = None
        self.planning = False
        self.run = None
