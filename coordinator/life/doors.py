"""Who may be gone without anybody having said so: the silent ones, when a connection was closed or their name is wanted.

None is lost by silence before its timeout; only its own door can say that its process is gone. A door counts only where
the coordinator has been let in before: a worker behind address translation may live, and another refuse at its address.
Sans-I/O.
"""

from __future__ import annotations

import math

from coordinator.life import events as ev
from coordinator.life.books import Books
from coordinator.life.pool import Member

_AGAIN_SECONDS = 3.0
"""Between two knocks at one door; more than a knock takes."""


class Doors:
    """Whose silence is looked into."""

    def __init__(self, books: Books) -> None:
        self._books = books
        self._closed: float | None = None
        """When a connection was closed, if that is since the last tick."""
        self._watched: dict[str, float] = {}
        """Incarnation -> since when it may be gone."""
        self._knocked: dict[str, float] = {}

    def connection_closed(self, now: float) -> None:
        """Some worker's connection was closed; strangers may close many, so this costs nothing."""
        self._closed = now

    def claimed(self, member: Member, now: float) -> None:
        """Somebody wants to join under this name."""
        if not self.lives(member, now):
            self._watched.setdefault(member.incarnation, now)
            self._look(member, now)

    def tick(self, now: float) -> None:
        if self._closed is not None:
            for other in self._books.pool.live():
                self._watched.setdefault(other.incarnation, self._closed)
            self._closed = None
        quiet_after = self._books.timing.quiet_after
        for incarnation, since in list(self._watched.items()):
            member = self._books.pool.of_incarnation(incarnation)
            # What was said before a connection closed may be taken in after it, so a first word does not settle it.
            if member is None or not member.live or member.last_heard >= since + quiet_after:
                del self._watched[incarnation]
                self._knocked.pop(incarnation, None)
            else:
                self._look(member, now)

    def lives(self, member: Member, now: float) -> bool:
        """Whether the worker has been heard within a few heartbeats."""
        return now - member.last_heard < self._books.timing.quiet_after

    def refuted(self, member: Member, event: ev.WorkerUnreachable) -> bool:
        """Whether the worker has been heard since its door was asked because it had not been."""
        return event.unless_heard_after is not None and member.last_heard > event.unless_heard_after

    def _look(self, member: Member, now: float) -> None:
        """Knock, if the worker is silent and its door can tell why."""
        # At a worker's own door that others can't reach, somebody else may stand.
        if self.lives(member, now) or not member.greeted or self._books.relays.hides(member.name):
            return
        if now - self._knocked.get(member.incarnation, -math.inf) >= _AGAIN_SECONDS:
            self._knocked[member.incarnation] = now
            self._books.do(ev.ProbeWorker(member.name, member.incarnation, member.endpoint, now))
