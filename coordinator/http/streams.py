"""Live data as server-sent events: first what there is already, then whatever comes.

A job's stream begins with `job`, then its recorded metrics, events and logs; it ends after the job has ended. The pool's
begins with every worker and every job, and has a `pulse` every two seconds: the memory of the workers and the bytes on the
links between them. A comment is sent when nothing else is, so that both ends notice a dead connection.
"""

from __future__ import annotations

import asyncio
from contextlib import suppress
from dataclasses import dataclass
from typing import Any

from aiohttp import web

from coordinator.engine import Engine
from coordinator.http.routes_jobs import find_job
from coordinator.http.routing import ENGINE, Answer, Parameter, Route, natural
from coordinator.life.jobs import TERMINAL, Job
from coordinator.shown.publisher import Watcher, server_sent_event
from coordinator.shown.views import ErrorView, job_view, worker_view

QUIET_SECONDS = 5.0
_PAGE = 1000
_PRESENT_SECONDS = 1.0
_NUMBERED = {"metrics": ("step", "step"), "event": ("event", "seq"), "log": ("log", "seq")}
"""Items that are numbered: what has said so far which, and the number's key."""


@dataclass
class Present:
    """What a stream of the pool begins with, for all who open one before anything else happens."""

    encoded: bytes = b""
    published: int = -1
    until: float = 0.0

    def of(self, engine: Engine) -> bytes:
        publisher, now = engine.publisher, engine.clock()
        if publisher.published != self.published or now >= self.until:
            pool, jobs = engine.lifecycle.pool, engine.lifecycle.jobs
            views = [
                ("worker", worker_view(member, jobs.get(member.job) if member.job else None))
                for member in pool
                if member.state != "left"
            ]
            views += [("job", job_view(job)) for job in sorted(jobs.values(), key=lambda job: job.number)]
            views.append(("pulse", engine.observations.pulse(pool, now)))
            self.encoded = b"".join(server_sent_event(kind, view) for kind, view in views)
            self.published, self.until = publisher.published, now + _PRESENT_SECONDS
        return self.encoded


PRESENT: web.AppKey[Present] = web.AppKey("present", Present)


async def job_stream(request: web.Request) -> web.StreamResponse:
    engine, job = request.app[ENGINE], find_job(request)
    after = {kind: natural(request, f"after_{kind}") for kind in ("step", "event", "log")}
    response = _stream()
    with engine.publisher.watch(job.id) as watcher, suppress(ConnectionResetError):  # a reader may leave at any time
        await response.prepare(request)
        await response.write(server_sent_event("job", job_view(job)))
        was_terminal = job.terminal
        last = await _backlog(response, engine, job, after)
        if was_terminal:
            await response.write_eof()
            return response
        await _follow(response, watcher, last, until_job_ends=True)
    return response


async def pool_stream(request: web.Request) -> web.StreamResponse:
    engine, response = request.app[ENGINE], _stream()
    last_event = engine.store.latest_event()
    with engine.publisher.watch(None) as watcher, suppress(ConnectionResetError):
        await response.prepare(request)
        await response.write(request.app[PRESENT].of(engine))
        await _follow(response, watcher, {"event": last_event}, until_job_ends=False)
    return response


def _stream() -> web.StreamResponse:
    return web.StreamResponse(
        headers={"Content-Type": "text/event-stream", "Cache-Control": "no-store", "X-Accel-Buffering": "no"}
    )


async def _backlog(response: web.StreamResponse, engine: Engine, job: Job, after: dict[str, int]) -> dict[str, int]:
    """Send what is recorded, a page at a time; returns the last number sent of each kind."""
    store, last = engine.store, dict(after)
    while page := store.metrics(job.id, last["step"], _PAGE):
        await _send(response, "metrics", [{"job": job.id, **item} for item in page])
        last["step"] = page[-1]["step"]
    while page := store.events(job.id, last["event"], _PAGE):
        await _send(response, "event", page)
        last["event"] = page[-1]["seq"]
    while page := store.logs(job.id, last["log"], _PAGE):
        await _send(response, "log", page)
        last["log"] = page[-1]["seq"]
    return last


async def _send(response: web.StreamResponse, kind: str, page: list[dict[str, Any]]) -> None:
    await response.write(b"".join(server_sent_event(kind, data) for data in page))


async def _follow(
    response: web.StreamResponse, watcher: Watcher, last: dict[str, int], *, until_job_ends: bool
) -> None:
    """Send what comes, less what the backlog had already. What comes together goes out together."""
    over = False
    while not over:
        try:
            async with asyncio.timeout(QUIET_SECONDS):
                first = await watcher.next()
        except TimeoutError:
            await response.write(b": still here\n\n")
            continue
        fresh: list[bytes] = []
        for item in (first, *watcher.more()):
            if item is None:
                over = True
                break
            kind, key = _NUMBERED.get(item.kind, ("", ""))
            if kind in last and item.data[key] <= last[kind]:
                continue
            fresh.append(item.encoded)
            if until_job_ends and item.kind == "job" and item.data["state"] in TERMINAL:
                over = True
                break
        if fresh:
            await response.write(b"".join(fresh))
    await response.write_eof()


_STREAM = "text/event-stream"
_NUMBER = {"type": "integer", "minimum": 0, "default": 0}

ROUTES = (
    Route(
        "GET",
        "/api/v1/jobs/{id}/stream",
        job_stream,
        "A job's `job`, `metrics`, `event` and `log` items, recorded and live, until the job ends.",
        (
            Answer(200, "Server-sent events.", content_type=_STREAM),
            Answer(400, "Not a natural number.", ErrorView),
            Answer(404, "No such job.", ErrorView),
        ),
        (
            Parameter("id", "The job's id."),
            Parameter("after_step", "Leave out recorded steps up to this one.", "query", _NUMBER),
            Parameter("after_event", "Leave out recorded events up to this one.", "query", _NUMBER),
            Parameter("after_log", "Leave out recorded log lines up to this one.", "query", _NUMBER),
        ),
        right="viewer",
    ),
    Route(
        "GET",
        "/api/v1/stream",
        pool_stream,
        "`worker`, `job`, `metrics`, `event`, `log` and `pulse` items of the whole pool: the present state, then live.",
        (Answer(200, "Server-sent events.", content_type=_STREAM),),
        right="viewer",
    ),
)
