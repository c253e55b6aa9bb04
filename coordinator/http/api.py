"""The HTTP application: registers the route tables, checks bearer tokens, and turns every failure into one line of JSON."""

from __future__ import annotations

import json
import logging
from collections import Counter

from aiohttp import web

from coordinator.backlog import CantRecordError
from coordinator.engine import Engine
from coordinator.entry.access import Access
from coordinator.entry.announcement import public_host
from coordinator.entry.invitation import Identity
from coordinator.entry.tls import ServerTls
from coordinator.entry.tokens import DeniedError
from coordinator.http import (
    routes_again,
    routes_blobs,
    routes_dashboard,
    routes_jobs,
    routes_observed,
    routes_pool,
    routes_tokens,
    routes_workers,
    streams,
)
from coordinator.http.guard import Guard
from coordinator.http.openapi import document
from coordinator.http.routing import ENGINE, GUARD, IDENTITY, PUBLIC_HOST, REFUSED, Handler, HttpError, Route
from coordinator.shown.crossings import CrossingsCache

logger = logging.getLogger(__name__)


def all_routes(dashboard: bool = True) -> tuple[Route, ...]:
    """Every route that the server has."""
    routes = (
        *routes_pool.ROUTES,
        *routes_workers.ROUTES,
        *routes_blobs.ROUTES,
        *routes_jobs.ROUTES,
        *routes_again.ROUTES,
        *routes_observed.ROUTES,
        *routes_tokens.ROUTES,
        *streams.ROUTES,
    )
    return (*routes, *routes_dashboard.ROUTES) if dashboard else routes


def make_app(engine: Engine, access: Access, dashboard: bool = True, tls: ServerTls | None = None) -> web.Application:
    """The aiohttp application over a started or soon started `engine`."""
    app = web.Application(middlewares=[_counted, _errors], client_max_size=engine.config.max_body_bytes)
    app[ENGINE] = engine
    app[GUARD] = Guard(access, engine)
    app[routes_observed.CROSSINGS] = CrossingsCache()
    app[routes_observed.MAP] = routes_observed.DrawnMap()
    app[streams.PRESENT] = streams.Present()
    app[PUBLIC_HOST] = public_host(engine.config, tls)
    app[REFUSED] = Counter()
    app[IDENTITY] = Identity.of(access.keys.public, tls)
    routes = all_routes(dashboard)
    app[routes_pool.DOCUMENT] = json.dumps(document(routes)).encode()
    for route in routes:
        app.router.add_route(route.method, route.path, _guarded(route))
    return app


def _guarded(route: Route) -> Handler:
    """The route's handler behind its token check."""
    right = route.right
    if right is None:
        return route.handler

    async def handler(request: web.Request) -> web.StreamResponse:
        request.app[GUARD].admit(request, right)
        return await route.handler(request)

    return handler


def _refusal(denial: DeniedError) -> web.Response:
    """401 asks for another token, 403 says that this one is not for that. The body of a refused upload is not read, so
    the connection can't be used again.
    """
    if denial.kind == "role":
        return _answer(403, str(denial), {"Connection": "close"})
    return _answer(401, str(denial), {"WWW-Authenticate": 'Bearer realm="fusion"', "Connection": "close"})


@web.middleware
async def _counted(request: web.Request, handler: Handler) -> web.StreamResponse:
    answer = await handler(request)
    if answer.status >= 400:
        request.app[REFUSED][answer.status] += 1
    return answer


@web.middleware
async def _errors(request: web.Request, handler: Handler) -> web.StreamResponse:
    try:
        return await handler(request)
    except HttpError as error:
        return _answer(error.status, str(error), error.headers)
    except DeniedError as denial:
        return _refusal(denial)
    except CantRecordError as error:
        return _answer(503, str(error), {"Retry-After": "5"})
    except web.HTTPNotFound:
        return _answer(404, f"nothing is at {request.path[:200]}; see /api/v1/openapi.json")
    except web.HTTPMethodNotAllowed as error:
        allowed = ", ".join(sorted(error.allowed_methods))
        return _answer(405, f"{request.path[:200]} takes {allowed}", {"Allow": allowed})
    except web.HTTPRequestEntityTooLarge as error:
        return _answer(413, f"the body is too large: {error.text}", {"Connection": "close"})
    except web.HTTPException as error:
        if error.status < 400:
            raise
        return _answer(error.status, error.reason)
    except ConnectionResetError:
        raise  # The client went away while we were answering.
    except Exception:
        logger.exception("%s %s failed", request.method, request.path)
        return _answer(500, "the coordinator failed at this request; its log has the details")


def _answer(status: int, message: str, headers: dict[str, str] | None = None) -> web.Response:
    return web.json_response({"error": " ".join(message.split())}, status=status, headers=headers)
