"""The HTTP application: registers the route tables, checks bearer tokens, and turns every failure into one line of JSON."""

from __future__ import annotations

import json
import logging

from aiohttp import web

from coordinator import routes_blobs, routes_jobs, routes_pool, routes_workers, streams
from coordinator.access import Access
from coordinator.engine import Engine
from coordinator.openapi import document
from coordinator.routing import ACCESS, ENGINE, Handler, HttpError, Route

logger = logging.getLogger(__name__)


def all_routes(dashboard: bool = True) -> tuple[Route, ...]:
    """Every route that the server has."""
    routes = (
        *routes_pool.ROUTES,
        *routes_workers.ROUTES,
        *routes_blobs.ROUTES,
        *routes_jobs.ROUTES,
        *streams.ROUTES,
    )
    return (*routes, *routes_pool.DASHBOARD_ROUTES) if dashboard else routes


def make_app(engine: Engine, access: Access, dashboard: bool = True) -> web.Application:
    """The aiohttp application over a started or soon started `engine`."""
    app = web.Application(middlewares=[_errors], client_max_size=engine.config.max_body_bytes)
    app[ENGINE] = engine
    app[ACCESS] = access
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
        scheme, _, token = request.headers.get("Authorization", "").partition(" ")
        access = request.app[ACCESS]
        if scheme.lower() != "bearer" or not access.allows(token.strip(), right):
            # The body of a refused upload is not read: the connection can't be used again.
            headers = {"WWW-Authenticate": 'Bearer realm="fusion"', "Connection": "close"}
            raise HttpError(401, _advice(request, access, token.strip()), headers)
        return await route.handler(request)

    return handler


def _advice(request: web.Request, access: Access, token: str) -> str:
    if token and access.allows(token, "member"):
        return "this needs the operator's token, not the join token; `fusion coordinator` prints where it is"
    what = "the bearer token is wrong" if token else f"{request.method} {request.path} needs a bearer token"
    return f"{what}; give --token (or set FUSION_TOKEN): the coordinator prints it at its start"


@web.middleware
async def _errors(request: web.Request, handler: Handler) -> web.StreamResponse:
    try:
        return await handler(request)
    except HttpError as error:
        return _answer(error.status, str(error), error.headers)
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
