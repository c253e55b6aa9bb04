"""The JSON of what is seen of jobs and links beyond their records: curves, timelines, plans, crossings, the map of the pool."""

from __future__ import annotations

from typing import Literal

from pydantic import BaseModel, ConfigDict, Field

from coordinator.life.jobs import FragmentSummary
from coordinator.shown.views import ShownPlan


class SpreadView(BaseModel):
    """A value in each bucket; null where it has none."""

    low: list[float | None]
    high: list[float | None]
    mean: list[float | None]


class StretchView(BaseModel):
    """Steps that ran under one plan epoch."""

    epoch: int
    first_step: int
    steps: int
    mean_step_seconds: float


class CurvesView(BaseModel):
    """A job's metrics in at most 1024 buckets of `width` steps each."""

    last: int = Field(description="The last step that is in them.")
    width: int
    first_step: list[int] = Field(description="Of each bucket.")
    last_step: list[int]
    values: dict[Literal["loss", "step_seconds", "sent_bytes", "gradient_norm", "eval_loss"], SpreadView]
    stretches: list[StretchView]


class SpanView(BaseModel):
    """A task, or what travelled between two. Seconds after the timeline's origin, by the coordinator's clock."""

    worker: str = Field(description="Where it ran or arrived.")
    kind: Literal["forward", "backward", "weights", "update", "evaluate", "activation", "gradient"]
    fragment: int = Field(description="That ran, or that made what arrived.")
    micro_batch: int
    step: int
    begin: float
    end: float
    sender: str | None = Field(description="The worker that an activation or gradient came from.")


class TracedStep(BaseModel):
    step: int
    epoch: int
    begin: float
    end: float


class ShareView(BaseModel):
    """A worker's seconds in a mean step, over its last reports."""

    worker: str
    forward: float
    backward: float
    update: float
    idle: float
    step_seconds: float


class TimelineView(BaseModel):
    """The last steps that all workers of a job traced; they do so for two steps in eight, and for every slow one."""

    origin: float = Field(0.0, description="Seconds since the epoch.")
    steps: list[TracedStep]
    workers: list[str]
    spans: list[SpanView]
    shares: list[ShareView]
    bubble: float | None = Field(description="Idle share of all workers' time over the last reports.")


class PlanView(BaseModel):
    """A plan that the job has had."""

    plan: ShownPlan
    fragments: list[FragmentSummary]
    first_step: int | None = Field(description="The first recorded step under it.")
    steps: int
    mean_step_seconds: float | None


class PlanHistory(BaseModel):
    plans: list[PlanView] = Field(description="By epoch.")


class CrossingView(BaseModel):
    """What one edge of the plan sends over a link in a step."""

    edge: int
    kind: Literal["activation", "parameter", "gradient"]
    op: str
    shape: list[int]
    dtype: str
    codec: str
    plain_bytes: int
    wire_bytes: int = Field(description="As the codec makes it, headers not counted.")


class JobLinkView(BaseModel):
    """One direction between two workers of a job."""

    model_config = ConfigDict(populate_by_name=True)

    sender: str = Field(alias="from")
    to: str
    codecs: list[str]
    plain_bytes: int = Field(description="In a step, if nothing were compressed.")
    wire_bytes: int = Field(description="In a step, as the codecs make it.")
    measured_bytes: float | None = Field(
        description="In a step, as the sender counted it lately; headers and snapshots count too."
    )
    bytes_per_second: float
    edges: list[CrossingView]


class JobLinks(BaseModel):
    links: list[JobLinkView]


class GroupView(BaseModel):
    """Workers that stand together: a region of the topology, or a fence found from what was measured."""

    name: str
    kind: Literal["region", "fence", "pool"]
    workers: list[str]


class BetweenView(BaseModel):
    """What is known of the links between two groups, or within one: medians."""

    model_config = ConfigDict(populate_by_name=True)

    sender: str = Field(alias="from")
    to: str
    seconds: float
    bytes_per_second: float
    source: str
    relay: str | None = Field(description="Who offers the relays that some of the links go over.")


class RelayedView(BaseModel):
    """Two workers that can't reach each other, and meet at a relay."""

    model_config = ConfigDict(populate_by_name=True)

    sender: str = Field(alias="from")
    to: str
    relay: str = Field(description="Who offers the relay: the coordinator, or a worker.")


class PoolMap(BaseModel):
    groups: list[GroupView]
    between: list[BetweenView]
    relayed: list[RelayedView]
