"""When to ask again for what is owed: later on links that are slow, and less and less often. Sans I/O."""

from __future__ import annotations

_LONGEST = 60.0


class Patience:
    """Judges waits of one compute thread; seconds throughout.

    A wait counts as long after half the failure timeout, but never before three times the longest wait that ended well
    lately: on a slow link a message takes its time, and asking for it again would slow the link further.
    """

    def __init__(self, failure_timeout: float) -> None:
        self._base = max(failure_timeout / 2, 0.05)
        self._usual = 0.0
        self._delay = 0.0
        self._silence = 0.0
        self._warned = False

    def left(self) -> float:
        """How long to wait before asking again."""
        return max(self._base, min(3 * self._usual, _LONGEST), self._delay)

    def arrived(self, waited: float) -> None:
        """Something came after `waited` seconds."""
        self._usual = max(waited + self._silence, 0.9 * self._usual)
        self._delay = self._silence = 0.0
        self._warned = False

    def asked(self) -> float | None:
        """Nothing came and we asked again. Returns the seconds of silence when a person should know, once per silence."""
        spent = self.left()
        self._silence += spent
        self._delay = min(2 * spent, _LONGEST)
        if not self._warned and self._silence >= 8 * self._base:
            self._warned = True
            return self._silence
        return None
