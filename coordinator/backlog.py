"""What waits while nothing can be recorded: events, and messages to workers that follow from what is not on record yet.

Time stands still for the life cycle meanwhile: it hears of nothing, so that nobody is missed and no patience ends.
"""

from __future__ import annotations

from collections import OrderedDict

from coordinator.life import events as ev
from fusion.errors import ServiceError
from fusion.messages import Heartbeat, ToWorker


class CantRecordError(ServiceError):
    """What was asked for can't be recorded now, and so is not done; it may be asked for again."""


class Backlog:
    """Events and messages, each in their order. Of a worker's heartbeats only the last is kept."""

    def __init__(self) -> None:
        self._events: OrderedDict[object, ev.Event] = OrderedDict()
        self._messages: list[tuple[str, ToWorker]] = []

    def __len__(self) -> int:
        """How many events wait."""
        return len(self._events)

    def hold(self, event: ev.Event) -> None:
        """Keep an event for later. That time has passed is not kept."""
        if isinstance(event, ev.ClockTicked):
            return
        key: object = object()
        if isinstance(event, ev.Reported) and isinstance(event.message, Heartbeat):
            key = event.incarnation
            self._events.pop(key, None)
        self._events[key] = event

    def next(self) -> ev.Event | None:
        """Take the event out that has waited longest."""
        return self._events.popitem(last=False)[1] if self._events else None

    def hold_message(self, incarnation: str, message: ToWorker) -> None:
        """Keep a message to a worker until what it follows from is on record."""
        self._messages.append((incarnation, message))

    def messages(self) -> list[tuple[str, ToWorker]]:
        """Take all messages out."""
        found, self._messages = self._messages, []
        return found
