"""HTTP routes about the coordinator itself: health, metrics, its own description, and the dashboard's files."""

from __future__ import annotations

import asyncio
from importlib import resources
from importlib.resources.abc import Traversable

from aiohttp import web

from coordinator import prometheus, sign_in
from coordinator.routing import ENGINE, GUARD, Answer, HttpError, Parameter, Route
from coordinator.views import ErrorView, Health
from fusion import __version__
from fusion.wire import PROTOCOL_VERSION

DOCUMENT: web.AppKey[bytes] = web.AppKey("openapi document", bytes)

_FILES = {
    "app.js": "text/javascript",
    "format.js": "text/javascript",
    "chart.js": "text/javascript",
    "style.css": "text/css",
    "icon.svg": "image/svg+xml",
}
_PLOTLY = "plotly.min.js"
# Everything comes from here; plotly sets inline styles.
_POLICY = "default-src 'none'; script-src 'self'; style-src 'self' 'unsafe-inline'; img-src 'self' data:; connect-src 'self'; base-uri 'none'; frame-ancestors 'none'"


async def health(request: web.Request) -> web.Response:
    lifecycle = request.app[ENGINE].lifecycle
    shown = Health(
        status="ok",
        version=__version__,
        protocol_version=PROTOCOL_VERSION,
        workers=len(lifecycle.pool.live()),
        jobs=sum(not job.terminal for job in lifecycle.jobs.values()),
    )
    return web.json_response(shown.model_dump())


async def metrics(request: web.Request) -> web.Response:
    return web.Response(
        body=prometheus.page(request.app[ENGINE], request.app[GUARD].denied),
        headers={"Content-Type": "text/plain; version=0.0.4; charset=utf-8"},
    )


async def openapi(request: web.Request) -> web.Response:
    return web.Response(body=request.app[DOCUMENT], content_type="application/json")


async def dashboard(request: web.Request) -> web.Response:
    refused = sign_in.refusal(request)
    if refused is not None:
        return refused
    return await _file(resources.files("coordinator.dashboard") / "index.html", "text/html")


async def dashboard_file(request: web.Request) -> web.Response:
    name = request.match_info["file"]
    if name == _PLOTLY:
        return await _file(resources.files("plotly") / "package_data" / _PLOTLY, "text/javascript")
    if name not in _FILES:
        raise HttpError(404, f"the dashboard has no file {name!r}")
    return await _file(resources.files("coordinator.dashboard") / name, _FILES[name])


async def _file(path: Traversable, content_type: str) -> web.Response:
    content = await asyncio.to_thread(path.read_bytes)
    response = web.Response(body=content, content_type=content_type, charset="utf-8")
    response.headers["Cache-Control"] = "public, max-age=86400" if path.name == _PLOTLY else "no-cache"
    response.headers["Content-Security-Policy"] = _POLICY
    if len(content) > 1 << 16:
        response.enable_compression()
    return response


ROUTES = (
    Route("GET", "/healthz", health, "Whether the coordinator lives.", (Answer(200, "It does.", Health),)),
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

DASHBOARD_ROUTES = (
    Route(
        "GET",
        "/",
        dashboard,
        "The dashboard; `?token=...` is kept as a cookie that opens reads.",
        (
            Answer(200, "The page.", content_type="text/html"),
            Answer(303, "The token is good: ask again without it.", content_type=""),
            Answer(401, "A page that asks for a token.", content_type="text/html"),
        ),
        (Parameter("token", "A viewer's or operator's token.", "query"),),
    ),
    Route(
        "GET",
        "/dashboard/{file}",
        dashboard_file,
        "The dashboard's scripts and styles.",
        (
            Answer(200, "The file.", content_type="text/javascript"),
            Answer(404, "No such file.", ErrorView),
        ),
        (Parameter("file", "Its name."),),
    ),
)
