"""When to ask again for what is owed: later on links that are slow, and less and less often. Sans I/O."""

from __future__ import annotations

_LONGEST = 60.0
_STRETCH_LIMIT = 16.0
_FORGOTTEN = 0.999
"""What is left, after each arrival, of what was learnt: links that were slow a few steps ago still are."""


class Patience:
    """Judges the waits of one compute thread; seconds throughout.

    A wait is long after half the failure timeout. When what we asked for was under way, or arrives twice, we had asked too
    early: the link is slow; from then on we wait longer, and come back to normal as things arrive.
    """

    def __init__(self, failure_timeout: float) -> None:
        self._base = max(failure_timeout / 2, 0.05)
        self._stretch = 1.0
        self._delay = 0.0
        self._silence = 0.0
        self._asked = False
        self._warned = False

    def left(self) -> float:
        """How long to wait before asking again."""
        return min(max(self._base * self._stretch, self._delay), _LONGEST)

    def arrived(self) -> None:
        """Something that was wanted came."""
        self._stretch = max(1.0, _FORGOTTEN * self._stretch)
        self._delay = self._silence = 0.0
        self._warned = False

    def duplicated(self) -> None:
        """Something came that was here already, or is said to have come."""
        if self._asked:
            self._asked = False
            self._stretch = min(2 * self._stretch, _STRETCH_LIMIT)

    def asked(self) -> float | None:
        """Nothing came and we asked again. Returns the seconds of silence when a person should know, once per silence."""
        spent = self.left()
        self._silence += spent
        self._delay = 1.5 * spent
        self._asked = True
        if not self._warned and self._silence >= 8 * self._base:
            self._warned = True
            return self._silence
        return None
