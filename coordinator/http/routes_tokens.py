"""HTTP routes of tokens: make, list, revoke. For operators."""

from __future__ import annotations

from aiohttp import web
from pydantic import BaseModel, Field

from coordinator.backlog import CantRecordError
from coordinator.entry.tokens import TokenRequest, TokenView, token_view
from coordinator.http.bodies import read_body
from coordinator.http.routing import (
    CANT_RECORD,
    ENGINE,
    GUARD,
    IDENTITY,
    PUBLIC_HOST,
    Answer,
    HttpError,
    Parameter,
    Route,
)
from coordinator.shown.views import ErrorView
from fusion.addresses import bracketed, is_loopback


class TokenMade(TokenView):
    """A fresh token. `token` is shown this once: only its hash is kept."""

    token: str
    join_url: str | None = Field(description="What `fusion worker --join` takes, for a join token.")


class TokenList(BaseModel):
    tokens: list[TokenView] = Field(description="In the order in which they were made; secrets are not known here.")


async def make(request: web.Request) -> web.Response:
    asked = await read_body(request, TokenRequest)
    engine, book = request.app[ENGINE], request.app[GUARD].book
    engine.must_record()
    token, text = book.make(asked, engine.clock())
    if not await engine.recorded():
        raise CantRecordError(f"the coordinator ended before token {token.id} was on record; make another one")
    join_url = request.app[IDENTITY].invitation(public_url(request), text) if token.role == "join" else None
    shown = TokenMade(**token_view(token, engine.clock()).model_dump(), token=text, join_url=join_url)
    return web.json_response(shown.model_dump(mode="json"), status=201, headers={"Cache-Control": "no-store"})


def public_url(request: web.Request) -> str:
    """How other machines reach us: as the asker did, unless that way stays on this machine."""
    host, port = request.url.host or "", request.url.port
    if is_loopback(host):
        host = request.app[PUBLIC_HOST]
    return f"{request.scheme}://{bracketed(host)}:{port}"


async def list_tokens(request: web.Request) -> web.Response:
    now = request.app[ENGINE].clock()
    shown = TokenList(tokens=[token_view(token, now) for token in request.app[GUARD].book])
    return web.json_response(shown.model_dump(mode="json"))


async def revoke(request: web.Request) -> web.Response:
    engine, book = request.app[ENGINE], request.app[GUARD].book
    name = request.match_info["id"]
    token = book.get(name)
    if token is None:
        raise HttpError(404, f"no token {name[:40]!r} here; `fusion token list` shows them")
    # It opens nothing from now on, even where that can't be written yet; who asked is told when it is.
    book.revoke(token, engine.clock())
    if not await engine.recorded():
        raise CantRecordError(f"the coordinator ended before that was on record; revoke {token.id} again")
    return web.json_response(token_view(token, engine.clock()).model_dump(mode="json"))


ROUTES = (
    Route(
        "POST",
        "/api/v1/tokens",
        make,
        "Make a token; the answer holds it this once.",
        (Answer(201, "Made.", TokenMade), Answer(400, "Not a valid request.", ErrorView), CANT_RECORD),
        body=TokenRequest,
        right="operator",
    ),
    Route(
        "GET",
        "/api/v1/tokens",
        list_tokens,
        "The tokens that were made, without their secrets.",
        (Answer(200, "Tokens.", TokenList),),
        right="operator",
    ),
    Route(
        "POST",
        "/api/v1/tokens/{id}/revoke",
        revoke,
        "End a token at once and for good.",
        (
            Answer(200, "Revoked.", TokenView),
            Answer(404, "No such token.", ErrorView),
            Answer(503, "It opens nothing any more, but that is not on record: revoke it again.", ErrorView),
        ),
        (Parameter("id", "The token's id."),),
        right="operator",
    ),
)
