"""Tokens: stored as hashes, ended by time, use or hand, and each role gets no further than it should on any route."""

from __future__ import annotations

import asyncio
import stat
from dataclasses import replace
from pathlib import Path
from typing import Any

import aiohttp
import pytest
from coordinator_cases import FakeWorker, Server, ref_of, serving

from coordinator.entry.tokens import RIGHTS, DeniedError, Role, Token, TokenBook, TokenRequest, refuse_ended
from coordinator.http import api, guard
from fusion.errors import CoordinatorError
from fusion.messages import Device, JoinRequest
from fusion.sockets import key_to_hex, new_keys
from fusion.wire import PROTOCOL_VERSION
from worker.joining import ask

ALL_ROUTES = api.all_routes()
OPEN = {"/healthz", "/api/v1/openapi.json", "/", "/dashboard/{file}"}


def book() -> tuple[TokenBook, list[Token]]:
    saved: list[Token] = []
    return TokenBook([], lambda token: saved.append(token.model_copy(deep=True))), saved


async def made(server: Server, role: Role, **asked: Any) -> dict[str, Any]:
    status, answer = await server.call("POST", "/api/v1/tokens", json={"role": role, **asked})
    assert status == 201, answer
    assert isinstance(answer, dict)
    return answer


def test_what_is_saved_does_not_hold_the_secret() -> None:
    tokens, saved = book()
    token, text = tokens.make(TokenRequest(role="operator"), 100.0)
    secret = text.partition(".")[2]
    assert len(secret) == 32
    assert secret not in saved[0].model_dump_json()
    assert tokens.find(text) is token
    for wrong in (
        "",
        token.id,
        f"{token.id}.",
        f"{token.id}.{secret[:-1]}{'y' if secret[-1] == 'x' else 'x'}",
        f"00000000.{secret}",
        "\udc80.x",
        text + "\n",
    ):
        assert tokens.find(wrong) is None


def test_a_token_ends_by_time_by_use_and_by_hand() -> None:
    tokens, saved = book()
    timed, _ = tokens.make(TokenRequest(role="viewer", lifetime_seconds=60), 0.0)
    tokens.use(timed, 59.9)
    with pytest.raises(DeniedError, match=r"expired on 1970-01-01 00:01 UTC; .*fusion token create --role viewer"):
        tokens.use(timed, 60.0)
    counted, _ = tokens.make(TokenRequest(role="operator", uses=2), 0.0)
    tokens.use(counted, 1.0)
    tokens.use(counted, 1.0)
    assert saved[-1].used == 2
    with pytest.raises(DeniedError, match=r"used up \(2 of 2 uses\)"):
        tokens.use(counted, 1.0)
    tokens.revoke(counted, 5.0)
    tokens.revoke(counted, 9.0)
    assert saved[-1].revoked_at == 5.0
    with pytest.raises(DeniedError, match="was revoked on 1970"):
        refuse_ended(counted, 6.0)


def test_a_worker_that_joins_again_is_not_counted_again_and_the_list_stays_bounded() -> None:
    tokens, _ = book()
    token, _ = tokens.make(TokenRequest(role="join", uses=10_000), 0.0)
    for number in range(1000):
        tokens.seat(token, f"key{number}", frozenset({"key0"}))
    tokens.seat(token, "key999", frozenset())
    assert token.used == 1000
    assert len(token.members) == 512
    assert {"key0", "key999"} <= set(token.members)


@pytest.mark.parametrize(
    "wrong",
    [
        {"role": "root"},
        {"role": "join", "uses": 0},
        {"role": "join", "lifetime_seconds": 0},
        {"role": "join", "note": "a\nb"},
        {"more": 1},
    ],
)
async def test_a_bad_request_for_a_token_is_refused(server: Server, wrong: dict[str, Any]) -> None:
    status, answer = await server.call("POST", "/api/v1/tokens", json=wrong)
    assert status == 400
    assert "\n" not in answer["error"]


async def test_each_role_gets_no_further_than_it_should_on_every_route(tmp_path: Path) -> None:
    async with serving(tmp_path / "state", require_token=True) as server:
        access = server.access
        given: dict[Role, list[str]] = {
            "viewer": [access.viewer_token, (await made(server, "viewer"))["token"]],
            "operator": [access.operator_token, (await made(server, "operator"))["token"]],
            "join": [access.join_token, (await made(server, "join"))["token"]],
        }
        for route in ALL_ROUTES:
            path = route.path.format(name="x", digest="0" * 64, id="x", file="app.js", step=1, part="model")
            if route.path == "/api/v1/stream":
                continue  # It never ends; the guard before it is that of the others.
            assert (route.right is None) == (route.path in OPEN), route.path
            if route.right is None:
                continue
            assert (await server.call(route.method, path, None))[0] == 401
            for role, texts in given.items():
                for text in texts:
                    status, answer = await server.call(route.method, path, text)
                    if route.right in RIGHTS[role]:
                        assert status not in (401, 403), (route.path, role, answer)
                    else:
                        assert status == 403, (route.path, role, answer)


async def test_reads_are_open_on_loopback_only_and_only_under_a_name_of_this_machine(server: Server) -> None:
    assert (await server.call("GET", "/api/v1/jobs", None))[0] == 200
    for host, status in (("localhost:1", 200), ("[::1]:1", 200), ("evil.example:8760", 401), ("192.0.2.1", 401)):
        assert (await server.call("GET", "/api/v1/jobs", None, headers={"Host": host}))[0] == status
    # A token that is given counts: an expired one is not passed over in silence.
    assert (await server.call("GET", "/api/v1/jobs", "wrong"))[0] == 401


async def test_who_is_refused_is_told_why_and_counted(server: Server) -> None:
    viewer = await made(server, "viewer", note="grafana")
    status, answer = await server.call("POST", "/api/v1/jobs", viewer["token"], json={})
    assert status == 403
    assert answer["error"] == (
        f"token {viewer['id']} is a viewer's: it reads and changes nothing; this needs the operator's token or "
        "`fusion token create --role operator`"
    )
    assert (await server.call("POST", f"/api/v1/tokens/{viewer['id']}/revoke"))[1]["state"] == "revoked"
    status, answer = await server.call("GET", "/api/v1/jobs", viewer["token"])
    assert status == 401
    assert "was revoked" in answer["error"]
    once = await made(server, "operator", uses=1)
    assert (await server.call("GET", "/api/v1/tokens", once["token"]))[0] == 200
    assert "used up" in (await server.call("GET", "/api/v1/tokens", once["token"]))[1]["error"]
    _, listed = await server.call("GET", "/api/v1/tokens")
    assert [(token["state"], token["note"]) for token in listed["tokens"]] == [("revoked", "grafana"), ("used up", "")]
    assert "token" not in listed["tokens"][0]
    assert (await server.call("POST", "/api/v1/tokens/nope/revoke"))[0] == 404
    page = (await server.call("GET", "/metrics"))[1].decode()
    for reason, count in (("role", 1), ("revoked", 1), ("used up", 1), ("missing", 0)):
        assert f'fusion_coordinator_http_denied_total{{reason="{reason}"}} {count}.0' in page


async def test_the_store_keeps_tokens_over_a_restart_without_their_secrets(tmp_path: Path) -> None:
    state = tmp_path / "state"
    async with serving(state) as server:
        viewer, gone = await made(server, "viewer"), await made(server, "viewer")
        await server.call("POST", f"/api/v1/tokens/{gone['id']}/revoke")
    for file in state.iterdir():
        if file.is_file():
            assert stat.S_IMODE(file.stat().st_mode) & 0o077 == 0 or file.name == "control.port", file
            assert viewer["token"].partition(".")[2].encode() not in file.read_bytes()
    async with serving(state, require_token=True) as server:
        assert (await server.call("GET", "/api/v1/jobs", viewer["token"]))[0] == 200
        assert (await server.call("GET", "/api/v1/jobs", gone["token"]))[0] == 401


async def test_an_invitation_for_one_worker_lets_one_in_who_then_stays(
    server: Server, monkeypatch: pytest.MonkeyPatch
) -> None:
    invitation = await made(server, "join", uses=1, lifetime_seconds=3600)
    text = invitation["token"]
    assert invitation["join_url"] == f"{server.url}?token={text}&key={key_to_hex(server.access.keys.public)}"
    blob = f"/api/v1/blobs/{ref_of(b'x').digest}"
    server.access = replace(server.access, join_token=text)  # What the fake workers come with.
    async with FakeWorker(server, "a") as worker:
        status, answer = await server.call(
            "POST", "/api/v1/workers", json=FakeWorker(server, "b").join_body(), token=text
        )
        assert status == 401
        assert "used up (1 of 1 uses)" in answer["error"]
        # The one who joined reads and writes blobs, and joins again with its key when it was cut off.
        assert (await server.call("PUT", blob, text, data=b"x"))[0] == 201
        assert (await server.call("POST", "/api/v1/workers", text, json=worker.join_body()))[0] == 201
        # An hour later, for the tokens alone: the worker would count as lost.
        with monkeypatch.context() as later:
            later.setattr(guard, "refuse_ended", lambda token, now: refuse_ended(token, now + 4000))
            assert (await server.call("GET", blob, text))[0] == 200
            assert (await server.call("GET", "/api/v1/tokens", text))[0] == 403
            body = FakeWorker(server, "c").join_body()
            status, answer = await server.call("POST", "/api/v1/workers", text, json=body)
            assert (status, "expired" in answer["error"]) == (401, True)
        await server.call("POST", f"/api/v1/tokens/{invitation['id']}/revoke")
        assert (await server.call("GET", blob, text))[0] == 401
        await server.call("POST", "/api/v1/workers/a/drain")
        async with asyncio.timeout(10):
            await worker.evicted.wait()


async def test_a_browser_gets_in_by_the_address_and_holds_no_more_than_reads(tmp_path: Path) -> None:
    async with serving(tmp_path / "state", require_token=True) as server:
        session, url = server.session, server.url
        async with session.get(f"{url}/") as page:
            assert page.status == 401
            assert "needs a token" in await page.text()
        async with session.get(f"{url}/?token=%3Cscript%3E") as page:
            assert page.status == 401
            assert "<script>" not in await page.text()
        async with session.get(f"{url}/?token={server.access.operator_token}", allow_redirects=False) as page:
            assert (page.status, page.headers["Location"]) == (303, "/")
            cookie = page.cookies["fusion_viewer"]
        assert cookie.value == server.access.viewer_token
        assert (cookie["httponly"], cookie["samesite"]) == (True, "Strict")
        jar = {"Cookie": f"fusion_viewer={cookie.value}"}
        assert (await server.call("GET", "/", None, headers=jar))[0] == 200
        assert (await server.call("GET", "/api/v1/jobs", None, headers=jar))[0] == 200
        stolen = {"Cookie": f"fusion_viewer={server.access.operator_token}"}
        assert (await server.call("POST", "/api/v1/jobs", None, headers=stolen, json={}))[0] == 401


async def test_a_worker_is_told_how_its_token_ended(server: Server) -> None:
    invitation = await made(server, "join", uses=1)
    requests = [
        JoinRequest(
            name=name,
            protocol_version=PROTOCOL_VERSION,
            fusion_version="0",
            torch_version="0",
            device=Device(memory_bytes=0, flops_per_second=1e9),
            data_endpoint="tcp://127.0.0.1:1",
            public_key=new_keys().public,
        )
        for name in "bc"
    ]
    async with aiohttp.ClientSession() as session:
        assert (await ask(session, server.url, invitation["token"], requests[0])).answer.worker == "b"
        with pytest.raises(CoordinatorError) as caught:
            await ask(session, server.url, invitation["token"], requests[1])
    assert str(caught.value) == (
        f"the coordinator at {server.url} refused this worker: token {invitation['id']} is used up (1 of 1 uses); "
        "ask the pool's operator for another: `fusion token create --role join`"
    )


async def test_what_a_coordinator_that_ends_could_not_record_is_not_said_to_be_done(
    server: Server, monkeypatch: pytest.MonkeyPatch
) -> None:
    kept = await made(server, "viewer")

    async def ended() -> bool:
        return False

    monkeypatch.setattr(server.engine, "recorded", ended)
    status, answer = await server.call("POST", "/api/v1/tokens", json={"role": "viewer"})
    assert (status, "make another one" in answer["error"]) == (503, True)
    status, answer = await server.call("POST", f"/api/v1/tokens/{kept['id']}/revoke")
    assert (status, f"revoke {kept['id']} again" in answer["error"]) == (503, True)
