"""`--pause-when-busy`: whether the machine's owner needs it. Sans I/O: readings go in, a decision comes out.

The worker leaves the pool in good order when other programs have kept the machine busy for a while, and joins again once
they have been quiet for longer: it should not come and go with every page that somebody opens.
"""

from __future__ import annotations

from dataclasses import dataclass

BUSY, QUIET = 0.5, 0.25
"""Share of all cores that others take."""
BUSY_SECONDS, QUIET_SECONDS = 10.0, 60.0


@dataclass(frozen=True, slots=True)
class Reading:
    """Seconds of processor time since the machine or this process was started."""

    time: float
    busy: float
    """Of all cores together, by whomever."""
    own: float
    """By this worker."""


class Owner:
    """Follows the load that is not ours on `cores` cores."""

    def __init__(self, cores: int) -> None:
        self._cores = cores
        self._last: Reading | None = None
        self._since: float | None = None
        self.away = False
        """Whether the machine belongs to its owner now."""
        self.others = 0.0
        """Share of all cores that others took between the last two readings, 0 to 1."""

    def take(self, reading: Reading) -> bool:
        """Take in a reading, about once a second; returns whether `away` has changed."""
        last, self._last = self._last, reading
        if last is None or reading.time <= last.time:
            return False
        used = (reading.busy - last.busy) - (reading.own - last.own)
        self.others = min(1.0, max(0.0, used / (self._cores * (reading.time - last.time))))
        if not (self.others < QUIET if self.away else self.others > BUSY):
            self._since = None
            return False
        if self._since is None:
            self._since = last.time
        if reading.time - self._since < (QUIET_SECONDS if self.away else BUSY_SECONDS):
            return False
        self.away, self._since = not self.away, None
        return True
