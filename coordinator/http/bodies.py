"""Reads and validates JSON bodies; what is wrong is told in one line."""

from __future__ import annotations

import json
from collections.abc import Callable
from typing import Any, TypeVar

from aiohttp import web
from pydantic import BaseModel, ValidationError

from coordinator.http.routing import HttpError

M = TypeVar("M", bound=BaseModel)


async def read_body(request: web.Request, model: type[M], before: Callable[[Any], None] | None = None) -> M:
    """The request's JSON body as `model`; `before` sees the raw JSON first. Raises `HttpError` 400."""
    raw = await request.read()
    try:
        body = json.loads(raw)
    except (ValueError, RecursionError):
        raise HttpError(400, "the body is not JSON") from None
    if before is not None:
        before(body)
    try:
        return model.model_validate_json(raw)
    except ValidationError as error:
        raise HttpError(400, first_problem(error)) from None


def first_problem(error: ValidationError) -> str:
    """`spec.train.steps: Input should be greater than 0`, and how many more there are."""
    problems = error.errors(include_url=False, include_context=False, include_input=False)
    where = ".".join(str(part) for part in problems[0]["loc"]) or "body"
    more = f" (and {len(problems) - 1} more)" if len(problems) > 1 else ""
    return f"{where}: {problems[0]['msg']}{more}"
