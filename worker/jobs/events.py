"""What the compute thread of a job is told by other threads, through its queue."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from fusion.messages import Backup, Commit
from fusion.plan import Plan
from fusion.wire import Header
from worker.jobs.assembly import Piece
from worker.jobs.rerun import Examine
from worker.jobs.spot_checks import Testify
from worker.transport.arrival import Arrival


@dataclass(frozen=True, slots=True)
class Arrived:
    """A message of a peer, admitted and decoded."""

    header: Header
    sender: str
    value: Arrival
    at: float = 0.0
    digest: str = ""
    """Where there are spot checks."""


@dataclass(frozen=True, slots=True)
class Switch:
    """Follow this plan; the pieces are those of the fragments that are new here, their state that after `step`."""

    plan: Plan
    step: int
    pieces: Mapping[int, Piece]


@dataclass(frozen=True, slots=True)
class Spoilt:
    """A value of a peer that had to be refused."""

    header: Header
    sender: str
    why: str


@dataclass(frozen=True, slots=True)
class PeerBack:
    """The connection to a peer broke and stands again: what was on its way between us may be lost."""

    peer: str


Event = Arrived | Spoilt | PeerBack | Switch | Backup | Commit | Testify | Examine | Exception | None
