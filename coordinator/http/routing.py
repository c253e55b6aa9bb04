"""A route as data: what the server registers and what the OpenAPI document says of it come from one place."""

from __future__ import annotations

from collections import Counter
from collections.abc import Awaitable, Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

from aiohttp import web
from pydantic import BaseModel

from coordinator.engine import Engine
from coordinator.entry.invitation import Identity
from coordinator.entry.tokens import Right
from coordinator.http.guard import Guard
from coordinator.shown.views import ErrorView

Handler = Callable[[web.Request], Awaitable[web.StreamResponse]]

ENGINE: web.AppKey[Engine] = web.AppKey("engine", Engine)
GUARD: web.AppKey[Guard] = web.AppKey("guard", Guard)
PUBLIC_HOST: web.AppKey[str] = web.AppKey("public host", str)
REFUSED: web.AppKey[Counter[int]] = web.AppKey("refused", Counter)
"""Requests that were answered with an error, by status."""
IDENTITY: web.AppKey[Identity] = web.AppKey("identity", Identity)


class HttpError(Exception):
    """Ends a request with `status` and one line in `{"error": ...}`."""

    def __init__(self, status: int, message: str, headers: Mapping[str, str] | None = None) -> None:
        super().__init__(message)
        self.status = status
        self.headers = dict(headers or {})


@dataclass(frozen=True, slots=True)
class Answer:
    """One possible answer: JSON of `model`, or a body of `content_type`."""

    status: int
    description: str
    model: type[BaseModel] | None = None
    content_type: str = "application/json"


CANT_RECORD = Answer(503, "It can't be recorded now (the disk is full, say), and is not done; ask again.", ErrorView)


@dataclass(frozen=True, slots=True)
class Parameter:
    """A path, query or header parameter."""

    name: str
    description: str
    where: Literal["path", "query", "header"] = "path"
    schema: Mapping[str, Any] = field(default_factory=lambda: {"type": "string"})


@dataclass(frozen=True, slots=True)
class Route:
    """One operation of the HTTP API. `right` is what its bearer token must give; None: open."""

    method: Literal["GET", "HEAD", "PUT", "POST"]
    path: str
    handler: Handler
    summary: str
    answers: tuple[Answer, ...]
    parameters: tuple[Parameter, ...] = ()
    body: type[BaseModel] | None = None
    body_content_type: str = "application/json"
    right: Right | None = None


def after_parameter(what: str) -> Parameter:
    return Parameter(
        "after", f"Only {what} after this number.", "query", {"type": "integer", "minimum": 0, "default": 0}
    )


def newest_parameter(what: str) -> Parameter:
    return Parameter(
        "newest",
        f"Of these, only so many of the newest {what}.",
        "query",
        {"type": "integer", "minimum": 1, "maximum": 10_000},
    )


def natural(request: web.Request, name: str, default: int = 0, *, least: int = 0) -> int:
    """A query parameter that is a natural number, `least` or more. Raises `HttpError` 400."""
    text = request.query.get(name)
    if text is None:
        return default
    if not (text.isascii() and text.isdigit() and len(text) <= 18):
        raise HttpError(400, f"query parameter {name}={text[:40]!r} is not a natural number")
    if int(text) < least:
        raise HttpError(400, f"query parameter {name}={text} must be {least} or more")
    return int(text)
