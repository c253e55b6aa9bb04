"""What is sent to measure a link, and what the times of the answers say of it. Sans I/O.

Empty messages give the round trip; then come messages of growing size, one direction at a time, each answered as soon as it
is there. A slow link is known after the small ones: what would take longer than is left, or go beyond the bytes that are
allowed, is not sent. Only the asker's clock is used, so the latency of a direction is half of the round trip.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field

from fusion.messages import LinkFigures
from worker.machine.profile_line import fit

_PINGS = 5
_PING_SHARE = 0.25
"""Of the time, for the empty messages, but for the first."""
SIZES = (4096, 16384, 65536, 196608)
"""The smallest and the largest are sent twice, and the faster one counts: a connection starts slowly."""
_SHORT_TRIP = 0.025
"""Of the time: on a longer way the smallest is sent once."""
_TELLING = 1.5
_CAUTION = 1.5
_LARGEST_RATE = 1e12


@dataclass(frozen=True, slots=True)
class Exchange:
    """A message of `there` bytes that is answered with `back` bytes, beside their headers."""

    there: int
    back: int


@dataclass
class Course:
    """`next` until it gives nothing more, `took` after each answer; then `figures`."""

    max_bytes: int
    seconds: float
    _pings: list[float] = field(default_factory=list)
    _best: dict[Exchange, float] = field(default_factory=dict)
    _sent: int = 0

    def __post_init__(self) -> None:
        self._plan = self._exchanges()

    def next(self, elapsed: float) -> Exchange | None:
        """What to send after `elapsed` seconds."""
        for exchange in self._plan:
            size = exchange.there + exchange.back
            if size == 0:
                if not self._pings or elapsed < _PING_SHARE * self.seconds:
                    return exchange
            elif self._sent + size <= self.max_bytes and elapsed + self._at_worst(exchange) <= self.seconds:
                self._sent += size
                return exchange
        return None

    def took(self, exchange: Exchange, seconds: float) -> None:
        """The answer came after so long, or had not come by then."""
        seconds = max(seconds, 1e-6)
        if exchange.there + exchange.back == 0:
            self._pings.append(seconds)
        else:
            self._best[exchange] = min(seconds, self._best.get(exchange, seconds))

    def figures(self) -> tuple[LinkFigures, LinkFigures] | None:
        """The link there and back; None when too little was answered."""
        there = self._rate([(each.there, seconds) for each, seconds in self._best.items() if each.there])
        back = self._rate([(each.back, seconds) for each, seconds in self._best.items() if each.back])
        if there is None or back is None:
            return None
        latency = min(self._pings) / 2
        return (
            LinkFigures(seconds=latency, bytes_per_second=there),
            LinkFigures(seconds=latency, bytes_per_second=back),
        )

    def _exchanges(self) -> Iterator[Exchange]:
        for _ in range(_PINGS):
            yield Exchange(0, 0)
        for size in SIZES:
            for exchange in (Exchange(size, 0), Exchange(0, size)):
                trip = min(self._pings)
                # On a long way, sizes that add little to it would tell little and take as long as those that do.
                if size in (SIZES[0], SIZES[-1]) or self._expected(exchange) >= _TELLING * trip:
                    yield exchange
                    if size == SIZES[-1] or (size == SIZES[0] and trip < _SHORT_TRIP * self.seconds):
                        yield exchange

    def _expected(self, exchange: Exchange) -> float:
        """By the last message in the same direction; before the first one nothing is known but the round trip."""
        trip = min(self._pings)
        size = max(exchange.there, exchange.back)
        same = [each for each in self._best if bool(each.there) == bool(exchange.there) and max(each.there, each.back)]
        if not same:
            return trip
        largest = max(same, key=lambda each: each.there + each.back)
        return trip + max(0.0, self._best[largest] - trip) * size / max(largest.there, largest.back)

    def _at_worst(self, exchange: Exchange) -> float:
        trip = min(self._pings)
        return trip + _CAUTION * (self._expected(exchange) - trip)

    def _rate(self, points: list[tuple[int, float]]) -> float | None:
        if not points or not self._pings:
            return None
        # Smaller ones were sent while the connection was still getting up to speed.
        settled = [point for point in points if point[0] == SIZES[-1]] or points
        line = fit([(0.0, min(self._pings)), *((float(size), spent) for size, spent in settled)])
        return min(_LARGEST_RATE, line.rate)
