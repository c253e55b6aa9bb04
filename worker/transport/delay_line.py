"""Holds messages back until they would have come over the slow links of a topology, on a thread of its own."""

from __future__ import annotations

import threading
from collections.abc import Callable, Mapping
from time import monotonic

from worker.transport.slow_links import SlowLink, SlowLinks

Send = Callable[[], object]


class DelayLine:
    """`put` from any thread, from construction until `close`. What is under way then is lost, as on a cut cable."""

    def __init__(self, links: Mapping[str, SlowLink]) -> None:
        self._links: SlowLinks[Send] = SlowLinks(links)
        self._changed = threading.Condition()
        self._over = False
        self._thread = threading.Thread(target=self._deliver, name="delay line", daemon=True)
        self._thread.start()

    def covers(self, peer: str) -> bool:
        """Whether messages to this peer are to be `put` here."""
        return self._links.covers(peer)

    def put(self, peer: str, size: int, send: Send) -> None:
        """Call `send`, which hands over a message of `size` bytes, when it would have arrived. It may not raise."""
        with self._changed:
            self._links.put(monotonic(), peer, size, send)
            self._changed.notify()

    def close(self) -> None:
        """Stop the thread and wait for it; safe to call twice."""
        with self._changed:
            self._over = True
            self._changed.notify()
        self._thread.join()

    def _deliver(self) -> None:
        while (due := self._next_due()) is not None:
            for send in due:
                send()

    def _next_due(self) -> list[Send] | None:
        """Wait for what arrives next; None when the line is closed."""
        with self._changed:
            while not self._over:
                now = monotonic()
                if due := self._links.take(now):
                    return due
                at = self._links.next_at
                self._changed.wait(None if at is None else min(at - now, threading.TIMEOUT_MAX))
            return None
