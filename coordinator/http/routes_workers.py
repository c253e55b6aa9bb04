"""HTTP routes of the pool's workers: join, list, drain."""

from __future__ import annotations

import ipaddress
import time
from itertools import permutations

from aiohttp import web

from coordinator.entry.entrance import NameAskedForError, NameTakenError
from coordinator.entry.knock import can_be_reached
from coordinator.http.bodies import read_body
from coordinator.http.routing import CANT_RECORD, ENGINE, GUARD, Answer, HttpError, Parameter, Route
from coordinator.life import events as ev
from coordinator.life.links import Known
from coordinator.shown.views import ErrorView, LinkList, WorkerList, WorkerView, worker_view
from fusion import __version__
from fusion.addresses import plain
from fusion.messages import JoinRequest, JoinResponse
from fusion.wire import PROTOCOL_VERSION


async def join(request: web.Request) -> web.Response:
    engine, guard = request.app[ENGINE], request.app[GUARD]
    asked = await read_body(request, JoinRequest, before=_check_version)
    guard.invite(request, asked.public_key)
    try:
        member = engine.join(asked)
    except NameAskedForError as error:
        raise HttpError(409, str(error), {"Retry-After": "1"}) from None
    except NameTakenError as error:
        raise HttpError(409, str(error)) from None
    guard.seated(request, asked.public_key)
    control, seen_as = engine.control, plain(request.remote or "")
    engine.greet(member, seen_as)
    reachable = await can_be_reached(asked.data_endpoint, seen_as)
    answer = JoinResponse(
        worker=member.name,
        incarnation=member.incarnation,
        control_endpoint=f"tcp://{_host_for(request, engine.config.host)}:{control.port}",
        control_public_key=control.keys.public,
        heartbeat_seconds=engine.config.heartbeat_seconds,
        time=time.time(),
        seen_as=seen_as,
        reachable=reachable,
    )
    return web.json_response(answer.model_dump(mode="json"), status=201)


def _check_version(body: object) -> None:
    """Comes before all other checks: another version's request may have other fields."""
    theirs = body.get("protocol_version") if isinstance(body, dict) else None
    if isinstance(theirs, int) and theirs != PROTOCOL_VERSION:
        raise HttpError(
            426,
            f"the worker speaks protocol version {theirs}, this coordinator (Fusion {__version__}) speaks "
            f"{PROTOCOL_VERSION}; install the same Fusion on both",
            {"Upgrade": f"fusion/{PROTOCOL_VERSION}"},
        )


def _host_for(request: web.Request, bound: str) -> str:
    """The address of the control channel as this worker can reach it: the one it used for HTTP if we listen on all."""
    host = bound
    if bound in ("", "*", "0.0.0.0", "::"):
        transport = request.transport
        local = transport.get_extra_info("sockname") if transport is not None else None
        host = request.url.host or (local[0] if local else "127.0.0.1")
    try:
        return f"[{host}]" if ipaddress.ip_address(host).version == 6 else host
    except ValueError:
        return host


async def list_workers(request: web.Request) -> web.Response:
    lifecycle = request.app[ENGINE].lifecycle
    workers = [
        worker_view(member, lifecycle.jobs.get(member.job) if member.job else None)
        for member in lifecycle.pool
        if member.state != "left"
    ]
    return web.json_response({"workers": workers})


async def list_links(request: web.Request) -> web.Response:
    engine = request.app[ENGINE]
    now, names = engine.clock(), [member.name for member in engine.lifecycle.pool.live()]
    lifecycle = engine.lifecycle
    known = dict(lifecycle.links.matrix(names, now))
    over = {}
    for pair, relay, since in lifecycle.relays.pairs(names):
        for ends in permutations(pair):
            over[ends] = relay
            known.setdefault((ends[0], ends[1]), Known("probe", since))
    links = [
        {
            "from": sender,
            "to": receiver,
            "seconds": link.seconds,
            "bytes_per_second": link.bytes_per_second,
            "source": link.source,
            "age_seconds": max(0.0, now - link.at),
            "relay": over.get((sender, receiver)),
            "error": link.error or None,
        }
        for (sender, receiver), link in known.items()
    ]
    return web.json_response({"links": links})


async def drain(request: web.Request) -> web.Response:
    engine = request.app[ENGINE]
    name = request.match_info["name"]
    member = engine.lifecycle.pool.get(name)
    if member is None or not member.live:
        live = ", ".join(other.name for other in engine.lifecycle.pool.live()) or "none"
        raise HttpError(404, f"no worker named {name!r} in the pool; there are: {live}")
    engine.must_record()
    engine.post(ev.DrainRequested(engine.clock(), name))
    job = engine.lifecycle.jobs.get(member.job) if member.job else None
    shown = worker_view(member, job)
    if shown["state"] == "left":
        shown["state"] = "draining"  # It has been told to go, and is on its way.
    return web.json_response(shown, status=202)


_NAME = Parameter("name", "The worker's name.")

ROUTES = (
    Route(
        "POST",
        "/api/v1/workers",
        join,
        "Join the pool; the answer says how to reach the control channel.",
        (
            Answer(201, "Joined.", JoinResponse),
            Answer(400, "Not a valid request.", ErrorView),
            Answer(409, "The name is in use; with `Retry-After`: perhaps not for long.", ErrorView),
            Answer(426, "Another protocol version.", ErrorView),
            CANT_RECORD,
        ),
        body=JoinRequest,
        right="join",
    ),
    Route(
        "GET",
        "/api/v1/workers",
        list_workers,
        "The workers of the pool.",
        (Answer(200, "Workers.", WorkerList),),
        right="viewer",
    ),
    Route(
        "GET",
        "/api/v1/links",
        list_links,
        "What is known of the links between the workers of the pool, each direction for itself.",
        (Answer(200, "Links; pairs of which nothing is known are left out.", LinkList),),
        right="viewer",
    ),
    Route(
        "POST",
        "/api/v1/workers/{name}/drain",
        drain,
        "Let a worker leave in good order: its job goes on without it, then it exits.",
        (Answer(202, "It will leave.", WorkerView), Answer(404, "No such worker.", ErrorView), CANT_RECORD),
        (_NAME,),
        right="operator",
    ),
)
