"""How client commands find a coordinator: flag, environment, then the file of the same user."""

from __future__ import annotations

import stat

import pytest

from fusion import credentials
from fusion.errors import UserError


def test_the_file_is_for_its_owner_only():
    path = credentials.write("http://127.0.0.1:1", "secret")
    assert stat.S_IMODE(path.stat().st_mode) == 0o600
    assert credentials.read() == credentials.Credentials("http://127.0.0.1:1", "secret")
    credentials.write("http://127.0.0.1:2", "other")
    assert [item.name for item in path.parent.iterdir()] == [path.name]


def test_order(monkeypatch):
    with pytest.raises(UserError, match="no coordinator known: start one with `fusion coordinator`"):
        credentials.resolve()
    credentials.write("http://file:1", "of-file")
    assert credentials.resolve() == credentials.Credentials("http://file:1", "of-file")
    monkeypatch.setenv("FUSION_COORDINATOR", "http://environment:1")
    assert credentials.resolve() == credentials.Credentials("http://environment:1", None)
    monkeypatch.setenv("FUSION_TOKEN", "of-environment")
    assert credentials.resolve() == credentials.Credentials("http://environment:1", "of-environment")
    assert credentials.resolve("http://flag:1", "of-flag") == credentials.Credentials("http://flag:1", "of-flag")


def test_the_files_token_goes_to_no_other_host():
    credentials.write("http://file:1", "of-file")
    assert credentials.resolve("http://file:1/").token == "of-file"
    assert credentials.resolve("http://elsewhere:1").token is None


@pytest.mark.parametrize("content", ["{", "[]", '{"url": 3}', '{"token": "x"}'])
def test_a_damaged_file(content):
    path = credentials.write("http://file:1", "x")
    path.write_text(content)
    with pytest.raises(UserError, match=r"remove it, or give --coordinator"):
        credentials.resolve()
