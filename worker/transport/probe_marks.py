"""The rate of a link from the training's own messages, by the receiver's clock alone. Sans I/O.

Now and then a large message travels between two marks, messages of a header only. Whatever was queued before them, the
second mark comes in later than the first by what the message took on the link. Marks that come out close together are a fast
link's, or those of a receiver that was late for the first: behind a busy processor, or a hole in the stream of bytes, they had
both been waiting. So a short time says no more than the shortest that can be told, and only where many in a row are short.
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
"""Seconds between two marks that are long beside what a busy receiver adds; shorter ones count as this."""
_SAMPLES = 5
_ROW = 15
"""So many short times in a row are no chance: where half of them are a late receiver's, one row in 30,000 is."""


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
        self._short: dict[str, int] = {}
        """By peer, how many times in a row were short."""
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
            spent = now - begin
            sample = ArrivalRate(bytes_per_second=size / max(spent, _SURE), at_least=spent < _SURE)
            self._short[sender] = self._short.get(sender, 0) + 1 if sample.at_least else 0
            self._samples.setdefault(sender, deque(maxlen=_SAMPLES)).append(sample)
            self._fresh.add(sender)

    def take(self) -> dict[str, ArrivalRate]:
        """By peer, of those with new samples: the median of the last ones where most are sure; a lower bound after a row of
        short ones."""
        with self._lock:
            fresh, self._fresh = self._fresh, set()
            found: dict[str, ArrivalRate] = {}
            for sender in sorted(fresh):
                samples = self._samples[sender]
                sure = [sample.bytes_per_second for sample in samples if not sample.at_least]
                if 2 * len(sure) > len(samples):
                    found[sender] = ArrivalRate(bytes_per_second=median(sure))
                elif self._short[sender] >= _ROW:
                    least = min(sample.bytes_per_second for sample in samples)
                    found[sender] = ArrivalRate(bytes_per_second=least, at_least=True)
            return found
