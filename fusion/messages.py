"""Messages of the control channel between a worker and the coordinator: msgpack maps, validated by pydantic.

The coordinator is not on the hot path: workers tell it that they live, what they finished and what failed; it tells them
what to prepare, when to start and when to stop.
"""

from __future__ import annotations

from typing import Annotated, Any, Literal

import msgpack
from pydantic import BaseModel, ConfigDict, Field, FiniteFloat, TypeAdapter, ValidationError

from fusion.errors import FrameError
from fusion.plan import Plan
from fusion.spec import LrScheduleSpec, OptimizerSpec

MAX_MESSAGE_BYTES = 64 * 2**20
MAX_TRACED = 2000
"""Tasks of one worker's step; a step with more is not traced."""


class _Message(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid")


_Rate = Annotated[float, Field(ge=0, allow_inf_nan=False)]


class Device(_Message):
    """What a worker says of its machine on joining; a rate of 0 was not measured."""

    kind: Literal["cpu", "cuda"] = "cpu"
    description: str = ""
    cores: int = 1
    threads: int = 1
    memory_bytes: int = 0
    flops_per_second: _Rate = Field(0.0, description="Of large matrix products, or of training where it is declared.")
    declared: bool = Field(False, description="The speed was given by a person, not measured.")
    convolution_flops_per_second: _Rate = 0.0
    bytes_per_second: _Rate = Field(0.0, description="Read and written by operators that compute little.")
    training_share: float = Field(
        0.0, ge=0, le=1, description="Of the speed of matrix products and convolutions, what training reaches."
    )
    seconds_per_call: float = Field(0.0, ge=0, le=1, description="Fixed time of an operator call.")


class JoinRequest(_Message):
    """Body of `POST /api/v1/workers`."""

    name: str = Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]{0,63}$")
    protocol_version: int
    fusion_version: str
    torch_version: str
    device: Device
    data_endpoint: str = Field(description="Where peers connect, `tcp://host:port`.")
    public_key: str = Field(description="CURVE public key, Z85.", min_length=40, max_length=40)
    probes: bool = Field(False, description="It measures its links to other workers when it is asked to.")


class JoinResponse(_Message):
    """Answer to a join: how to reach the control channel."""

    worker: str
    incarnation: str
    control_endpoint: str
    control_public_key: str
    heartbeat_seconds: float


class PeerAddress(_Message):
    worker: str
    endpoint: str
    public_key: str


class BlobRef(_Message):
    """A content-addressed blob: `GET /api/v1/blobs/{digest}`, ranges allowed."""

    digest: str = Field(pattern=r"^[0-9a-f]{64}$")
    size: int = Field(ge=0)


class DataManifest(_Message):
    """The data of a job: safetensors blobs and how samples are read from them.

    `arrays`: one tensor per placeholder, first axis the sample. `tokens`: a 1-D tensor `tokens`; sample i is
    `tokens[i*L : i*L + L]` for `inputs` and the same shifted by one for `targets` (L = `sequence_length`).
    Samples `train_samples ..` of the total are held out for evaluation.
    """

    kind: Literal["arrays", "tokens"]
    blob: BlobRef
    samples: int = Field(gt=0)
    train_samples: int = Field(gt=0)
    sequence_length: int | None = None
    feeds: dict[str, Literal["inputs", "targets"] | str] = Field(
        default_factory=dict, description="Placeholder name -> tensor in the blob, or `inputs`/`targets` of tokens."
    )


class TrainConfig(_Message):
    """What a worker needs to know of the spec's `train` section."""

    steps: int = Field(gt=0)
    micro_batches: int = Field(gt=0)
    micro_batch_size: int = Field(gt=0)
    seed: int
    optimizer: OptimizerSpec
    lr_schedule: LrScheduleSpec
    clip_grad_norm: float | None = None
    eval_every: int | None = None
    eval_batches: int = 0
    recompute: bool = False
    checkpoint_every: int | None = None


class Resume(_Message):
    """Start after `step` steps, from these blobs instead of the initial weights."""

    step: int = Field(ge=0)
    optimizer: BlobRef | None = None


class Prepare(_Message):
    """Coordinator -> worker: build your fragments of this plan, then say `Ready`."""

    type: Literal["prepare"] = "prepare"
    job: str
    plan: Plan
    dag: BlobRef
    weights: BlobRef
    data: DataManifest
    train: TrainConfig
    peers: list[PeerAddress]
    resume: Resume | None = None
    failure_timeout: float = 5.0
    backups: dict[int, str] = Field(default_factory=dict)
    """Fragment -> the worker that is to take it over if its host is lost; it builds the fragment ahead of need."""
    log_bytes: int = Field(default=0, ge=0)
    """What the replay log may hold before no further step is begun; 0: nothing is kept for replay."""


class Backup(_Message):
    """Coordinator -> host: after the update of `step`, send each fragment's snapshot to its backup worker.

    With `hold`, begin no step after that one until an `Adopt` comes, and say `Paused` when everything of `step` is done.
    """

    type: Literal["backup"] = "backup"
    job: str
    epoch: int
    step: int = Field(ge=1)
    backups: dict[int, str]
    hold: bool = False


class Commit(_Message):
    """Coordinator -> worker: every fragment's snapshot of `step` is held, and everybody is through with that step.

    Older snapshots and what was sent up to `step` will not be asked for any more.
    """

    type: Literal["commit"] = "commit"
    job: str
    epoch: int
    step: int


class Adopt(_Message):
    """Coordinator -> worker: from now on this plan holds (same cuts and codecs, other placement).

    Fragments that are new here go on after `step`, the common snapshot, and replay what followed; those that stay are
    not disturbed; those that are no longer here are forgotten. Ends a hold.
    """

    type: Literal["adopt"] = "adopt"
    job: str
    plan: Plan
    step: int = Field(ge=0)
    peers: list[PeerAddress]
    """All workers of the plan and all backup workers."""
    backups: dict[int, str] = Field(default_factory=dict)


class Connect(_Message):
    """Coordinator -> worker: admit and connect to these workers too, they may get fragments soon."""

    type: Literal["connect"] = "connect"
    job: str
    peers: list[PeerAddress]


class ExpectProbe(_Message):
    """Coordinator -> worker: this worker is about to measure its link to you; answer it, within these bounds."""

    type: Literal["expect-probe"] = "expect-probe"
    peer: PeerAddress
    max_bytes: int = Field(gt=0, description="In both directions together.")
    seconds: float = Field(gt=0)


class ProbeLink(_Message):
    """Coordinator -> worker: measure the link to this worker, there and back, within these bounds; say `LinkMeasured`."""

    type: Literal["probe-link"] = "probe-link"
    peer: PeerAddress
    max_bytes: int = Field(gt=0)
    seconds: float = Field(gt=0)


class Start(_Message):
    """Coordinator -> worker: everybody is ready, train."""

    type: Literal["start"] = "start"
    job: str
    epoch: int


class Stop(_Message):
    """Coordinator -> worker: forget this job."""

    type: Literal["stop"] = "stop"
    job: str
    reason: str


class Shutdown(_Message):
    """Coordinator -> worker: leave the pool; `evicted` when the worker was declared lost and must join anew."""

    type: Literal["shutdown"] = "shutdown"
    reason: str
    evicted: bool = False


class Heartbeat(_Message):
    type: Literal["heartbeat"] = "heartbeat"
    incarnation: str
    memory_used_bytes: int = 0


class Ready(_Message):
    """Worker -> coordinator: fragments are built, parameters loaded, peers connected."""

    type: Literal["ready"] = "ready"
    job: str
    epoch: int
    fetched_bytes: int = 0


class FragmentTimes(_Message):
    """Seconds that a fragment spent in one step."""

    fragment: int
    forward: float
    backward: float
    update: float


class StepTrace(_Message):
    """When a worker's tasks of one step ran and what they needed arrived, in seconds after `begun`, for people to look at."""

    begun: FiniteFloat
    """Seconds since the epoch, by the worker's clock."""
    told: FiniteFloat
    """When this was put together: whoever receives it can set the clocks against each other."""
    tasks: list[tuple[Literal["forward", "backward", "update", "evaluate"], int, int, FiniteFloat, FiniteFloat]] = (
        Field(max_length=MAX_TRACED)
    )
    """(kind, fragment, micro-batch, begin, end)."""
    arrivals: list[tuple[Literal["activation", "gradient"], int, int, FiniteFloat, str]] = Field(
        default_factory=list, max_length=MAX_TRACED
    )
    """(kind, the fragment that made it, micro-batch, when, by which worker)."""


class LinkFigures(_Message):
    """One direction of a link: n bytes take `seconds + n / bytes_per_second`."""

    seconds: float = Field(ge=0, allow_inf_nan=False)
    bytes_per_second: float = Field(gt=0, allow_inf_nan=False)


class LinkMeasured(_Message):
    """Worker -> coordinator: what `ProbeLink` found out, or why it did not."""

    type: Literal["link-measured"] = "link-measured"
    peer: str
    there: LinkFigures | None = None
    back: LinkFigures | None = None
    error: str = ""


class ArrivalRate(_Message):
    """Bytes per second at which a peer's large messages came in; `at_least` when the link was not what took the time."""

    bytes_per_second: float = Field(gt=0, allow_inf_nan=False)
    at_least: bool = False


class Arrivals(_Message):
    """Worker -> coordinator: what the transfers of a job show of the links to here, by peer."""

    type: Literal["arrivals"] = "arrivals"
    rates: dict[str, ArrivalRate]


class StepReport(_Message):
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
    wait_seconds: float = 0.0
    memory_used_bytes: int = 0
    log_bytes: int = 0
    """Held in the replay log after the step."""
    trace: StepTrace | None = None
    """Of some steps."""


class EvaluationReport(_Message):
    """Worker -> coordinator: mean loss over the held-out micro-batches after `step` steps."""

    type: Literal["evaluation"] = "evaluation"
    job: str
    epoch: int
    step: int
    loss: float
    batches: int


class CheckpointPart(_Message):
    """Worker -> coordinator: one fragment's state after `step` steps is in this blob (safetensors).

    Keys: `parameter/NAME`, `buffer/NAME`, `optimizer/SLOT/NAME` for the optimiser's tensors, and `feedback/...`
    (`worker.feedback`).
    """

    type: Literal["checkpoint-part"] = "checkpoint-part"
    job: str
    epoch: int
    step: int
    fragment: int
    blob: BlobRef


class Finished(_Message):
    """Worker -> coordinator: all steps of the job are done here and its last state is uploaded."""

    type: Literal["finished"] = "finished"
    job: str
    epoch: int


class Holding(_Message):
    """Backup worker -> coordinator: this fragment's snapshot after `step` is here, whole and verified."""

    type: Literal["holding"] = "holding"
    job: str
    epoch: int
    step: int
    fragment: int
    bytes: int = 0


class BackupFailed(_Message):
    """Worker -> coordinator: the snapshot after `step` can't be taken or kept (`passed` when the order came too late)."""

    type: Literal["backup-failed"] = "backup-failed"
    job: str
    epoch: int
    step: int
    fragment: int
    cause: Literal["passed", "corrupt", "memory"]
    message: str = ""


class Paused(_Message):
    """Host -> coordinator: everything of `step` is done here and nothing after it will begin."""

    type: Literal["paused"] = "paused"
    job: str
    epoch: int
    step: int


class Adopted(_Message):
    """Worker -> coordinator: I follow the plan of this epoch; `fragments` were installed here for it."""

    type: Literal["adopted"] = "adopted"
    job: str
    epoch: int
    fragments: list[int] = Field(default_factory=list)


class CantAdopt(_Message):
    """Worker -> coordinator: I can't take over a fragment that the plan of this epoch gives me."""

    type: Literal["cant-adopt"] = "cant-adopt"
    job: str
    epoch: int
    message: str


class CaughtUp(_Message):
    """Worker -> coordinator: the fragments adopted in this epoch have replayed `steps` steps and stand where the others do."""

    type: Literal["caught-up"] = "caught-up"
    job: str
    epoch: int
    fragments: list[int]
    steps: int
    seconds: float


class PeerLost(_Message):
    """Worker -> coordinator: the connection to this peer has just been closed from the other side."""

    type: Literal["peer-lost"] = "peer-lost"
    job: str
    peer: str


class Connected(_Message):
    """Worker -> coordinator: `Connect` is done for these workers."""

    type: Literal["connected"] = "connected"
    job: str
    peers: list[str]


class Failure(_Message):
    """Worker -> coordinator: I can't go on with this job."""

    type: Literal["failure"] = "failure"
    job: str
    epoch: int
    message: str
    detail: str = ""


class Warned(_Message):
    """Worker -> coordinator: something odd that a person should see, said once (a refused frame, say)."""

    type: Literal["warned"] = "warned"
    job: str | None = None
    message: str


class Leaving(_Message):
    """Worker -> coordinator: I am going away in good order."""

    type: Literal["leaving"] = "leaving"
    reason: str


ToWorker = Annotated[
    Prepare | Start | Backup | Commit | Adopt | Connect | ExpectProbe | ProbeLink | Stop | Shutdown,
    Field(discriminator="type"),
]
JobMessage = (
    Ready
    | StepReport
    | EvaluationReport
    | CheckpointPart
    | Holding
    | BackupFailed
    | Paused
    | Adopted
    | CantAdopt
    | CaughtUp
    | Finished
    | Failure
)
"""What workers say of one job at one plan epoch."""
ToCoordinator = Annotated[
    Heartbeat | JobMessage | PeerLost | Connected | LinkMeasured | Arrivals | Warned | Leaving,
    Field(discriminator="type"),
]
_to_worker: TypeAdapter[ToWorker] = TypeAdapter(ToWorker)
_to_coordinator: TypeAdapter[ToCoordinator] = TypeAdapter(ToCoordinator)


def encode(message: BaseModel) -> bytes:
    packed: bytes = msgpack.packb(message.model_dump(mode="python", exclude_none=True))
    return packed


def _unpack(data: bytes) -> Any:
    if len(data) > MAX_MESSAGE_BYTES:
        raise FrameError(f"control message of {len(data)} bytes is larger than {MAX_MESSAGE_BYTES}")
    try:
        return msgpack.unpackb(data, strict_map_key=False)
    except Exception as error:
        raise FrameError(f"control message is not msgpack: {error}") from None


def decode_to_worker(data: bytes) -> ToWorker:
    """Read a message from the coordinator. Raises `FrameError`."""
    try:
        return _to_worker.validate_python(_unpack(data))
    except ValidationError as error:
        raise FrameError(f"bad control message: {error.errors()[0]['msg']}") from None


def decode_to_coordinator(data: bytes) -> ToCoordinator:
    """Read a message from a worker. Raises `FrameError`."""
    try:
        return _to_coordinator.validate_python(_unpack(data))
    except ValidationError as error:
        raise FrameError(f"bad control message: {error.errors()[0]['msg']}") from None
