"""What workers say for people to see: each thing once, and of one worker only so much, because all of it is kept. Sans I/O."""

from __future__ import annotations

from collections import deque
from dataclasses import dataclass, field

from fusion.messages import Warned

BURST = 40
"""Words of one worker at once; a worker in trouble has some for each of its peers."""
PER_SECOND = 0.1
MOST_LETTERS = 2000


@dataclass(slots=True)
class _Allowance:
    left: float = BURST
    at: float = 0.0


@dataclass(slots=True)
class Words:
    """The words that are let through; `dropped` counts the others."""

    dropped: int = 0
    _said: deque[tuple[str, Warned]] = field(default_factory=lambda: deque(maxlen=200))
    _allowed: dict[str, _Allowance] = field(default_factory=dict)

    def take(self, now: float, incarnation: str, warned: Warned) -> str | None:
        """The text to keep, or None: it was said before (after a broken connection, say), or is one too many."""
        if (incarnation, warned) in self._said:
            return None
        self._said.append((incarnation, warned))
        allowed = self._allowed.setdefault(incarnation, _Allowance(at=now))
        allowed.left = min(BURST, allowed.left + (now - allowed.at) * PER_SECOND)
        allowed.at = now
        if allowed.left < 1:
            self.dropped += 1
            return None
        allowed.left -= 1
        text = warned.message[:MOST_LETTERS]
        return text if allowed.left >= 1 else f"{text} (it says too much: what follows is dropped for a while)"

    def forget(self, live: frozenset[str]) -> None:
        """Only these incarnations may still say something."""
        self._allowed = {incarnation: allowed for incarnation, allowed in self._allowed.items() if incarnation in live}
