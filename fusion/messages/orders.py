"""What the coordinator tells a worker to do."""

from __future__ import annotations

from typing import Literal

from pydantic import Field

from fusion.messages.base import Message
from fusion.messages.job_data import BlobRef, DataManifest, Resume, TrainConfig
from fusion.messages.pool import PeerAddress
from fusion.plan import Plan


class Prepare(Message):
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
    verify: bool = False
    """There may be spot checks: keep receipts of what comes in, and log what stays on the worker too."""


class Backup(Message):
    """Coordinator -> host: after the update of `step`, send each fragment's snapshot to its backup worker.

    With `hold`, begin no step after that one until an `Adopt` comes, and say `Paused` when everything of `step` is done.
    With `log_own`, log what fragments of this worker make for each other after `step` too: some of them move, and replay it.
    """

    type: Literal["backup"] = "backup"
    job: str
    epoch: int
    step: int = Field(ge=1)
    backups: dict[int, str]
    hold: bool = False
    log_own: bool = False
    again: bool = False
    """Said before; a host that heard it has nothing more to do."""
    seconds: float = Field(default=0.0, ge=0.0, allow_inf_nan=False)
    """Over which each snapshot is to be spread, so that the training's own messages meet less of it; 0: as fast as it goes."""


class Commit(Message):
    """Coordinator -> worker: every fragment's snapshot of `step` is held, and everybody is through with that step.

    Older snapshots and what was sent up to `step` will not be asked for any more.
    """

    type: Literal["commit"] = "commit"
    job: str
    epoch: int
    step: int


class Adopt(Message):
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


class Connect(Message):
    """Coordinator -> worker: admit and connect to these workers too, they may get fragments soon."""

    type: Literal["connect"] = "connect"
    job: str
    peers: list[PeerAddress]


class Start(Message):
    """Coordinator -> worker: everybody is ready, train."""

    type: Literal["start"] = "start"
    job: str
    epoch: int


class Stop(Message):
    """Coordinator -> worker: forget this job."""

    type: Literal["stop"] = "stop"
    job: str
    reason: str


class Shutdown(Message):
    """Coordinator -> worker: leave the pool; `evicted` when the worker was declared lost and must join anew."""

    type: Literal["shutdown"] = "shutdown"
    reason: str
    evicted: bool = False
