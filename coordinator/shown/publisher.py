"""Fans live items out to those who watch: each watcher has its own bounded queue and never slows the others down."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property
from typing import Any, Literal

ItemKind = Literal["job", "metrics", "event", "log", "worker", "pulse"]
_MAX_BEHIND = 10_000


@dataclass(frozen=True)
class Item:
    """One thing to show; `job` is None for what concerns the pool only."""

    kind: ItemKind
    job: str | None
    data: dict[str, Any]

    @cached_property
    def encoded(self) -> bytes:
        """As a server-sent event, made once for all who watch."""
        return server_sent_event(self.kind, self.data)


def server_sent_event(kind: str, data: dict[str, Any]) -> bytes:
    return f"event: {kind}\ndata: {json.dumps(data, separators=(',', ':'))}\n\n".encode()


class Watcher:
    """One subscription: to a job, or to everything (`job` None)."""

    def __init__(self, job: str | None) -> None:
        self.job = job
        self._queue: asyncio.Queue[Item | None] = asyncio.Queue()

    def offer(self, item: Item) -> bool:
        """Queue an item; False when the watcher is too far behind and must go."""
        if self._queue.qsize() >= _MAX_BEHIND:
            return False
        self._queue.put_nowait(item)
        return True

    def end(self) -> None:
        self._queue.put_nowait(None)

    async def next(self) -> Item | None:
        """The next item; None when the subscription is over."""
        return await self._queue.get()

    def more(self) -> Iterator[Item | None]:
        """Whatever else has come by now."""
        while not self._queue.empty():
            yield self._queue.get_nowait()


class Publisher:
    """All watchers."""

    def __init__(self) -> None:
        self._watchers: set[Watcher] = set()
        self._closed = False
        self.published = 0
        """Items so far: what was drawn up after the last of them still holds."""

    @contextmanager
    def watch(self, job: str | None) -> Iterator[Watcher]:
        watcher = Watcher(job)
        self._watchers.add(watcher)
        if self._closed:
            watcher.end()
        try:
            yield watcher
        finally:
            self._watchers.discard(watcher)

    @property
    def watched(self) -> bool:
        """Whether anybody watches the whole pool."""
        return any(watcher.job is None for watcher in self._watchers)

    def publish(self, item: Item) -> None:
        self.published += 1
        for watcher in tuple(self._watchers):
            # A watcher that fell behind is cut off: it connects again and asks for what it missed.
            if watcher.job in (None, item.job) and not watcher.offer(item):
                self._watchers.discard(watcher)
                watcher.end()

    def close(self) -> None:
        """End all subscriptions."""
        self._closed = True
        for watcher in tuple(self._watchers):
            watcher.end()
