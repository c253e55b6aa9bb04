"""HTTP routes of what is seen of jobs and the pool beyond their records, for pages that draw it."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, TypeVar

from aiohttp import web

from coordinator.http.routes_jobs import find_job
from coordinator.http.routing import ENGINE, Answer, HttpError, Parameter, Route
from coordinator.plans.planning import summarize
from coordinator.shown.crossings import CrossingsCache
from coordinator.shown.pool_map import pool_map
from coordinator.shown.views import ErrorView, shown_plan
from coordinator.shown.views_observed import CurvesView, JobLinks, PlanHistory, PoolMap, TimelineView
from dag.graph import OpDag
from dag.views import as_html
from fusion.errors import FusionError

T = TypeVar("T")


@dataclass
class DrawnMap:
    """The map that was drawn last, and how long it is good."""

    shown: dict[str, Any] = field(default_factory=lambda: {"groups": [], "between": [], "relayed": []})
    until: float = 0.0


MAP: web.AppKey[DrawnMap] = web.AppKey("map", DrawnMap)
CROSSINGS: web.AppKey[CrossingsCache] = web.AppKey("crossings", CrossingsCache)


async def curves(request: web.Request) -> web.Response:
    job, observations = find_job(request), request.app[ENGINE].observations
    found, whole = observations.curves(job)
    while not whole:
        await asyncio.sleep(0)  # A long run's records are read a page at a time: others are served in between.
        found, whole = observations.curves(job)
    return web.json_response(found.shown())


async def timeline(request: web.Request) -> web.Response:
    job = find_job(request)
    shown = request.app[ENGINE].observations.timelines.shown(job.id, len(job.plan.placement) if job.plan else 0)
    return web.json_response(shown)


async def plans(request: web.Request) -> web.Response:
    job, engine = find_job(request), request.app[ENGINE]
    found = engine.store.plans(job.id)
    if not found:
        return web.json_response({"plans": []})
    known, whole = engine.observations.curves(job)
    while not whole:
        await asyncio.sleep(0)
        known, whole = engine.observations.curves(job)
    stretches = {stretch.epoch: stretch for stretch in known.stretches}
    summaries = await _of_the_dag(request, lambda dag: [summarize(dag, plan) for plan in found])
    shown = []
    for plan, fragments in zip(found, summaries, strict=True):
        stretch = stretches.get(plan.epoch)
        shown.append(
            {
                "plan": shown_plan(plan).model_dump(mode="json"),
                "fragments": [fragment.model_dump(mode="json") for fragment in fragments],
                "first_step": stretch.first_step if stretch else None,
                "steps": stretch.steps if stretch else 0,
                "mean_step_seconds": stretch.seconds / stretch.steps if stretch else None,
            }
        )
    return web.json_response({"plans": shown})


async def job_links(request: web.Request) -> web.Response:
    job, engine = find_job(request), request.app[ENGINE]
    plan = job.plan
    if plan is None:
        return web.json_response({"links": []})
    cache = request.app[CROSSINGS]
    found = await _of_the_dag(request, lambda dag: cache.of(dag, job, plan))
    traffic = engine.observations.traffic
    rates = {(sender, receiver): rate for sender, receiver, rate in traffic.rates(engine.clock())}
    running = job.state == "running"
    return web.json_response(
        {
            "links": [
                {
                    **link,
                    "measured_bytes": traffic.bytes_per_step(link["from"], link["to"]) if running else None,
                    "bytes_per_second": rates.get((link["from"], link["to"]), 0.0) if running else 0.0,
                }
                for link in found
            ]
        }
    )


async def diagram(request: web.Request) -> web.Response:
    job = find_job(request)
    plan = job.plan
    text = await _of_the_dag(request, lambda dag: as_html(dag, plan))
    headers = {
        "Content-Security-Policy": "frame-ancestors 'self'",
        "Cache-Control": "no-cache",
        "Referrer-Policy": "no-referrer",
        "X-Content-Type-Options": "nosniff",
    }
    answer = web.Response(text=text, content_type="text/html", headers=headers)
    answer.enable_compression()
    return answer


async def the_map(request: web.Request) -> web.Response:
    engine, drawn = request.app[ENGINE], request.app[MAP]
    now = engine.clock()
    if now >= drawn.until:  # All who look at the pool ask when it changes: they get the same answer.
        drawn.until = now + _MAP_SECONDS
        workers = [member.name for member in engine.lifecycle.pool if member.state != "left"]
        links = {
            ends: (known.seconds or 0.0, known.bytes_per_second, known.source)
            for ends, known in engine.lifecycle.links.matrix(workers, now)
            if known.source != "declared" and known.bytes_per_second and not known.error
        }
        relayed = {pair: relay for pair, relay, _ in engine.lifecycle.relays.pairs(workers)}
        drawn.shown = await asyncio.to_thread(pool_map, workers, engine.config.topology, links, relayed)
    return web.json_response(drawn.shown)


async def _of_the_dag(request: web.Request, make: Callable[[OpDag], T]) -> T:
    """What a thread makes of the job's OP-DAG. Raises `HttpError` 404 when it is gone."""
    job, engine = find_job(request), request.app[ENGINE]
    try:
        return await asyncio.to_thread(lambda: make(engine.dag(job)))
    except FusionError as error:
        raise HttpError(404, f"the OP-DAG of job {job.id} can't be read: {error}") from None


_MAP_SECONDS = 1.0
_ID = Parameter("id", "The job's id.")
_NO_JOB = Answer(404, "No such job.", ErrorView)

ROUTES = (
    Route(
        "GET",
        "/api/v1/jobs/{id}/curves",
        curves,
        "The job's metrics from its first step on, in so few buckets that they can be drawn.",
        (Answer(200, "Buckets.", CurvesView), _NO_JOB),
        (_ID,),
        right="viewer",
    ),
    Route(
        "GET",
        "/api/v1/jobs/{id}/timeline",
        timeline,
        "Tasks and transfers of the last steps that were traced.",
        (Answer(200, "Spans.", TimelineView), _NO_JOB),
        (_ID,),
        right="viewer",
    ),
    Route(
        "GET",
        "/api/v1/jobs/{id}/plans",
        plans,
        "Every plan that the job has had, and how it did.",
        (Answer(200, "Plans by epoch.", PlanHistory), _NO_JOB),
        (_ID,),
        right="viewer",
    ),
    Route(
        "GET",
        "/api/v1/jobs/{id}/links",
        job_links,
        "What the job's plan sends over each link: codecs, bytes as they are and on the wire.",
        (Answer(200, "Links.", JobLinks), _NO_JOB),
        (_ID,),
        right="viewer",
    ),
    Route(
        "GET",
        "/api/v1/jobs/{id}/diagram",
        diagram,
        "The job's OP-DAG as a page, coloured by worker.",
        (Answer(200, "The page.", content_type="text/html"), _NO_JOB),
        (_ID,),
        right="viewer",
    ),
    Route(
        "GET",
        "/api/v1/map",
        the_map,
        "Which workers stand together, and the links between the groups.",
        (Answer(200, "Groups.", PoolMap),),
        right="viewer",
    ),
)
