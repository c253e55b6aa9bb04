"""The control channel itself: what may travel each way, as msgpack maps, and how it is read."""

from __future__ import annotations

from typing import Annotated, Any

import msgpack
from pydantic import BaseModel, Field, TypeAdapter, ValidationError

from fusion.errors import FrameError
from fusion.messages.checks import Check, CheckVoid, Receipts, Replayed
from fusion.messages.links import Arrivals, ExpectProbe, LinkMeasured, ProbeLink
from fusion.messages.orders import Adopt, Backup, Commit, Connect, Prepare, Shutdown, Start, Stop
from fusion.messages.relay import Reached, ServeRelay, TryDirect, Unreached, UseRelay
from fusion.messages.reports import (
    Adopted,
    BackupFailed,
    CantAdopt,
    CaughtUp,
    CheckpointPart,
    Connected,
    EvaluationReport,
    Failure,
    Finished,
    Heartbeat,
    Holding,
    Leaving,
    Paused,
    PeerLost,
    Ready,
    StepReport,
    Warned,
)

MAX_MESSAGE_BYTES = 64 * 2**20

ToWorker = Annotated[
    Prepare
    | Start
    | Backup
    | Commit
    | Adopt
    | Check
    | Connect
    | ExpectProbe
    | ProbeLink
    | UseRelay
    | TryDirect
    | ServeRelay
    | Stop
    | Shutdown,
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
    | Receipts
    | Replayed
    | CheckVoid
    | Finished
    | Failure
)
"""What workers say of one job at one plan epoch."""
ToCoordinator = Annotated[
    Heartbeat | JobMessage | PeerLost | Connected | LinkMeasured | Arrivals | Unreached | Reached | Warned | Leaving,
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
