"""When to ask again for what is owed: later on links that are slow, and less and less often. Sans I/O."""

from __future__ import annotations

_LONGEST = 60.0
_STRETCH_LIMIT = 16.0
_USUAL = 3.0
"""A wait so many times as long as the longest of late is long."""
_FORGOTTEN = 0.98
"""What is left, after each arrival, of what was learnt from waits before it."""


class Patience:
    """Judges the waits of one compute thread; seconds throughout.

    A wait is long after half the failure timeout, and after several times as long as waits have been of late. When something arrives twice, we had asked too early: the link is slow,
    and asking again slows it further; from then on we wait longer, and come back to normal as things arrive.
    """

    def __init__(self, failure_timeout: float) -> None:
        self._base = max(failure_timeout / 2, 0.05)
        self._stretch = 1.0
        self._usual = 0.0
        self._afresh = True
        self._delay = 0.0
        self._silence = 0.0
        self._asked = False
        self._warned = False

    def left(self) -> float:
        """How long to wait before asking again."""
        return min(max(self._base * self._stretch, _USUAL * self._usual, self._delay), _LONGEST)

    def arrived(self, waited: float = 0.0) -> None:
        """Something that was wanted came, so long after whatever came or was done before."""
        self._stretch = max(1.0, _FORGOTTEN * self._stretch)
        self._usual = 0.0 if self._afresh else max(waited, _FORGOTTEN * self._usual)
        self._afresh = False
        self._delay = self._silence = 0.0
        self._warned = False

    def forget(self) -> None:
        """The plan is another one: what was waited for until now, and the first that comes, says nothing of the links."""
        self._usual = 0.0
        self._afresh = True

    def duplicated(self) -> None:
        """Something came that was here already."""
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
