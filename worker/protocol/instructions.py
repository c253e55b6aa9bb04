"""What a session of a job wants done, in the order in which it says so."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Generic, TypeVar

from fusion.wire import Header
from worker.protocol.replay_log import Parcel

P = TypeVar("P", bound=Parcel)


@dataclass(frozen=True, slots=True)
class Send(Generic[P]):
    """Send this to a peer; without parcel it is the header alone."""

    to: str
    header: Header
    parcel: P | None = None


@dataclass(frozen=True, slots=True)
class TakeSnapshot:
    """Take the fragment's state, which is that after `step`, and send it to its backup worker."""

    fragment: int
    step: int
    to: str


@dataclass(frozen=True, slots=True)
class MissBackup:
    """The order to take a snapshot after `step` came too late for this fragment."""

    fragment: int
    step: int


@dataclass(frozen=True, slots=True)
class ReportStep:
    """All fragments here are through with the updates of `step`; these ran it here."""

    step: int
    fragments: tuple[int, ...]


@dataclass(frozen=True, slots=True)
class SayPaused:
    """Everything of `step` is done here, evaluation included, and nothing later will begin."""

    step: int


@dataclass(frozen=True, slots=True)
class LendParameters:
    """Emit the fragment's lent parameters for `step`."""

    fragment: int
    step: int


@dataclass(frozen=True, slots=True)
class SayCaughtUp:
    """The fragments that were adopted last stand where the others do, after replaying `steps` steps."""

    fragments: tuple[int, ...]
    steps: int


Instruction = Send[P] | TakeSnapshot | MissBackup | ReportStep | SayPaused | LendParameters | SayCaughtUp
