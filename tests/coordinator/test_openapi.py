"""The OpenAPI document is valid, covers every route that the server registers, and the server's answers fit it."""

from __future__ import annotations

import re
from typing import Any

import pytest
from coordinator_cases import FakeWorker, Server
from jsonschema import Draft202012Validator
from openapi_spec_validator import OpenAPIV31SpecValidator

from coordinator.http import api
from coordinator.http.openapi import document

DOCUMENT = document(api.all_routes())


def test_the_document_is_valid() -> None:
    OpenAPIV31SpecValidator(DOCUMENT).validate()


def test_operation_ids_are_unique() -> None:
    ids = [operation["operationId"] for item in DOCUMENT["paths"].values() for operation in item.values()]
    assert len(ids) == len(set(ids))


async def test_every_registered_route_is_in_the_document(server: Server) -> None:
    app = api.make_app(server.engine, server.access)
    registered = {(route.method, route.resource.canonical) for route in app.router.routes() if route.resource}
    described = {(method.upper(), path) for path, item in DOCUMENT["paths"].items() for method in item}
    assert registered == described


class Checked:
    """Calls the server and holds each answer to the document."""

    def __init__(self, server: Server) -> None:
        self.server = server
        self.seen: set[tuple[str, str]] = set()

    async def __call__(self, method: str, path: str, token: str | None = "operator", **kwargs: Any) -> tuple[int, Any]:
        status, answer = await self.server.call(method, path, token, **kwargs)
        template = next(
            known
            for known in DOCUMENT["paths"]
            if re.fullmatch(re.sub(r"\\{\w+\\}", "[^/]+", re.escape(known)), path.split("?")[0])
        )
        self.seen.add((method, template))
        described = DOCUMENT["paths"][template][method.lower()]["responses"]
        assert str(status) in described, (
            f"{method} {path} answered {status}, which the document does not know: {answer}"
        )
        content = described[str(status)].get("content", {})
        schema = content.get("application/json", {}).get("schema")
        if isinstance(answer, bytes):
            assert schema is None
        elif schema is not None:
            Draft202012Validator({**schema, "components": DOCUMENT["components"]}).validate(answer)
        return status, answer


@pytest.fixture
def checked(server: Server) -> Checked:
    return Checked(server)


async def test_answers_fit_the_document(checked: Checked) -> None:
    server = checked.server
    worker = FakeWorker(server, "a")
    async with worker:
        await checked("POST", "/api/v1/workers", "join", json=worker.join_body())
        await checked("POST", "/api/v1/workers", "join", json=FakeWorker(server, "a").join_body())
        await checked("POST", "/api/v1/workers", "join", json=FakeWorker(server, "a").join_body(protocol_version=7))
        await checked("POST", "/api/v1/workers", None, json={})
        worker.pause_after = 5
        body = await server.submission(checkpoint={"every": 2})
        status, job = await checked("POST", "/api/v1/jobs", json=body)
        assert status == 201
        await checked("POST", "/api/v1/jobs", json={**body, "spec": {}})
        await checked("POST", "/api/v1/jobs", json=await server.submission())
        await server.until(job["id"], lambda shown: shown["step"] == 5 and shown["checkpoint"] == 4)
        home = f"/api/v1/jobs/{job['id']}"
        await checked("GET", "/api/v1/jobs")
        await checked("GET", home)
        await checked("GET", "/api/v1/jobs/nope")
        await checked("GET", "/api/v1/workers")
        await checked("GET", "/api/v1/links")
        await checked("GET", f"{home}/metrics")
        await checked("GET", f"{home}/metrics?after=x")
        await checked("GET", f"{home}/events")
        await checked("GET", "/api/v1/events?after=2")
        await checked("GET", "/api/v1/events?newest=0")
        await checked("GET", f"{home}/logs")
        await checked("GET", f"{home}/checkpoints")
        await checked("GET", f"{home}/checkpoints/4/model.safetensors")
        await checked("GET", f"{home}/checkpoints/4/optimizer.safetensors", headers={"Range": "bytes=0-7"})
        await checked("GET", f"{home}/checkpoints/3/model.safetensors")
        await checked("GET", f"{home}/dag")
        await checked("GET", f"{home}/dag", headers={"Range": "bytes=9999999-"})
        for part in ("curves", "timeline", "plans", "links", "diagram"):
            await checked("GET", f"{home}/{part}")
        await checked("GET", "/api/v1/map")
        _, settings = await checked("GET", f"{home}/settings")
        await checked("POST", f"{home}/again", json={"settings": settings, "after": 4})
        await checked("POST", f"{home}/again", json={"settings": {}})
        await checked("POST", f"{home}/cancel")
        await checked("POST", f"{home}/cancel")
        await checked("GET", f"{home}/stream")
        digest = body["weights"]["digest"]
        await checked("GET", f"/api/v1/blobs/{digest}")
        await checked("HEAD", f"/api/v1/blobs/{digest}")
        await checked("HEAD", f"/api/v1/blobs/{'0' * 64}")
        await checked("PUT", f"/api/v1/blobs/{digest}", data=b"not it")
        await checked("POST", "/api/v1/workers/a/drain")
        await checked("POST", "/api/v1/workers/nope/drain")
        _, token = await checked("POST", "/api/v1/tokens", json={"role": "join"})
        await checked("POST", "/api/v1/tokens", json={"role": "nobody"})
        await checked("GET", "/api/v1/tokens")
        await checked("GET", "/api/v1/tokens", "join")
        await checked("POST", f"/api/v1/tokens/{token['id']}/revoke")
        await checked("POST", "/api/v1/tokens/nope/revoke")
    await checked("GET", "/healthz", None)
    await checked("HEAD", "/healthz", None)
    await checked("GET", "/metrics", None)
    await checked("GET", "/", None)
    await checked("GET", "/dashboard/app.js", None)
    await checked("GET", "/dashboard/nope", None)
    status, served = await checked("GET", "/api/v1/openapi.json", None)
    assert served == DOCUMENT
    described = {(method.upper(), path) for path, item in DOCUMENT["paths"].items() for method in item}
    # The pool's stream never ends by itself; it is tested with the other streams.
    assert described - checked.seen == {("GET", "/api/v1/stream")}
