"""No request whatsoever breaks the coordinator: every answer is one that the OpenAPI document knows, and never a 500."""

from __future__ import annotations

import asyncio
import http.client
import json
import threading
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from random import Random
from typing import Any

import pytest
import schemathesis
from coordinator_cases import FakeWorker, serving
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from schemathesis import APIOperation, Case
from schemathesis.checks import content_type_conformance, response_schema_conformance

from benchmarks.fuzz_inputs import any_request
from coordinator.http import api
from coordinator.http.openapi import document

DOCUMENT = document(api.all_routes())
# What a server may answer to any request: bad encoding, no such path, wrong method, too much, expectation failed.
ALWAYS = {400, 404, 405, 413, 417}


@dataclass
class Target:
    """A coordinator in a thread of its own, with a finished job and a token of each role."""

    address: tuple[str, int]
    tokens: list[str]
    known: dict[str, list[str]]
    bodies: dict[str, Any]
    seen: set[int] = field(default_factory=set)


@pytest.fixture(scope="module")
def target(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Target]:
    folder: Path = tmp_path_factory.mktemp("fuzz")
    ready: list[Target | BaseException] = []
    up, down = threading.Event(), threading.Event()

    async def serve() -> None:
        async with serving(folder / "state", require_token=True) as server, FakeWorker(server, "a"):
            job = await server.submit(checkpoint={"every": 3})
            await server.until_state(job["id"], "done")
            digest = (await server.put(b"blob")).digest
            access = server.access
            tokens = [access.operator_token] * 8 + [access.join_token, access.viewer_token, "wrong", "1a2b3c4d.x", "é"]
            known = {"id": [job["id"]], "name": ["a"], "digest": [digest], "step": ["3", "6"], "part": ["model"]}
            host, port = server.url.removeprefix("http://").split(":")
            bodies = {"/api/v1/jobs": await server.submission(), "/api/v1/workers": FakeWorker(server, "b").join_body()}
            ready.append(Target((host, int(port)), tokens, known, bodies))
            up.set()
            await asyncio.to_thread(down.wait)

    def run() -> None:
        try:
            asyncio.run(serve())
        except BaseException as error:
            ready.append(error)
            up.set()

    thread = threading.Thread(target=run)
    thread.start()
    assert up.wait(60)
    if isinstance(ready[0], BaseException):
        raise ready[0]
    try:
        yield ready[0]
    finally:
        down.set()
        thread.join()


@given(seed=st.integers(0, 2**64))
@settings(max_examples=400, deadline=None)
def test_no_request_breaks_the_coordinator(target: Target, seed: int) -> None:
    asked = any_request(DOCUMENT, target.tokens, target.known, Random(seed), target.bodies)
    connection = http.client.HTTPConnection(*target.address, timeout=20)
    try:
        connection.putrequest(asked.method, asked.path, skip_accept_encoding=True)
        for name, value in asked.headers.items():
            connection.putheader(name, value.encode("utf-8"))
        connection.putheader("Content-Length", str(len(asked.body or b"")))
        connection.endheaders(asked.body)
        answer = connection.getresponse()
        stream = answer.getheader("Content-Type", "").startswith("text/event-stream")
        raw = b"" if stream else answer.read()
    except (http.client.RemoteDisconnected, ConnectionError):
        # It may hang up on a refused upload before all of it was sent; it must still live.
        return _still_lives(target)
    finally:
        connection.close()
    target.seen.add(answer.status)
    described = DOCUMENT["paths"][asked.template].get(asked.method.lower(), {"responses": {}})["responses"]
    assert answer.status in ALWAYS | {int(status) for status in described}, (asked, raw)
    assert answer.status < 500, (asked, raw)
    if answer.status >= 400 and asked.method != "HEAD" and "json" in answer.getheader("Content-Type", ""):
        error: dict[str, Any] = json.loads(raw)
        assert set(error) == {"error"}
        assert "\n" not in error["error"]
    return None


OPERATIONS = [
    found.ok()
    for found in schemathesis.openapi.from_dict(DOCUMENT).get_all_operations()
    if not found.ok().path.endswith("stream")  # The pool's never ends.
]


@pytest.mark.parametrize("operation", OPERATIONS, ids=lambda operation: operation.label)
def test_every_answer_is_as_the_document_says(target: Target, operation: APIOperation) -> None:
    """Asks what the document allows, made by schemathesis, with what is known here now and then in the place of names."""

    @given(case=operation.as_strategy(), known=st.booleans())
    @settings(max_examples=12, deadline=None, suppress_health_check=list(HealthCheck), derandomize=True)
    def ask(case: Case, known: bool) -> None:
        for name in case.path_parameters or {}:
            if known and name in target.known:
                case.path_parameters[name] = target.known[name][0]
        host, port = target.address
        authorization = {"Authorization": f"Bearer {target.tokens[0]}"}
        answer = case.call(base_url=f"http://{host}:{port}", headers=authorization, timeout=20)
        assert answer.status_code < 500, answer.content
        described = {int(status) for status in operation.definition.raw["responses"]}
        assert answer.status_code in ALWAYS | described, (case, answer.content)
        if answer.status_code in described and case.method != "HEAD":
            case.validate_response(answer, checks=[response_schema_conformance, content_type_conformance])

    ask()


def _still_lives(target: Target) -> None:
    connection = http.client.HTTPConnection(*target.address, timeout=20)
    connection.request("GET", "/healthz")
    assert connection.getresponse().status == 200
    connection.close()


def test_the_requests_reached_what_they_should(target: Target) -> None:
    """The fuzzing above is worth something only if requests get past the checks as well as into them."""
    for seed in range(3000):
        if {200, 201, 400, 401, 403, 404} <= target.seen:
            break
        test_no_request_breaks_the_coordinator.hypothesis.inner_test(target, seed)  # type: ignore[attr-defined]
    assert {200, 201, 400, 401, 403, 404} <= target.seen
