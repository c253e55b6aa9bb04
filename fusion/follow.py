"""Follows one job to its end: every metric once in step order, every event once in order, across broken connections."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import closing

from fusion.client import Client, StreamItem
from fusion.errors import UnreachableError

ENDED = frozenset({"done", "failed", "cancelled"})


class Cursor:
    """What was passed on already: items come from the backlog and from the stream, which overlap."""

    def __init__(self, step: int = 0, event: int = 0, log: int = 0) -> None:
        self.step = step
        self.event = event
        self.log = log

    def take(self, item: StreamItem) -> bool:
        """Whether the item is new."""
        if item.kind == "metrics":
            new = int(item.data.get("step", 0)) > self.step
            self.step = max(self.step, int(item.data.get("step", 0)))
            return new
        if item.kind in ("event", "log"):
            seen = self.event if item.kind == "event" else self.log
            sequence = int(item.data.get("seq", 0))
            if item.kind == "event":
                self.event = max(self.event, sequence)
            else:
                self.log = max(self.log, sequence)
            return sequence > seen
        return True


def follow(
    client: Client,
    job: str,
    *,
    logs: bool = False,
    give_up_seconds: float = 120.0,
    pause: Callable[[float], None] = time.sleep,
) -> Iterator[StreamItem]:
    """Items of a job until it has ended; the last one is `job` in its final state.

    A coordinator that goes away is asked again with growing pauses. Raises `UnreachableError` after `give_up_seconds`
    without an answer, `CoordinatorError` when the job is not known.
    """
    cursor = Cursor()
    wait, lost_since = 0.2, None
    while True:
        try:
            with closing(
                client.stream(job, after_step=cursor.step, after_event=cursor.event, after_log=cursor.log)
            ) as live:
                wait, lost_since = 0.2, None
                ended = None
                for item in live:
                    if _is_end(item):
                        ended = item
                    elif (logs or item.kind != "log") and cursor.take(item):
                        yield item
            if ended is not None:
                yield from _rest(client, job, cursor, logs)
                yield ended
                return
            # The stream ended before the job did: we fell behind, or the coordinator is being restarted.
            pause(wait)
        except UnreachableError:
            now = time.monotonic()
            lost_since = lost_since if lost_since is not None else now
            if now - lost_since > give_up_seconds:
                raise
            pause(wait)
            wait = min(2 * wait, 5.0)


def _rest(client: Client, job: str, cursor: Cursor, logs: bool) -> Iterator[StreamItem]:
    """What was recorded in the same moment as the end."""
    items = [StreamItem("metrics", metric) for metric in client.metrics(job, cursor.step)]
    items += [StreamItem("event", event) for event in client.events(job, cursor.event)]
    if logs:
        items += [StreamItem("log", line) for line in client.logs(job, cursor.log)]
    yield from (item for item in items if cursor.take(item))


def _is_end(item: StreamItem) -> bool:
    return item.kind == "job" and item.data.get("state") in ENDED
