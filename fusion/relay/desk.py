"""Who may pass through a relay, who waits for whom, and whose time is over. Sans I/O: connections are numbers, time comes in.

::

    arrived ──ticket shown──> waiting ──other end came──> joined
       │                         │                          │
       └── refused, or late      └── late, or gone          └── one end gone, silent for long, or its ticket taken back
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

from fusion.relay.handshake import Role


@dataclass(frozen=True, slots=True)
class Limits:
    """What strangers and ticket holders can take of a relay at most. Seconds, and numbers of connections."""

    arrived: int = 64
    """Connections that have not shown a ticket yet."""
    arrived_seconds: float = 5.0
    per_ticket: int = 8
    """Connections of one ticket, both ends together: those of a job and of a probe, and one that waits for the next."""
    connections: int = 1024
    waiting_seconds: float = 60.0
    """Whoever waits longer connects again: routers forget connections on which nothing happens."""
    silent_seconds: float = 300.0


@dataclass(slots=True)
class _Connection:
    since: float
    ticket: bytes | None = None
    role: Role = "call"
    partner: int | None = None


@dataclass
class Desk:
    """The state of one relay."""

    limits: Limits = field(default_factory=Limits)
    tickets: dict[bytes, bytes] = field(default_factory=dict, repr=False)
    """Ticket -> secret."""
    refused: int = 0
    _connections: dict[int, _Connection] = field(default_factory=dict)

    @property
    def joined(self) -> int:
        """Streams that are up."""
        return sum(each.partner is not None for each in self._connections.values()) // 2

    def __len__(self) -> int:
        return len(self._connections)

    def allow(self, tickets: Mapping[bytes, bytes]) -> list[int]:
        """From now on these tickets count and no others; returns the connections of those that don't any more."""
        self.tickets = dict(tickets)
        return [
            number
            for number, each in self._connections.items()
            if each.ticket is not None and each.ticket not in self.tickets
        ]

    def arrived(self, number: int, now: float) -> bool:
        """A connection was opened: whether there is room for it."""
        unknown = sum(each.ticket is None for each in self._connections.values())
        if unknown >= self.limits.arrived or len(self._connections) >= self.limits.connections:
            self.refused += 1
            return False
        self._connections[number] = _Connection(now)
        return True

    def showed(self, number: int, ticket: bytes, role: Role, now: float) -> int | None:
        """It holds this ticket: returns who it is joined with; None when it waits. Raises `PermissionError`."""
        mine = self._connections[number]
        same = {other: each for other, each in self._connections.items() if each.ticket == ticket}
        if len(same) >= self.limits.per_ticket:
            self.refused += 1
            raise PermissionError("the ticket has too many connections")
        mine.ticket, mine.role, mine.since = ticket, role, now
        for other, each in same.items():
            if each.partner is None and each.role != role:
                mine.partner, each.partner = other, number
                each.since = now
                return other
        return None

    def denied(self, number: int) -> None:
        """It showed no ticket that counts."""
        self.refused += 1
        self.gone(number)

    def moved(self, number: int, now: float) -> None:
        """Bytes came from this connection."""
        mine = self._connections.get(number)
        if mine is not None:
            mine.since = now

    def gone(self, number: int) -> int | None:
        """The connection is closed; returns the one that must close with it."""
        mine = self._connections.pop(number, None)
        if mine is None or mine.partner is None:
            return None
        other = self._connections.get(mine.partner)
        return mine.partner if other is not None else None

    def overdue(self, now: float) -> list[int]:
        """Connections whose time is over. A stream is silent when nothing comes from either end."""
        return [number for number, each in self._connections.items() if now - self._since(each) > self._patience(each)]

    def _since(self, each: _Connection) -> float:
        other = self._connections.get(each.partner) if each.partner is not None else None
        return each.since if other is None else max(each.since, other.since)

    def _patience(self, each: _Connection) -> float:
        if each.ticket is None:
            return self.limits.arrived_seconds
        return self.limits.waiting_seconds if each.partner is None else self.limits.silent_seconds
