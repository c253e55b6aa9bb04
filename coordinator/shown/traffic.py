"""Bytes that workers say they sent to each other: how many a second now, and how many a step. Sans I/O."""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from statistics import median

_FADE_SECONDS = 5.0
_STEPS = 15
_QUIET_SECONDS = 30.0
"""A link without a byte for so long is forgotten."""


@dataclass(slots=True)
class Flow:
    """One direction between two workers."""

    since: float
    at: float
    faded: float = 0.0
    per_step: deque[int] = field(default_factory=lambda: deque(maxlen=_STEPS))

    def add(self, size: int, now: float) -> None:
        self.faded = self.faded * math.exp(-max(0.0, now - self.at) / _FADE_SECONDS) + size
        self.at = max(self.at, now)
        self.per_step.append(size)

    def bytes_per_second(self, now: float) -> float:
        """Over the last seconds, the latest the most; while there were fewer of them, over those."""
        known = 1 - math.exp(-max(1.0, now - self.since) / _FADE_SECONDS)
        return self.faded * math.exp(-max(0.0, now - self.at) / _FADE_SECONDS) / (_FADE_SECONDS * known)


class Traffic:
    """All links that bytes went over lately."""

    def __init__(self) -> None:
        self._flows: dict[tuple[str, str], Flow] = {}

    def note(self, sender: str, sent_to: Mapping[str, int], now: float) -> None:
        """Take in what one worker sent during one step."""
        for receiver, size in sent_to.items():
            if size > 0 and receiver != sender:
                self._flows.setdefault((sender, receiver), Flow(now, now)).add(size, now)

    def forget_quiet(self, now: float) -> None:
        self._flows = {pair: flow for pair, flow in self._flows.items() if now - flow.at < _QUIET_SECONDS}

    def rates(self, now: float) -> Iterator[tuple[str, str, float]]:
        """(from, to, bytes per second) of the links that carry something now."""
        for (sender, receiver), flow in self._flows.items():
            yield sender, receiver, flow.bytes_per_second(now)

    def bytes_per_step(self, sender: str, receiver: str) -> float | None:
        """The median of the last steps, which one snapshot in between does not move."""
        flow = self._flows.get((sender, receiver))
        return median(flow.per_step) if flow is not None and flow.per_step else None
