"""The rate of a link from the training's own messages, by the receiver's clock alone. Sans I/O.

Now and then a large message travels between two marks, messages of a header only. Whatever was queued before them, the
second mark comes in later than the first by what the message took on the link. That can't tell a fast link from a busy
processor, so a short time between the marks is only a lower bound of the rate.
"""

from __future__ import annotations

import threading
from collections import deque
from statistics import median

from fusion.messages import ArrivalRate
from fusion.wire import FrameKind, Header

LARGE = 65536
"""Bytes from which on a message is worth two marks."""
_EVERY = 1.0
"""Seconds between two marked messages to one peer."""
_SURE = 0.005
"""Seconds between two marks that are long beside what a busy receiver adds."""
_SAMPLES = 5
_SOONEST = 1e-6


class Marks:
    """Of one sender: which messages are marked. From any thread."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._next_at: dict[str, float] = {}
        self._number = 0

    def around(self, to: str, header: Header, size: int, now: float) -> tuple[Header, Header] | None:
        """The marks before and after a message of `size` bytes; None when it is to travel without."""
        if size < LARGE:
            return None
        with self._lock:
            if now < self._next_at.get(to, 0.0):
                return None
            self._next_at[to] = now + _EVERY
            self._number += 1
            number = self._number
        before = Header(header.job, header.epoch, FrameKind.MARK, 0, number, 0)
        return before, Header(header.job, header.epoch, FrameKind.MARK, 0, number, 1, shape=(size,))


class ArrivalTimes:
    """Of one receiver: the times between marks. `mark` on the receiver thread, `take` from any."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._open: dict[str, tuple[int, float]] = {}
        self._samples: dict[str, deque[ArrivalRate]] = {}
        self._fresh: set[str] = set()

    def mark(self, header: Header, sender: str, now: float) -> None:
        """A mark has come in."""
        with self._lock:
            if header.micro_batch == 0:
                self._open[sender] = (header.step, now)
                return
            number, begin = self._open.pop(sender, (0, 0.0))
            size = header.shape[0] if header.shape else 0
            if number != header.step or size < LARGE:
                return  # Its other half was lost.
            spent = max(now - begin, _SOONEST)
            sample = ArrivalRate(bytes_per_second=size / spent, at_least=spent < _SURE)
            self._samples.setdefault(sender, deque(maxlen=_SAMPLES)).append(sample)
            self._fresh.add(sender)

    def take(self) -> dict[str, ArrivalRate]:
        """By peer, the median over the last samples, of those with new ones."""
        with self._lock:
            fresh, self._fresh = self._fresh, set()
            found: dict[str, ArrivalRate] = {}
            for sender in sorted(fresh):
                samples = self._samples[sender]
                sure = [sample.bytes_per_second for sample in samples if not sample.at_least]
                if 2 * len(sure) > len(samples):
                    found[sender] = ArrivalRate(bytes_per_second=median(sure))
                else:
                    least = median(sample.bytes_per_second for sample in samples)
                    found[sender] = ArrivalRate(bytes_per_second=least, at_least=True)
            return found
