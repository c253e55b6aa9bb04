"""The HTTP client against a server on loopback: answers, errors in one line, streams, blobs."""

from __future__ import annotations

import hashlib
import socket

import pytest
from loopback_server import as_json, serving

from fusion.client import Client
from fusion.errors import CoordinatorError, UnreachableError, UserError, VersionError
from fusion.messages import BlobRef


def ref_of(data: bytes) -> BlobRef:
    return BlobRef(digest=hashlib.sha256(data).hexdigest(), size=len(data))


def test_token_and_answers():
    seen = []

    def routes(method, path, body, headers):
        seen.append((method, path, headers.get("Authorization")))
        return as_json({"jobs": [{"id": "a"}]} if path == "/api/v1/jobs" else {"id": "a b"})

    with serving(routes) as url, Client(url, "secret") as client:
        assert client.jobs() == [{"id": "a"}]
        assert client.job("a/b")["id"] == "a b"
    assert seen == [("GET", "/api/v1/jobs", "Bearer secret"), ("GET", "/api/v1/jobs/a%2Fb", "Bearer secret")]


@pytest.mark.parametrize(
    ("status", "body", "kind", "message"),
    [
        (404, b'{"error": "no job x"}', CoordinatorError, "no job x"),
        (401, b"", CoordinatorError, "token is missing or wrong; give --token"),
        (401, b'{"error": "token 1 expired"}', CoordinatorError, "refused: token 1 expired"),
        (403, b"", CoordinatorError, "this token does not allow it; take the operator's"),
        (403, b'{"error": "a viewer\'s"}', CoordinatorError, "refused: a viewer's"),
        (426, b'{"error": "speaks 2, not 1"}', VersionError, "speaks 2, not 1"),
        (500, b"<html>\nbroken", CoordinatorError, "<html>"),
        (500, b"", CoordinatorError, "answered with status 500"),
        (200, b"hello", CoordinatorError, "is this a Fusion coordinator"),
        (200, b"[]", CoordinatorError, "expected an object"),
    ],
)
def test_error_answers(status, body, kind, message):
    with (
        serving(lambda *_: (status, body, {})) as url,
        Client(url) as client,
        pytest.raises(kind, match=message.replace("(", r"\(")) as caught,
    ):
        client.job("x")
    assert "\n" not in str(caught.value)


def test_nobody_there():
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    with pytest.raises(UnreachableError, match="nobody listens there; is the coordinator running"):
        Client(f"http://127.0.0.1:{port}").jobs()
    with pytest.raises(UnreachableError, match="can't find the host"):
        Client("http://no-such-host.invalid:1").jobs()


@pytest.mark.parametrize("url", ["ftp://x", "http://", "http://x:port", "http://[::1", "http://x:port?token=secret"])
def test_a_bad_address(url):
    with pytest.raises(UserError, match=r"not a coordinator's address|port") as caught:
        Client(url)
    assert "secret" not in str(caught.value)


@pytest.mark.parametrize("token", ["sec\nret", "sec ret", "sec\0ret", "secr\u00e9t"])
def test_a_token_that_no_header_can_hold_is_refused_and_not_shown(token):
    with pytest.raises(UserError, match="copy it again") as caught:
        Client("http://127.0.0.1:1", token)
    assert "sec" not in str(caught.value)


def test_blobs_travel_once(tmp_path):
    stored: dict[str, bytes] = {}

    def routes(method, path, body, headers):
        digest = path.rpartition("/")[2]
        if method == "PUT":
            stored[digest] = body
            return 201, b"", {}
        if digest not in stored:
            return 404, b"{}", {}
        return 200, stored[digest], {}

    data = bytes(range(256)) * 10_000
    (tmp_path / "blob").write_bytes(data)
    counted: list[int] = []
    with serving(routes) as url, Client(url) as client:
        assert client.upload_blob(ref_of(data), tmp_path / "blob", counted.append)
        assert not client.upload_blob(ref_of(data), data)
        assert client.download_blob(ref_of(data)) == data
    assert sum(counted) == len(data)


def test_a_list_longer_than_an_answer_is_read_to_its_end():
    steps, asked = 25_000, []

    def routes(method, path, body, headers):
        after = int(path.partition("?after=")[2])
        asked.append(after)
        return as_json({"metrics": [{"step": step} for step in range(after + 1, min(after + 10_000, steps) + 1)]})

    with serving(routes) as url, Client(url) as client:
        assert [metric["step"] for metric in client.metrics("a", after=3)] == list(range(4, steps + 1))
    assert asked == [3, 10_003, 20_003]


def test_stream_of_events():
    lines = b': hello\n\nevent: metrics\ndata: {"step": 1}\n\nevent: job\ndata: {"state":\ndata:  "done"}\n\n'
    with serving(lambda *_: (200, lines, {})) as url, Client(url) as client:
        items = list(client.stream("a"))
    assert [(item.kind, item.data) for item in items] == [("metrics", {"step": 1}), ("job", {"state": "done"})]


def test_a_long_item_of_a_stream_is_read_whole():
    story = "x" * (3 << 20)
    lines = b'event: job\ndata: {"story": "%s"}\n\n' % story.encode()
    with serving(lambda *_: (200, lines, {})) as url, Client(url) as client:
        assert [item.data for item in client.stream("a")] == [{"story": story}]


@pytest.mark.parametrize(
    ("lines", "message"),
    [
        (b"data: <html>\n\n", "no JSON object; is this a Fusion coordinator"),
        (b"data: [1]\n\n", "no JSON object"),
        (b"data: " + b"x" * 1000, "longer than 500 bytes"),
    ],
)
def test_a_stream_of_something_else(lines, message, monkeypatch):
    monkeypatch.setattr("fusion.event_stream.MAX_LINE_BYTES", 500)
    with (
        serving(lambda *_: (200, lines, {})) as url,
        Client(url) as client,
        pytest.raises(CoordinatorError, match=message),
    ):
        list(client.stream("a"))


def test_a_broken_download_leaves_nothing(tmp_path):
    with (
        serving(lambda *_: (200, b"short", {"Content-Length": "100", "Connection": "close"})) as url,
        Client(url, timeout=0.5) as client,
        pytest.raises(UnreachableError),
    ):
        client.download_checkpoint("a", 1, "model", tmp_path / "model.safetensors")
    assert list(tmp_path.iterdir()) == []


def test_a_download_to_a_folder_that_is_not_there(tmp_path):
    with serving(lambda *_: (200, b"abc", {})) as url, Client(url) as client:
        with pytest.raises(UserError, match="can't write the checkpoint"):
            client.download_checkpoint("a", 1, "model", tmp_path / "none" / "model.safetensors")
        target = client.download_checkpoint("a", 1, "model", tmp_path / "model.safetensors")
    assert target.read_bytes() == b"abc"
