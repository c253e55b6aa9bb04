"""The OpenAPI 3.1 document, made from the same route table that the server registers."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from pydantic import BaseModel
from pydantic.json_schema import models_json_schema

from coordinator.http.routing import Answer, Route
from coordinator.shown.views import ErrorView
from fusion import __version__

_REF = "#/components/schemas/{model}"


def document(routes: Sequence[Route]) -> dict[str, Any]:
    """The document for `routes`."""
    read: set[type[BaseModel]] = {answer.model for route in routes for answer in route.answers if answer.model}
    written: set[type[BaseModel]] = {route.body for route in routes if route.body}
    pairs = [(model, "serialization") for model in read | {ErrorView}] + [(model, "validation") for model in written]
    names, schemas = models_json_schema(sorted(pairs, key=lambda pair: (pair[0].__name__, pair[1])), ref_template=_REF)  # type: ignore[arg-type]
    paths: dict[str, dict[str, Any]] = {}
    for route in routes:
        paths.setdefault(route.path, {})[route.method.lower()] = _operation(route, names)
    return {
        "openapi": "3.1.0",
        "info": {
            "title": "Fusion coordinator",
            "version": __version__,
            "description": "Jobs, workers, blobs and live data of one pool. A bearer token has a role: viewer, operator or join.",
            "license": {"name": "Apache-2.0", "identifier": "Apache-2.0"},
        },
        "paths": paths,
        "components": {
            "schemas": schemas["$defs"],
            "securitySchemes": {
                "viewer": _scheme("A viewer's or operator's; none while the coordinator listens on loopback only."),
                "operator": _scheme("An operator's."),
                "join": _scheme("A join token or an operator's."),
                "member": _scheme("A join token of a worker that has joined, or an operator's."),
            },
        },
    }


def _operation(route: Route, names: Any) -> dict[str, Any]:
    answers = list(route.answers)
    if route.right is not None:
        content = "" if route.method == "HEAD" else "application/json"
        model = None if route.method == "HEAD" else ErrorView
        answers.append(Answer(401, "The bearer token is missing, wrong, expired, used up or revoked.", model, content))
        answers.append(Answer(403, "The token's role does not give this right.", model, content))
    operation: dict[str, Any] = {
        "operationId": f"{route.method.lower()}_{route.path.strip('/').replace('/', '_').translate(_SAFE) or 'root'}",
        "summary": route.summary,
        "security": _security(route),
        "responses": {str(answer.status): _answer(answer, names) for answer in answers},
    }
    if route.parameters:
        operation["parameters"] = [
            {
                "name": parameter.name,
                "in": parameter.where,
                "description": parameter.description,
                "required": parameter.where == "path",
                "schema": dict(parameter.schema),
            }
            for parameter in route.parameters
        ]
    if route.body is not None:
        operation["requestBody"] = {
            "required": True,
            "content": {route.body_content_type: {"schema": names[(route.body, "validation")]}},
        }
    elif route.method == "PUT":
        operation["requestBody"] = {"required": True, "content": {route.body_content_type: {}}}
    return operation


def _scheme(description: str) -> dict[str, str]:
    return {"type": "http", "scheme": "bearer", "description": description}


def _security(route: Route) -> list[dict[str, list[str]]]:
    if route.right is None:
        return []
    optional: list[dict[str, list[str]]] = [{}] if route.right == "viewer" else []
    return [*optional, {route.right: []}]


_SAFE = str.maketrans({"{": "", "}": "", ".": "_", "-": "_"})


def _answer(answer: Answer, names: Any) -> dict[str, Any]:
    shown: dict[str, Any] = {"description": answer.description}
    if answer.content_type:
        schema = {"schema": names[(answer.model, "serialization")]} if answer.model else {}
        shown["content"] = {answer.content_type: schema}
    return shown
