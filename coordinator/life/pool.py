"""Pool membership: who has joined, who is busy with which job, who has gone silent.

::

    joined ──first message──> idle <──released── busy
       │                       │ ──────taken────> │
       │                       └──drain──> left   └──drain──> draining ──job moved or over──> left
       └────────────── silence longer than the timeout ──────────────> lost

Each process start of a worker is a new incarnation; a name is live in at most one incarnation. Sans-I/O: time comes in
as an argument.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Literal

from pydantic import BaseModel

from fusion.messages import Device, PeerAddress

MemberState = Literal["joined", "idle", "busy", "draining", "lost", "left"]
LIVE: frozenset[MemberState] = frozenset({"joined", "idle", "busy", "draining"})
_GROWN = 1.2
"""A process that trains takes about so many times what it takes at rest, beside what is planned for: code that it has not
needed before, messages on their way."""


class Member(BaseModel):
    """One incarnation of one worker. Times are seconds since the epoch."""

    name: str
    incarnation: str
    device: Device
    endpoint: str
    public_key: str
    fusion_version: str = ""
    torch_version: str = ""
    slower: float = 1.0
    """How many times slower its tasks are than by what it says of itself."""
    probes: bool = False
    """It measures its links when it is asked to."""
    relay_port: int = 0
    """Where it offers a relay to others, on the host of its endpoint; 0: it does not."""
    state: MemberState = "joined"
    job: str | None = None
    joined_at: float = 0.0
    last_heard: float = 0.0
    excused_until: float = 0.0
    """Its silence before this time is nobody's fault: the coordinator itself was away, or did not listen."""
    greeted: bool = False
    """The coordinator has been let in at its data port: a refusal there says that its process is gone."""
    memory_used_bytes: int = 0
    own_bytes: int = 0
    """What its process takes without a job: no fragment can have that."""
    refused: int = 0
    """Messages of its peers that it has refused."""
    moving: bool = False
    """A draining member waits until its fragments have moved; otherwise for a checkpoint of its job."""
    barred: str = ""
    """Why it was evicted; whoever has its name or key may not join again."""
    leave_by: float | None = None
    """A draining member's job goes back to its checkpoint at this time, if its fragments have not moved before."""

    @property
    def live(self) -> bool:
        return self.state in LIVE

    def silence(self, now: float) -> float:
        """Seconds of silence that count against it."""
        return now - max(self.last_heard, self.excused_until)

    @property
    def room_bytes(self) -> int:
        """What its memory limit leaves for jobs; 0: it has no limit."""
        limit = self.device.memory_bytes
        return max(1, limit - round(_GROWN * self.own_bytes)) if limit else 0

    @property
    def address(self) -> PeerAddress:
        """How other workers reach it."""
        return PeerAddress(worker=self.name, endpoint=self.endpoint, public_key=self.public_key)


class Pool:
    """The members by name: the live incarnation, or the last one seen."""

    def __init__(self) -> None:
        self._members: dict[str, Member] = {}
        self._by_incarnation: dict[str, Member] = {}

    def __iter__(self) -> Iterator[Member]:
        return iter(self._members.values())

    def get(self, name: str) -> Member | None:
        return self._members.get(name)

    def of_incarnation(self, incarnation: str) -> Member | None:
        return self._by_incarnation.get(incarnation)

    def put(self, member: Member) -> None:
        """Add a member; it takes the place of an earlier incarnation of the same name, at the end of the order."""
        earlier = self._members.pop(member.name, None)
        if earlier is not None:
            self._by_incarnation.pop(earlier.incarnation, None)
        self._members[member.name] = self._by_incarnation[member.incarnation] = member

    def live(self) -> list[Member]:
        return [member for member in self if member.live]

    def idle(self) -> list[Member]:
        return [member for member in self if member.state == "idle"]

    def of_job(self, job: str) -> list[Member]:
        """Live members that are taken by `job`."""
        return [member for member in self if member.job == job and member.live]

    def silent(self, now: float, timeout: Callable[[Member], float]) -> list[Member]:
        """Live members that were last heard longer ago than their timeout."""
        return [member for member in self if member.live and member.silence(now) > timeout(member)]

    def excuse(self, seconds: float) -> None:
        """Forgive `seconds` of silence: the coordinator itself was not listening."""
        for member in self:
            if member.live:
                member.excused_until = max(member.last_heard, member.excused_until) + seconds
