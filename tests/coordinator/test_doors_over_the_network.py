"""Workers that die, stall and are started again under their names, over real sockets."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import pytest
import zmq
from coordinator_cases import FakeWorker, Server, serving

from coordinator import background, probing
from coordinator.background import Background
from coordinator.life import events as ev
from coordinator.life.books import Timing
from coordinator.life.pool import Member

PATIENT = Timing(failure_timeout=600.0, restart_grace=30.0)
"""Whatever is noticed is noticed at a door."""


class Door:
    """A worker's data port: it greets as ZeroMQ does, until it is shut."""

    def __init__(self) -> None:
        self._context: zmq.Context[zmq.Socket[bytes]] = zmq.Context()
        self._socket = self._context.socket(zmq.ROUTER)
        self.endpoint = f"tcp://127.0.0.1:{self._socket.bind_to_random_port('tcp://127.0.0.1')}"

    def shut(self) -> None:
        self._context.destroy(0)


class Worker(FakeWorker):
    """With a door of its own."""

    def __init__(self, server: Server, name: str) -> None:
        super().__init__(server, name)
        self.door = Door()
        self.endpoint = self.door.endpoint

    async def killed(self) -> None:
        await self.die()
        self.door.shut()

    async def __aexit__(self, *_: object) -> None:
        await self.killed()


@asynccontextmanager
async def patient(state: Path) -> AsyncIterator[Server]:
    async with serving(state, timing=PATIENT) as server:
        yield server


async def until(server: Server, name: str, condition: Any) -> Member:
    """Wait until the record of a worker satisfies `condition`, which its changes tell."""
    with server.engine.publisher.watch(None) as watcher:
        async with asyncio.timeout(20):
            while (member := server.engine.lifecycle.pool.get(name)) is None or not condition(member):
                assert await watcher.next() is not None
    return member


async def greeted(server: Server, *names: str) -> None:
    for name in names:
        await until(server, name, lambda member: member.greeted and member.state != "joined")


async def claim(server: Server, worker: FakeWorker) -> tuple[int, str | None, str]:
    """Ask to join; returns status, `Retry-After` and the error."""
    headers = {"Authorization": f"Bearer {server.access.join_token}"}
    url = f"{server.url}/api/v1/workers"
    async with server.session.post(url, json=worker.join_body(), headers=headers) as response:
        return response.status, response.headers.get("Retry-After"), (await response.json()).get("error", "")


async def lost(server: Server, name: str) -> Member:
    return await until(server, name, lambda member: member.state == "lost")


async def test_a_worker_whose_process_ends_is_lost_at_once_and_others_stay(tmp_path: Path) -> None:
    async with patient(tmp_path / "state") as server, Worker(server, "a") as a, Worker(server, "b"):
        await greeted(server, "a", "b")
        await a.killed()
        await lost(server, "a")
        b = server.engine.lifecycle.pool.get("b")
        assert b is not None
        assert b.live


async def test_a_worker_whose_connection_breaks_is_knocked_at_and_stays(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    knocked, refuses = asyncio.Event(), probing.refuses

    async def noted(endpoint: str) -> bool:
        answer = await refuses(endpoint)
        knocked.set()
        return answer

    monkeypatch.setattr(probing, "refuses", noted)
    async with patient(tmp_path / "state") as server, Worker(server, "a") as a:
        await greeted(server, "a")
        await a.die()  # Its heartbeats; the door stays open.
        async with asyncio.timeout(20):
            await knocked.wait()
        assert (await until(server, "a", lambda member: True)).live
        status, again, error = await claim(server, FakeWorker(server, "a"))
        assert (status, again) == (409, "1")
        assert "is in the pool, but silent" in error


async def test_a_name_is_free_again_once_its_worker_is_known_to_be_dead_also_after_a_restart(tmp_path: Path) -> None:
    async with patient(tmp_path / "state") as server:
        a = await Worker(server, "a").__aenter__()
        await greeted(server, "a")
    await a.killed()
    async with patient(tmp_path / "state") as server:
        member = server.engine.lifecycle.pool.get("a")
        assert member is not None
        assert member.live
        member.last_heard -= 10  # It was away for a while.
        status, again, error = await claim(server, FakeWorker(server, "a"))
        assert (status, again) == (409, "1"), error
        await lost(server, "a")
        assert (await claim(server, FakeWorker(server, "a")))[0] == 201


async def test_a_live_worker_keeps_its_name_whoever_asks(tmp_path: Path) -> None:
    async with patient(tmp_path / "state") as server, Worker(server, "a") as a:
        await greeted(server, "a")
        a.door.shut()  # It can't be reached, and speaks.
        for _ in range(3):
            status, again, error = await claim(server, FakeWorker(server, "a"))
            assert (status, again) == (409, None)
            assert "choose another --name" in error
        member = server.engine.lifecycle.pool.of_incarnation(a.incarnation)
        assert member is not None
        assert member.live


async def test_only_so_many_doors_are_knocked_at_in_one_moment(server: Server, monkeypatch: pytest.MonkeyPatch) -> None:
    at_once, most, full, let_go = 0, 0, asyncio.Event(), asyncio.Event()

    async def refuses(endpoint: str) -> bool:
        nonlocal at_once, most
        at_once += 1
        most = max(most, at_once)
        if at_once > background._KNOCKS:
            full.set()
        await let_go.wait()
        at_once -= 1
        return False

    monkeypatch.setattr(probing, "refuses", refuses)
    posted: list[ev.Event] = []
    engine: Any = server.engine
    work = Background(None, None, None, None, None, engine.clock, posted.append, None, None)  # type: ignore[arg-type]
    for index in range(3 * background._KNOCKS):
        for _ in range(2):
            work.begin(ev.ProbeWorker("a", str(index), "tcp://127.0.0.1:1", 0.0))
    work.begin(ev.ProbeWorker("b", "b", "tcp://127.0.0.1:1"))
    assert len(work._tasks) == 3 * background._KNOCKS + 1
    async with asyncio.timeout(20):
        await full.wait()
    assert most == background._KNOCKS + 1
    let_go.set()
    await work.settle()
    assert most == background._KNOCKS + 1
