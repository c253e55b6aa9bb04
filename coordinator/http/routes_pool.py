"""HTTP routes about the coordinator itself: health, metrics and its own description."""

from __future__ import annotations

from aiohttp import web

from coordinator.http import prometheus
from coordinator.http.routing import ENGINE, GUARD, REFUSED, Answer, Route
from coordinator.shown.views import Health
from fusion import __version__
from fusion.wire import PROTOCOL_VERSION

DOCUMENT: web.AppKey[bytes] = web.AppKey("openapi document", bytes)


async def health(request: web.Request) -> web.Response:
    lifecycle = request.app[ENGINE].lifecycle
    shown = Health(
        status="ok",
        version=__version__,
        protocol_version=PROTOCOL_VERSION,
        workers=len(lifecycle.pool.live()),
        jobs=sum(not job.terminal for job in lifecycle.jobs.values()),
        unwritten=request.app[ENGINE].store.behind,
    )
    return web.json_response(shown.model_dump())


async def metrics(request: web.Request) -> web.Response:
    refused = request.app[REFUSED]
    return web.Response(
        body=prometheus.page(request.app[ENGINE], request.app[GUARD].denied, refused),
        headers={"Content-Type": "text/plain; version=0.0.4; charset=utf-8"},
    )


async def openapi(request: web.Request) -> web.Response:
    return web.Response(body=request.app[DOCUMENT], content_type="application/json")


ROUTES = (
    Route("GET", "/healthz", health, "Whether the coordinator lives.", (Answer(200, "It does.", Health),)),
    Route("HEAD", "/healthz", health, "Whether the coordinator lives.", (Answer(200, "It does.", content_type=""),)),
    Route(
        "GET",
        "/metrics",
        metrics,
        "Metrics for Prometheus.",
        (Answer(200, "Metrics.", content_type="text/plain"),),
        right="viewer",
    ),
    Route(
        "GET",
        "/api/v1/openapi.json",
        openapi,
        "This document.",
        (Answer(200, "OpenAPI 3.1.", content_type="application/json"),),
    ),
)
