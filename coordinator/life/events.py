"""What can happen to the pool and its jobs (events, past tense), and what must then be done (instructions, imperative).

Events go into `coordinator.life.lifecycle.Lifecycle.handle`; instructions come out and are carried out at the edge.
"""

from __future__ import annotations

from dataclasses import dataclass, field

from coordinator.life.jobs import FragmentSummary, Job, Metric
from coordinator.life.pool import Member
from fusion.messages import BlobRef, PeerAddress, ToCoordinator, ToWorker
from fusion.plan import Plan

# Events -----------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class WorkerJoined:
    """A worker process passed the join checks; its name is not live in another incarnation."""

    time: float
    member: Member


@dataclass(frozen=True, slots=True)
class Reported:
    """A message of the control channel arrived from this incarnation."""

    time: float
    incarnation: str
    message: ToCoordinator


@dataclass(frozen=True, slots=True)
class DrainRequested:
    """A person asked that this worker leaves in good order."""

    time: float
    worker: str


@dataclass(frozen=True, slots=True)
class JobSubmitted:
    """A job passed the checks of submission."""

    time: float
    job: Job


@dataclass(frozen=True, slots=True)
class CancelRequested:
    time: float
    job: str


@dataclass(frozen=True, slots=True)
class PlanMade:
    time: float
    job: str
    attempt: int
    plan: Plan
    fragments: tuple[FragmentSummary, ...]
    current_seconds: float | None = None
    """Predicted step time of the placement that a running job has, by the same cost model."""
    fresh_seconds: float | None = None
    """That of a plan which does not keep the cuts."""


@dataclass(frozen=True, slots=True)
class PlanRefused:
    """No plan fits these workers; the job waits for others, or fails when `final`."""

    time: float
    job: str
    attempt: int
    reason: str
    final: bool = False


@dataclass(frozen=True, slots=True)
class PreparationFailed:
    """What the workers need (the checkpoint to go on from, say) could not be put together."""

    time: float
    job: str
    epoch: int
    reason: str


@dataclass(frozen=True, slots=True)
class CheckpointWritten:
    time: float
    job: str
    step: int
    size: int


@dataclass(frozen=True, slots=True)
class CheckpointFailed:
    time: float
    job: str
    step: int
    reason: str


@dataclass(frozen=True, slots=True)
class CheckpointCopied:
    """A copy of a checkpoint is elsewhere as well, or could not be put there: for `reason`."""

    time: float
    job: str
    step: int
    where: str
    reason: str | None = None


@dataclass(frozen=True, slots=True)
class WorkerUnreachable:
    """The worker's data endpoint refuses connections: its process is gone."""

    time: float
    incarnation: str
    unless_heard_after: float | None = None
    """As in the `ProbeWorker` that asked."""


@dataclass(frozen=True, slots=True)
class WorkerGreeted:
    """The worker's data endpoint let the coordinator in, where the worker had come from."""

    time: float
    incarnation: str


@dataclass(frozen=True, slots=True)
class ConnectionClosed:
    """A connection to the control channel was closed. Whose it was is not known."""

    time: float


@dataclass(frozen=True, slots=True)
class NameClaimed:
    """Another process wants to join under the name of this incarnation."""

    time: float
    incarnation: str


@dataclass(frozen=True, slots=True)
class ClockTicked:
    time: float


Event = (
    WorkerJoined
    | Reported
    | DrainRequested
    | JobSubmitted
    | CancelRequested
    | PlanMade
    | PlanRefused
    | PreparationFailed
    | CheckpointWritten
    | CheckpointFailed
    | CheckpointCopied
    | WorkerUnreachable
    | WorkerGreeted
    | ConnectionClosed
    | NameClaimed
    | ClockTicked
)

# Instructions -----------------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Send:
    """Send this to the worker's incarnation."""

    incarnation: str
    message: ToWorker


@dataclass(frozen=True, slots=True)
class ServeTickets:
    """The coordinator's own relay takes these tickets (with their secrets) from now on, and no others."""

    tickets: dict[str, str] = field(repr=False)


@dataclass(frozen=True, slots=True)
class MakePlan:
    """Ask the scheduler for a plan over these workers; answer with `PlanMade` or `PlanRefused`."""

    job: str
    attempt: int
    workers: tuple[str, ...]
    previous: Plan | None
    """The plan whose cuts and codecs are kept when the job has run before: they decide the bits."""
    slower: dict[str, float] = field(default_factory=dict)
    """Worker -> how many times slower it has become than it was."""
    price: bool = False
    """Also predict the step time of `previous`."""
    recut: bool = False
    """Also predict the step time of a plan with other cuts."""


@dataclass(frozen=True, slots=True)
class PrepareWorkers:
    """Send `Prepare` to these hosts, to go on after `checkpoint` (a step of this job; None: from its own weights)."""

    job: str
    epoch: int
    plan: Plan
    peers: tuple[PeerAddress, ...]
    hosts: tuple[str, ...]
    """Incarnations."""
    checkpoint: int | None
    backups: dict[int, str]
    joining: bool = False
    """They join a running job and have no fragments yet."""


@dataclass(frozen=True, slots=True)
class ProbeWorker:
    """Find out whether the worker still listens; answer with `WorkerUnreachable` if connections are refused."""

    worker: str
    incarnation: str
    endpoint: str
    unless_heard_after: float | None = None
    """It is asked only because it was silent until then: that may wait for its turn, and a word from it settles it."""


@dataclass(frozen=True, slots=True)
class WriteCheckpoint:
    """Consolidate these parts; answer with `CheckpointWritten` or `CheckpointFailed`."""

    job: str
    step: int
    parts: dict[int, BlobRef]
    keep: int


@dataclass(frozen=True, slots=True)
class SaveJob:
    job: str
    announce: bool = True
    """Whether watchers want to hear of it (progress of a step is announced by its metric)."""
    soon: bool = False
    """It may wait for the next tick: workers say again what a coordinator that dies meanwhile has heard last."""


@dataclass(frozen=True, slots=True)
class SavePlan:
    job: str
    plan: Plan


@dataclass(frozen=True, slots=True)
class SaveWorker:
    worker: str


@dataclass(frozen=True, slots=True)
class RecordMetric:
    job: str
    metric: Metric


@dataclass(frozen=True, slots=True)
class RecordEvent:
    """Tell the story to people."""

    job: str | None
    event: str
    message: str
    fields: dict[str, str | int | float | None] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class DropBlobs:
    """These uploads are of no use any more."""

    digests: tuple[str, ...]


@dataclass(frozen=True, slots=True)
class RecordLog:
    job: str | None
    worker: str
    message: str


Instruction = (
    Send
    | ServeTickets
    | MakePlan
    | PrepareWorkers
    | ProbeWorker
    | WriteCheckpoint
    | SaveJob
    | SavePlan
    | SaveWorker
    | RecordMetric
    | RecordEvent
    | RecordLog
    | DropBlobs
)
