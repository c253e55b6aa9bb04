"""Links as slow as a topology says: when a message that is handed over now would have arrived. Sans I/O.

Each peer has a link of its own, this direction of it: messages wait for those before them, take bytes / rate on the link
(a token bucket that holds no more than the message at its head), and arrive a latency later. So latency delays and rate
limits, and neither does the other's part. `scheduler.simulator` counts links in the same way.
"""

from __future__ import annotations

import heapq
from collections.abc import Mapping
from dataclasses import dataclass
from itertools import count
from typing import Generic, TypeVar

T = TypeVar("T")


@dataclass(frozen=True, slots=True)
class SlowLink:
    """One direction between two workers."""

    bytes_per_second: float
    seconds: float
    """One-way latency."""


class SlowLinks(Generic[T]):
    """What is under way to the peers that `links` names; times are seconds of any clock that never goes back."""

    def __init__(self, links: Mapping[str, SlowLink]) -> None:
        self._links = links
        self._free_at = dict.fromkeys(links, 0.0)
        self._under_way: list[tuple[float, int, T]] = []
        self._order = count()

    def covers(self, peer: str) -> bool:
        """Whether there is a link to this peer; to others nothing is slow."""
        return peer in self._links

    @property
    def next_at(self) -> float | None:
        """When the next message arrives; None when nothing is under way."""
        return self._under_way[0][0] if self._under_way else None

    def busy_for(self, now: float, peer: str) -> float:
        """How long the link is still busy with what it was given. Raises `KeyError` for a peer without a link."""
        return max(0.0, self._free_at[peer] - now)

    def put(self, now: float, peer: str, size: int, message: T) -> None:
        """A message of `size` bytes is handed over. Raises `KeyError` for a peer without a link."""
        link = self._links[peer]
        sent_at = self._free_at[peer] = max(now, self._free_at[peer]) + size / link.bytes_per_second
        heapq.heappush(self._under_way, (sent_at + link.seconds, next(self._order), message))

    def take(self, now: float) -> list[T]:
        """What has arrived by now, in order of arrival."""
        arrived = []
        while self._under_way and self._under_way[0][0] <= now:
            arrived.append(heapq.heappop(self._under_way)[2])
        return arrived
