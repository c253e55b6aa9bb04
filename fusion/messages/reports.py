"""What a worker tells the coordinator."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field, FiniteFloat

from fusion.messages.base import Detail, Message, Words
from fusion.messages.job_data import BlobRef

MAX_TRACED = 2000
"""Tasks of one worker's step; a step with more is not traced."""


class Heartbeat(Message):
    type: Literal["heartbeat"] = "heartbeat"
    incarnation: str
    memory_used_bytes: int = 0
    refused: int = Field(
        0, ge=0, lt=2**63, description="Messages of its peers that it has refused since it was started."
    )


class Ready(Message):
    """Worker -> coordinator: fragments are built, parameters loaded, peers connected."""

    type: Literal["ready"] = "ready"
    job: str
    epoch: int
    fetched_bytes: int = 0


Seconds = Annotated[float, Field(ge=0, allow_inf_nan=False)]


class FragmentTimes(Message):
    """Seconds that a fragment spent in one step."""

    fragment: int
    forward: Seconds
    backward: Seconds
    update: Seconds


class StepTrace(Message):
    """When a worker's tasks of one step ran and what they needed arrived, in seconds after `begun`, for people to look at."""

    begun: FiniteFloat
    """Seconds since the epoch, by the worker's clock."""
    told: FiniteFloat
    """When this was put together: whoever receives it can set the clocks against each other."""
    tasks: list[
        tuple[Literal["forward", "backward", "weights", "update", "evaluate"], int, int, FiniteFloat, FiniteFloat]
    ] = Field(max_length=MAX_TRACED)
    """(kind, fragment, micro-batch, begin, end)."""
    arrivals: list[tuple[Literal["activation", "gradient"], int, int, FiniteFloat, str]] = Field(
        default_factory=list, max_length=MAX_TRACED
    )
    """(kind, the fragment that made it, micro-batch, when, by which worker)."""


class StepReport(Message):
    """Worker -> coordinator: all my fragments finished `step` (from 1)."""

    type: Literal["step"] = "step"
    job: str
    epoch: int
    step: int
    fragments: list[FragmentTimes]
    loss: float | None = None
    """Mean of the micro-batch losses, from the worker that hosts the loss."""
    gradient_norm: float | None = None
    sent_bytes: int = 0
    """Wire bytes that this worker sent to its peers during the step."""
    sent_to: dict[str, int] = Field(default_factory=dict)
    seconds: float | None = Field(default=None, ge=0.0, allow_inf_nan=False)
    """Since this worker was through with the step before; None when that is not known, or it has been further already."""
    wait_seconds: float = 0.0
    memory_used_bytes: int = 0
    log_bytes: int = 0
    """Held in the replay log after the step."""
    trace: StepTrace | None = None
    """Of some steps."""


class EvaluationReport(Message):
    """Worker -> coordinator: mean loss over the held-out micro-batches after `step` steps."""

    type: Literal["evaluation"] = "evaluation"
    job: str
    epoch: int
    step: int
    loss: float
    batches: int


class CheckpointPart(Message):
    """Worker -> coordinator: one fragment's state after `step` steps is in this blob (safetensors).

    Keys: `parameter/NAME`, `buffer/NAME`, `optimizer/SLOT/NAME` for the optimiser's tensors, and `feedback/...`
    (`worker.jobs.feedback`).
    """

    type: Literal["checkpoint-part"] = "checkpoint-part"
    job: str
    epoch: int
    step: int
    fragment: int
    blob: BlobRef


class Finished(Message):
    """Worker -> coordinator: all steps of the job are done here and its last state is uploaded."""

    type: Literal["finished"] = "finished"
    job: str
    epoch: int


class Holding(Message):
    """Backup worker -> coordinator: this fragment's snapshot after `step` is here, whole and verified."""

    type: Literal["holding"] = "holding"
    job: str
    epoch: int
    step: int
    fragment: int
    bytes: int = 0


class BackupFailed(Message):
    """Worker -> coordinator: the snapshot after `step` can't be taken or kept (`passed` when the order came too late), or, with
    `memory` and whatever step, the fragment not be built by whom it is backed up to.
    """

    type: Literal["backup-failed"] = "backup-failed"
    job: str
    epoch: int
    step: int
    fragment: int
    cause: Literal["passed", "corrupt", "memory"]
    message: Words = ""


class Paused(Message):
    """Host -> coordinator: everything of `step` is done here and nothing after it will begin."""

    type: Literal["paused"] = "paused"
    job: str
    epoch: int
    step: int


class Adopted(Message):
    """Worker -> coordinator: I follow the plan of this epoch; `fragments` were installed here for it."""

    type: Literal["adopted"] = "adopted"
    job: str
    epoch: int
    fragments: list[int] = Field(default_factory=list)


class CantAdopt(Message):
    """Worker -> coordinator: I can't take over a fragment that the plan of this epoch gives me."""

    type: Literal["cant-adopt"] = "cant-adopt"
    job: str
    epoch: int
    message: Words


class CaughtUp(Message):
    """Worker -> coordinator: the fragments adopted in this epoch have replayed `steps` steps and stand where the others do."""

    type: Literal["caught-up"] = "caught-up"
    job: str
    epoch: int
    fragments: list[int]
    steps: int
    seconds: float


class PeerLost(Message):
    """Worker -> coordinator: the connection to this peer has just been closed from the other side."""

    type: Literal["peer-lost"] = "peer-lost"
    job: str
    peer: str


class Connected(Message):
    """Worker -> coordinator: `Connect` is done for these workers."""

    type: Literal["connected"] = "connected"
    job: str
    peers: list[str]


class Failure(Message):
    """Worker -> coordinator: I can't go on with this job."""

    type: Literal["failure"] = "failure"
    job: str
    epoch: int
    message: Words
    detail: Detail = ""


class Warned(Message):
    """Worker -> coordinator: something odd that a person should see, said once (a refused frame, say)."""

    type: Literal["warned"] = "warned"
    job: str | None = None
    message: Words


class Leaving(Message):
    """Worker -> coordinator: I am going away in good order."""

    type: Literal["leaving"] = "leaving"
    reason: Words
