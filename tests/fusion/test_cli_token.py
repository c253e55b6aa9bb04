"""`fusion token`: what it asks the coordinator for, what it prints, and that a bad lifetime is one line."""

from __future__ import annotations

import json

import pytest
from loopback_server import as_json, serving

from fusion.cli import main

MADE = {
    "id": "1a2b3c4d",
    "role": "join",
    "state": "valid",
    "note": "laptops",
    "created_at": 1.0,
    "expires_at": 604801.0,
    "uses": 3,
    "used": 0,
    "revoked_at": None,
}
SECRET = "1a2b3c4d.secret"


def run(capsys, *arguments: str) -> tuple[int, str, str]:
    with pytest.raises(SystemExit) as ended:
        main(list(arguments))
    out, err = capsys.readouterr()
    return int(ended.value.code or 0), out, err


@pytest.fixture
def asked(monkeypatch):
    seen = []

    def routes(method, path, body, headers):
        seen.append((method, path, json.loads(body) if body else None))
        if path == "/api/v1/tokens" and method == "POST":
            return as_json({**MADE, "token": SECRET, "join_url": f"http://192.0.2.1:8760?token={SECRET}"}, 201)
        if path == "/api/v1/tokens":
            return as_json({"tokens": [MADE]})
        return as_json({**MADE, "state": "revoked", "revoked_at": 2.0})

    with serving(routes) as url:
        monkeypatch.setenv("FUSION_COORDINATOR", url)
        monkeypatch.setenv("FUSION_TOKEN", "operator")
        yield seen


def test_create_prints_the_token_alone_and_the_join_command_beside_it(capsys, asked):
    code, out, err = run(capsys, "token", "create", "--ttl", "7d", "--uses", "3", "--note", "laptops")
    assert (code, out) == (0, f"{SECRET}\n")
    assert f"fusion worker --join 'http://192.0.2.1:8760?token={SECRET}'" in err
    body = {"role": "join", "lifetime_seconds": 604800.0, "uses": 3, "note": "laptops"}
    assert asked == [("POST", "/api/v1/tokens", body)]
    assert json.loads(run(capsys, "token", "create", "--ttl", "never", "--json")[1])["token"] == SECRET
    assert asked[-1][2]["lifetime_seconds"] is None


def test_list_and_revoke_never_handle_the_secret(capsys, asked):
    code, out, err = run(capsys, "token", "list")
    assert (code, err) == (0, "")
    assert "laptops" in out
    assert "0 of 3 used" in out
    assert run(capsys, "token", "revoke", SECRET)[:2] == (0, "token 1a2b3c4d revoked\n")
    assert asked[-1] == ("POST", "/api/v1/tokens/1a2b3c4d/revoke", {})


@pytest.mark.parametrize("ttl", ["soon", "0", "-1d", "7 fortnights"])
def test_a_bad_lifetime_is_one_line(capsys, asked, ttl):
    code, out, err = run(capsys, "token", "create", "--ttl", ttl)
    assert (code, out) == (1, "")
    assert err.startswith("error: --ttl")
    assert err.count("\n") == 1
    assert asked == []
