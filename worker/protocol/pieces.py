"""Which pieces of a snapshot to ask for, and when: few at once, spread over the time that the snapshot may take. Sans I/O.

Nothing is lost on a connection that holds, so what is late has most often met a slow link: it is asked for again only after
several times as long as the piece before it took, and after twice as long each time.
"""

from __future__ import annotations

import math

LARGEST = 256 * 1024
"""Bytes of a piece of a snapshot that may come as fast as it can;"""
_SMALLEST = 64 * 1024
"""... spread ones have fewer, but not so few that the work on each would be felt, or that a link could not be measured by them"""
_HELD_UP = 0.1
"""... and no more than come in so many seconds at the pace of the spread."""
_LEAST_WINDOW, _LARGEST_WINDOW = 2, 16
"""Pieces that are asked for before the first of them is here: more and more while they come at once."""
_AT_ONCE = 0.03
"""Seconds from asking for a piece to its arrival in which nothing of the training can have been held up for long."""
PATIENCE = 2.0
"""Seconds after which a piece, or an answer to an announcement, is asked for again, at the earliest;"""
_LONGER = 4.0
"""... so many times what the piece before took."""


def piece_bytes(size: int, seconds: float) -> int:
    """Bytes of each piece but the last of a snapshot of `size` bytes that is spread over `seconds` (0: it is not)."""
    if seconds <= 0:
        return LARGEST
    return min(max(math.ceil(size / seconds * _HELD_UP), _SMALLEST), LARGEST)


class Pieces:
    """Those of one snapshot, numbered from 1. Times are of one clock, in seconds."""

    def __init__(self, size: int, seconds: float, now: float) -> None:
        self.each = piece_bytes(size, seconds)
        """Bytes of all but the last."""
        self.count = -(-size // self.each)
        self._size = size
        self._between = seconds / self.count if self.count and seconds > 0 else 0.0
        self._missing = set(range(1, self.count + 1))
        self._asked = 0
        self._asked_at: dict[int, float] = {}
        """Of those that have not come yet."""
        self._window = _LEAST_WINDOW
        self._next_at = now
        self._heard_at = now
        self._patience = PATIENCE

    @property
    def complete(self) -> bool:
        return not self._missing

    def span(self, number: int) -> tuple[int, int]:
        """Begin and end of a piece in the snapshot."""
        begin = (number - 1) * self.each
        return begin, min(begin + self.each, self._size)

    def lacks(self, number: int) -> bool:
        """Whether this piece is one of the snapshot that has not come yet."""
        return number in self._missing

    def due(self, now: float) -> list[int]:
        """Those to be asked for now; takes it that they are."""
        found = []
        while self._asked < self.count and len(self._asked_at) < self._window and now >= self._next_at:
            self._asked += 1
            self._asked_at[self._asked] = now
            # What was missed by waiting for others is not made up for: that would be the burst that spreading avoids.
            self._next_at = max(self._next_at, now - self._between) + self._between
            found.append(self._asked)
        return found

    def wait(self, now: float) -> float | None:
        """Seconds until more are due; None when that depends on what comes first, or there are no more."""
        if self._asked == self.count or len(self._asked_at) >= self._window:
            return None
        return max(0.0, self._next_at - now)

    def came(self, number: int, now: float) -> None:
        """A piece is here."""
        self._missing.discard(number)
        self._heard_at = now
        took = now - self._asked_at.pop(number, now)
        self._patience = max(PATIENCE, _LONGER * took)
        if took < _AT_ONCE:
            self._window = min(self._window + 1, _LARGEST_WINDOW)
        else:
            self._window = max(self._window // 2, _LEAST_WINDOW)

    def overdue(self, now: float) -> list[int]:
        """Those to be asked for again; takes it that they are."""
        if not self._asked_at or now - self._heard_at < self._patience:
            return []
        self._heard_at = now
        self._patience *= 2
        return sorted(self._asked_at)[:_LEAST_WINDOW]
