"""Copies of checkpoints at a URL: whole, of what is kept, made up for after a restart, and never in the way of training."""

from __future__ import annotations

import asyncio
import json
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import fsspec
import pytest
from coordinator_cases import FakeWorker, Server, serving

from coordinator.life import events as ev
from coordinator.storage.checkpoints import Checkpoint
from coordinator.storage.copies import Copies
from fusion.errors import UserError

URL = "memory://copies/pool"


@pytest.fixture(autouse=True)
def store() -> Iterator[Any]:
    found = fsspec.filesystem("memory")
    yield found
    found.store.clear()


async def told(server: Server, job: str, kind: str, step: int = 6) -> str:
    """Wait until the story of this checkpoint, by default the job's last, is of this kind; what it says."""
    again = asyncio.Event()
    post = server.engine._background._post

    def heard(event: ev.Event) -> None:
        post(event)
        again.set()

    server.engine._background._post = heard
    async with asyncio.timeout(30):
        while True:
            _, answer = await server.call("GET", f"/api/v1/jobs/{job}/events")
            for event in answer["events"]:
                if event["event"] == kind and event["step"] == step:
                    return str(event["message"])
            await again.wait()
            again.clear()


async def test_the_checkpoints_that_are_kept_are_there_too(tmp_path: Path, store: Any) -> None:
    async with serving(tmp_path / "state", checkpoints_to=URL) as server, FakeWorker(server, "a"):
        job = (await server.submit(checkpoint={"every": 2, "keep": 1}))["id"]
        await server.until_state(job, "done")
        assert await told(server, job, "checkpoint-copied") == f"checkpoint at step 6 copied to {URL}/{job}/6"
        kept = server.engine.checkpoints.folder(job, 6)
    there = sorted(store.find("/copies/pool"))
    assert there == [
        f"/copies/pool/{job}/6/{name}" for name in ("checkpoint.json", "model.safetensors", "optimizer.safetensors")
    ]
    manifest = json.loads(store.cat(there[0]))
    assert (manifest["job"], manifest["step"]) == (job, 6)
    for part in ("model", "optimizer"):
        content = store.cat(f"/copies/pool/{job}/6/{part}.safetensors")
        assert content == (kept / f"{part}.safetensors").read_bytes()
        assert manifest[part]["size"] == len(content)


async def test_a_store_that_is_away_is_told_of_and_made_up_for_at_the_next_start(
    tmp_path: Path, store: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    def away(*_: object, **__: object) -> None:
        raise ConnectionError("the store is away")

    with monkeypatch.context() as patched:
        patched.setattr(type(store), "put_file", away)
        async with serving(tmp_path / "state", checkpoints_to=URL) as server, FakeWorker(server, "a"):
            job = (await server.submit())["id"]
            await server.until_state(job, "done")
            words = await told(server, job, "checkpoint-copy-failed")
    assert words.startswith(f"checkpoint at step 6 could not be copied to {URL}/{job}/6: {URL}: can't write {job}/6/")
    assert words.endswith("the store is away; it is kept here")
    assert not store.find("/copies")
    async with serving(tmp_path / "state", checkpoints_to=URL) as server:
        await told(server, job, "checkpoint-copied")
    assert len(store.find(f"/copies/pool/{job}/6")) == 3


async def test_copies_that_are_not_made_any_more_leave_no_older_ones_behind(
    tmp_path: Path, store: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """While the first is under way two more checkpoints are written: the second has gone before its turn comes."""
    over, write = threading.Event(), Copies.write

    def slowly(self: Copies, found: Checkpoint) -> None:
        write(self, found)
        assert over.wait(30)

    monkeypatch.setattr(Copies, "write", slowly)
    async with serving(tmp_path / "state", checkpoints_to=URL) as server, FakeWorker(server, "a"):
        job = (await server.submit(checkpoint={"every": 2, "keep": 1}))["id"]
        await server.until_state(job, "done")
        over.set()
        await told(server, job, "checkpoint-copied")
    assert {path.split("/")[4] for path in store.find("/copies/pool")} == {"6"}


async def test_an_older_copy_stays_until_there_is_a_newer_one(
    tmp_path: Path, store: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    put = type(store).put_file

    def full(self: Any, local: str, remote: str, *rest: Any, **options: Any) -> None:
        if remote.endswith("/6/model.safetensors"):
            raise OSError("the quota is used up")
        put(self, local, remote, *rest, **options)

    monkeypatch.setattr(type(store), "put_file", full)
    async with serving(tmp_path / "state", checkpoints_to=URL) as server, FakeWorker(server, "a") as worker:
        worker.pause_after = 4
        job = (await server.submit(checkpoint={"every": 2, "keep": 1}))["id"]
        await told(server, job, "checkpoint-copied", 4)
        worker.pause_after = None
        await told(server, job, "checkpoint-copy-failed")
    assert f"/copies/pool/{job}/4/checkpoint.json" in store.find("/copies/pool")
    assert not store.find(f"/copies/pool/{job}/2")


async def test_a_url_that_can_not_be_used_is_one_line_at_the_start(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="nonsense://x: can't be used"):
        async with serving(tmp_path / "state", checkpoints_to="nonsense://x"):
            pass
