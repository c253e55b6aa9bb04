"""The HTTP API: tokens, refusals in one line, blobs and live streams."""

from __future__ import annotations

import asyncio
import hashlib
import json
from pathlib import Path
from typing import Any

import aiohttp
import pytest
from coordinator_cases import FakeWorker, Server, data_blob, floats, ref_of, serving, tensors_file, weights_blob
from prometheus_client.parser import text_string_to_metric_families

from coordinator.http import api
from coordinator.http.routing import Route

GUARDED = [route for route in api.all_routes() if route.right not in (None, "viewer")]


@pytest.mark.parametrize("route", GUARDED, ids=lambda route: f"{route.method} {route.path}")
async def test_what_changes_something_needs_a_token(server: Server, route: Route) -> None:
    path = route.path.format(name="x", digest="0" * 64, id="x")
    for token in (None, "wrong"):
        status, answer = await server.call(route.method, path, token)
        assert status == 401
        if route.method != "HEAD":
            assert "--token" in answer["error"]


async def test_the_join_token_does_not_submit_jobs(server: Server) -> None:
    status, answer = await server.call("POST", "/api/v1/jobs", "join", json={})
    assert status == 403
    assert "operator's token" in answer["error"]


async def test_every_mutating_route_is_guarded() -> None:
    for route in api.all_routes():
        if route.method in ("POST", "PUT"):
            assert route.right is not None, route.path


@pytest.mark.parametrize(
    ("method", "path", "status"),
    [
        ("GET", "/nowhere", 404),
        ("DELETE", "/api/v1/jobs", 405),
        ("GET", "/api/v1/jobs/nope", 404),
        ("GET", "/api/v1/jobs/nope/stream", 404),
        ("POST", "/api/v1/workers/nope/drain", 404),
        ("GET", "/api/v1/blobs/xyz", 400),
        ("GET", f"/api/v1/blobs/{'0' * 64}", 404),
        ("GET", "/api/v1/blobs/..%2f..%2fcoordinator.sqlite3", 400),
        ("GET", "/dashboard/..%2f..%2fapi.py", 404),
        ("GET", "/api/v1/events?after=-1", 400),
        ("GET", "/api/v1/events?newest=0", 400),
        ("GET", "/api/v1/events?newest=", 400),
    ],
)
async def test_failures_are_one_line_of_json(server: Server, method: str, path: str, status: int) -> None:
    got, answer = await server.call(method, path)
    assert got == status, answer
    assert set(answer) == {"error"}
    assert "\n" not in answer["error"]


async def test_a_probe_may_ask_for_health_without_the_body(server: Server) -> None:
    assert await server.call("HEAD", "/healthz", None) in ((200, None), (200, b""))


async def test_a_blob_comes_back_whole_and_in_ranges(server: Server) -> None:
    content = bytes(range(256)) * 5000
    ref = await server.put(content)
    path = f"/api/v1/blobs/{ref.digest}"
    assert (await server.call("PUT", path, "join", data=content))[0] == 200
    assert (await server.call("HEAD", path))[0] == 200
    assert await server.call("GET", path, "join") == (200, content)
    status, piece = await server.call("GET", path, "join", headers={"Range": "bytes=1000-1999"})
    assert (status, piece) == (206, content[1000:2000])
    assert await server.call("GET", path, "join", headers={"Range": "bytes=-6"}) == (206, content[-6:])
    for asked in ("bytes=9-1", "lines=1-2"):
        assert (await server.call("GET", path, "join", headers={"Range": asked}))[0] == 416
    status, answer = await server.call("GET", path, "join", headers={"Range": "bytes=9999999-"})
    assert answer == {"error": "Range 'bytes=9999999-' is not in the 1280000 bytes that are here"}
    assert status == 416


async def test_a_blob_with_another_hash_is_not_kept(server: Server) -> None:
    digest = hashlib.sha256(b"one thing").hexdigest()
    status, answer = await server.call("PUT", f"/api/v1/blobs/{digest}", data=b"another")
    assert status == 400
    assert digest in answer["error"]
    assert (await server.call("HEAD", f"/api/v1/blobs/{digest}"))[0] == 404
    assert not list((server.engine.blobs.root / "incoming").iterdir())


async def test_a_truncated_upload_is_not_kept(server: Server) -> None:
    content = b"x" * 100_000
    ref = ref_of(content)
    host, port = server.url.removeprefix("http://").split(":")
    reader, writer = await asyncio.open_connection(host, int(port))
    head = (
        f"PUT /api/v1/blobs/{ref.digest} HTTP/1.1\r\nHost: x\r\nContent-Length: {ref.size}\r\n"
        f"Authorization: Bearer {server.access.operator_token}\r\n\r\n"
    )
    writer.write(head.encode() + content[:5000])
    await writer.drain()
    writer.close()
    await reader.read()
    assert (await server.call("HEAD", f"/api/v1/blobs/{ref.digest}"))[0] == 404


async def test_too_large_blobs_are_refused_before_they_are_read(tmp_path: Path) -> None:
    async with serving(tmp_path / "state", max_blob_bytes=1000) as server:
        content = b"x" * 1001
        status, answer = await server.call("PUT", f"/api/v1/blobs/{ref_of(content).digest}", data=content)
        assert status == 413
        assert "larger than 1000" in answer["error"]

        async def unannounced() -> Any:
            yield content

        status, _ = await server.call("PUT", f"/api/v1/blobs/{ref_of(content).digest}", data=unannounced())
        assert status == 413


async def test_a_full_disk_answers_507(server: Server, monkeypatch: pytest.MonkeyPatch) -> None:
    import errno
    import os

    def full(_: int) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    status, answer = await server.call("PUT", f"/api/v1/blobs/{ref_of(b'abc').digest}", data=b"abc")
    assert status == 507
    assert "No space left" in answer["error"]
    assert not list((server.engine.blobs.root / "incoming").iterdir())


async def test_joining(server: Server) -> None:
    async with FakeWorker(server, "a") as first:
        status, answer = await server.call("POST", "/api/v1/workers", "join", json=FakeWorker(server, "a").join_body())
        assert status == 409
        assert "choose another --name" in answer["error"]
        status, answer = await server.call(
            "POST", "/api/v1/workers", "join", json=FakeWorker(server, "b").join_body(public_key=first.keys.public)
        )
        assert status == 409
        status, answer = await server.call(
            "POST", "/api/v1/workers", "join", json={"protocol_version": 99, "other": "fields"}
        )
        assert status == 426
        assert "99" in answer["error"]
        assert "speaks 1" in answer["error"]
        for wrong in ({"name": "../x"}, {"public_key": "short"}, {"more": 1}):
            status, answer = await server.call(
                "POST", "/api/v1/workers", "join", json=FakeWorker(server, "c").join_body(**wrong)
            )
            assert status == 400, answer


@pytest.mark.parametrize(
    "endpoint", ["", "10.0.0.1:7", "http://10.0.0.1:7", "tcp://10.0.0.1", "tcp://h:0", "tcp://h:70000", "tcp://[x:7"]
)
async def test_who_gives_no_proper_address_does_not_join(server: Server, endpoint: str) -> None:
    """Where others are to meet at its relay, what can't be read as an address would fail every tick."""
    body = FakeWorker(server, "a").join_body(data_endpoint=endpoint)
    status, answer = await server.call("POST", "/api/v1/workers", "join", json=body)
    assert status == 400, answer
    assert isinstance(answer, dict)
    assert answer["error"] == f"data_endpoint: Value error, {endpoint!r} is not tcp://HOST:PORT"


async def test_draining_an_idle_worker_sends_it_away(server: Server) -> None:
    async with FakeWorker(server, "a") as worker:
        status, shown = await server.call("POST", "/api/v1/workers/a/drain")
        assert (status, shown["state"]) == (202, "draining")
        async with asyncio.timeout(10):
            await worker.evicted.wait()
        _, answer = await server.call("GET", "/api/v1/workers")
        assert answer["workers"] == []


def _change(body: dict[str, Any], path: str, value: Any) -> None:
    *parents, last = path.split(".")
    for key in parents:
        body = body[key]
    body[last] = value


@pytest.mark.parametrize(
    ("path", "value", "words"),
    [
        ("spec.train.steps", 0, "spec.train.steps"),
        ("spec.nonsense", 1, "spec.nonsense"),
        ("spec.train.micro_batch", 8, "captured for micro-batches of 4"),
        ("spec.plan.fragments", 9, "only 6 ops"),
        ("spec.fault_tolerance.failure_timeout", 0.2, "too short"),
        ("dag.digest", "0" * 64, "upload it first"),
        ("weights.size", 5, "not 5"),
        ("data.samples", 1000, "too few for 1000 samples"),
        ("data.train_samples", 17, "more than samples"),
        ("data.feeds", {"inputs": "other"}, "nothing feeds placeholder 'inputs'"),
        ("data.kind", "tokens", "sequence_length"),
        ("resume", {"checkpoint": "nope@1"}, "no such job"),
        ("resume", {"checkpoint": "nope"}, "resume"),
        ("more", 1, "more"),
    ],
)
async def test_a_submission_is_checked_again(server: Server, path: str, value: Any, words: str) -> None:
    body = await server.submission()
    _change(body, path, value)
    status, answer = await server.call("POST", "/api/v1/jobs", json=body)
    assert status == 400
    assert words in answer["error"]
    assert (await server.call("GET", "/api/v1/jobs"))[1] == {"jobs": []}


@pytest.mark.parametrize(
    ("section", "content", "words"),
    [
        ("dag", b"not a dag", "OP-DAG"),
        ("weights", b"short", "safetensors"),
        ("weights", b"\xff" * 100, "safetensors header of"),
        ("weights", tensors_file({"first.weight": ("F32", (1,), floats(1))}), "wants float32 [2, 2]"),
        ("weights", tensors_file({"x": ("F32", (9, 9), floats(1))}), "does not fit"),
        ("weights", tensors_file({"x": ("Q4", (1,), floats(1))}), "dtype 'Q4'"),
        ("data", data_blob(15), "too few"),
        ("data", tensors_file({"inputs": ("F32", (16, 3), floats(*range(48)))}), "wants float32 [2]"),
    ],
)
async def test_a_hostile_blob_is_refused(server: Server, section: str, content: bytes, words: str) -> None:
    body = await server.submission()
    ref = (await server.put(content)).model_dump()
    if section == "data":
        body["data"]["blob"] = ref
    else:
        body[section] = ref
    status, answer = await server.call("POST", "/api/v1/jobs", json=body)
    assert status == 400
    assert words in answer["error"]


async def test_a_checkpoint_of_another_model_is_refused(server: Server) -> None:
    other = await server.put(tensors_file({"layer": ("F32", (1,), floats(1))}))
    body = await server.submission({"model": other.model_dump(), "optimizer": None, "step": 2})
    status, answer = await server.call("POST", "/api/v1/jobs", json=body)
    assert status == 400
    assert "not of this model" in answer["error"]


async def test_plain_weights_can_be_resumed_from(server: Server) -> None:
    state = tensors_file(
        {
            "first.weight": ("F32", (2, 2), floats(4, 3, 2, 1)),
            "head.weight": ("F32", (2, 2), floats(4, 3, 2, 1)),
            "second.weight": ("F32", (2, 2), floats(8, 7, 6, 5)),
            "unused.half": ("BF16", (3,), bytes(6)),
        }
    )
    model = await server.put(state)
    async with FakeWorker(server, "a") as worker:
        job = await server.submit({"model": model.model_dump(), "optimizer": None, "step": 0})
        await server.until_state(job["id"], "done")
        assert worker.weights != weights_blob()
        assert floats(4, 3, 2, 1) in worker.weights


async def _items(response: aiohttp.ClientResponse) -> list[tuple[str, dict[str, Any]]]:
    items, kind = [], ""
    async for raw in response.content:
        line = raw.decode().rstrip("\n")
        if line.startswith("event: "):
            kind = line[7:]
        elif line.startswith("data: "):
            items.append((kind, json.loads(line[6:])))
    return items


async def test_a_jobs_stream_tells_everything_once_and_ends_with_the_job(server: Server) -> None:
    async with FakeWorker(server, "a"):
        job = await server.submit(plan={"workers": 1})
        url = f"{server.url}/api/v1/jobs/{job['id']}/stream"
        async with asyncio.timeout(20), server.session.get(url) as response:
            assert response.content_type == "text/event-stream"
            live = await _items(response)
        async with asyncio.timeout(20), server.session.get(url) as response:
            recorded = await _items(response)
        for items in (live, recorded):
            assert [data["step"] for kind, data in items if kind == "metrics"] == [1, 2, 3, 4, 5, 6]
            sequence = [data["seq"] for kind, data in items if kind == "event"]
            assert sequence == sorted(set(sequence))
        assert live[-1][0] == "job"
        assert live[-1][1]["state"] == "done"
        async with server.session.get(f"{url}?after_step=4") as response:
            late = await _items(response)
        assert [data["step"] for kind, data in late if kind == "metrics"] == [5, 6]


async def test_the_pools_stream_begins_with_the_present(server: Server) -> None:
    job = await server.submit()
    async with server.session.get(f"{server.url}/api/v1/stream") as response, FakeWorker(server, "a"):
        seen: set[tuple[str, str]] = set()
        kind = ""
        async with asyncio.timeout(20):
            async for raw in response.content:
                line = raw.decode().rstrip("\n")
                if line.startswith("event: "):
                    kind = line[7:]
                elif line.startswith("data: "):
                    data = json.loads(line[6:])
                    seen.add((kind, str(data.get("state", data.get("event", "")))))
                    if (kind, str(data.get("state"))) == ("job", "done"):
                        break
    assert {("job", "queued"), ("worker", "joined"), ("worker", "busy"), ("event", "worker-joined")} <= seen
    assert job["id"]


async def test_prometheus_reads_the_metrics(server: Server) -> None:
    async with FakeWorker(server, "a") as worker:
        worker.pause_after = 2
        job = await server.submit()
        await server.until(job["id"], lambda shown: shown["step"] == 2)
        _, raw = await server.call("GET", "/metrics", None)
    samples = {
        (sample.name, *sample.labels.values()): sample.value
        for family in text_string_to_metric_families(raw.decode())
        for sample in family.samples
    }
    assert samples["fusion_coordinator_workers", "busy"] == 1
    assert samples["fusion_coordinator_jobs", "running"] == 1
    assert samples["fusion_job_step", job["id"], "tiny"] == 2
    assert samples["fusion_job_loss", job["id"], "tiny"] == 0.5
    assert samples["fusion_job_sent_bytes_total", job["id"], "tiny"] == 200
    assert any(name[0] == "fusion_build_info" for name in samples)
