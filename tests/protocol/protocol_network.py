"""Virtual time, and a network that delays, drops, repeats and reorders, and that is torn apart and healed.

Messages from one party to another arrive in order, unless `reorder` lets data overtake each other (as values that an encoder
thread has at hand do). Control messages are never lost on a connection that stands; one that breaks loses what was under way.
"""

from __future__ import annotations

import heapq
import random
from collections import defaultdict
from collections.abc import Callable
from dataclasses import dataclass, field
from itertools import count

BREAKS_AFTER = 3.0
"""Seconds without answer after which a connection counts as broken."""


class Clock:
    """Virtual seconds: `at` books something, `advance` does the next thing that is due."""

    def __init__(self) -> None:
        self.now = 1000.0
        self._heap: list[tuple[float, int, Callable[[], None]]] = []
        self._number = count()

    def at(self, delay: float, do: Callable[[], None]) -> None:
        heapq.heappush(self._heap, (self.now + delay, next(self._number), do))

    def advance(self) -> bool:
        """Do what is due next; False when nothing is."""
        if not self._heap:
            return False
        due, _, do = heapq.heappop(self._heap)
        self.now = max(self.now, due)
        do()
        return True


@dataclass
class Weather:
    """How bad the network is."""

    latency: float = 0.005
    drop: float = 0.0
    """Share of the data messages that are lost."""
    repeat: float = 0.0
    reorder: float = 0.0
    """Share of the data messages that may be overtaken."""


@dataclass
class Cut:
    """Two parties can't reach each other; what was sent since waits, until the connection breaks."""

    since: float
    waiting: list[tuple[str, Callable[[], None]]] = field(default_factory=list)
    """(receiver, delivery)."""
    broken: bool = False


class Network:
    """Carries deliveries between parties, known by name."""

    def __init__(self, clock: Clock, dice: random.Random) -> None:
        self.clock = clock
        self.weather = Weather()
        self._dice = dice
        self._last: dict[tuple[str, str, str], float] = defaultdict(float)
        self.cuts: dict[frozenset[str], Cut] = {}

    def latency(self) -> float:
        return self.weather.latency * (0.2 + 2 * self._dice.random())

    def cut(self, one: str, other: str) -> None:
        pair = frozenset((one, other))
        if one != other and pair not in self.cuts:
            found = self.cuts[pair] = Cut(self.clock.now)
            self.clock.at(BREAKS_AFTER, lambda: self._break(found))

    def heal(self, one: str, other: str) -> bool:
        """Whether there was a cut that had broken the connection."""
        found = self.cuts.pop(frozenset((one, other)), None)
        if found is None:
            return False
        for _, delivery in found.waiting:
            self.clock.at(0.0, delivery)
        return found.broken

    def apart(self, one: str, other: str) -> bool:
        return frozenset((one, other)) in self.cuts

    def data(self, source: str, target: str, deliver: Callable[[], None]) -> None:
        """A message of the data plane: at least once is asked for, not given."""
        dice, weather = self._dice, self.weather
        if weather.drop and dice.random() < weather.drop:
            return
        if weather.repeat and dice.random() < weather.repeat:
            self.clock.at(10 * self.latency() * dice.random(), lambda: self._carry(source, target, deliver))
        if weather.reorder and dice.random() < weather.reorder:
            self.clock.at(5 * self.latency(), lambda: self._carry(source, target, deliver))
        else:
            self._in_order("data", source, target, deliver)

    def control(self, source: str, target: str, deliver: Callable[[], None]) -> None:
        """A message of the control channel."""
        self._in_order("control", source, target, deliver)

    def _in_order(self, channel: str, source: str, target: str, deliver: Callable[[], None]) -> None:
        line = (channel, source, target)
        due = max(self.clock.now + self.latency(), self._last[line])
        self._last[line] = due
        self.clock.at(due - self.clock.now, lambda: self._carry(source, target, deliver))

    def _carry(self, source: str, target: str, deliver: Callable[[], None]) -> None:
        found = self.cuts.get(frozenset((source, target)))
        if found is None:
            deliver()
        elif not found.broken:
            found.waiting.append((target, deliver))

    def _break(self, found: Cut) -> None:
        found.broken = True
        found.waiting.clear()
