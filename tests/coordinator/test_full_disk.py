"""A coordinator that can't write says so, tells nobody what is not on record, and goes on where it was once it can."""

from __future__ import annotations

import asyncio
import json
import logging
import os
import resource
import signal
import sqlite3
import sys
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import asynccontextmanager, contextmanager
from pathlib import Path
from typing import Any

import aiohttp
import pytest
from coordinator_cases import TIMING, FakeWorker, Server, serving

from coordinator import engine as engine_module
from coordinator.backlog import Backlog
from coordinator.life import events as ev
from fusion.errors import ServiceError
from fusion.messages import Heartbeat, Leaving, Stop


class Heard(logging.Handler):
    """What the coordinator logs; `until` waits for a line."""

    def __init__(self) -> None:
        super().__init__()
        self.lines: list[str] = []
        self._changed = asyncio.Event()

    def emit(self, record: logging.LogRecord) -> None:
        self.lines.append(record.getMessage())
        self._changed.set()

    async def until(self, part: str) -> None:
        async with asyncio.timeout(20):
            while not any(part in line for line in self.lines):
                self._changed.clear()
                await self._changed.wait()


@pytest.fixture
def heard() -> Iterator[Heard]:
    handler, logger = Heard(), logging.getLogger("coordinator")
    logger.addHandler(handler)
    yield handler
    logger.removeHandler(handler)


@contextmanager
def locked(state: Path) -> Iterator[sqlite3.Connection]:
    """Nothing can be written to the coordinator's store, until the connection's transaction ends."""
    other = sqlite3.connect(state / "coordinator.sqlite3", isolation_level=None)
    other.execute("BEGIN IMMEDIATE")
    try:
        yield other
    finally:
        other.close()


async def test_a_job_goes_on_and_loses_nothing(server: Server, tmp_path: Path, heard: Heard) -> None:
    async with FakeWorker(server, "a") as a, FakeWorker(server, "b") as b:
        a.pause_after = b.pause_after = 2
        submission = await server.submission()
        job = (await server.submit())["id"]
        await server.until(job, lambda shown: shown["step"] == 2)
        with locked(tmp_path / "state") as other:
            a.pause_after = b.pause_after = None
            await heard.until("can't write to")
            for path, body in (("/api/v1/jobs", submission), ("/api/v1/workers/a/drain", None)):
                status, answer = await server.call("POST", path, json=body)
                assert (status, "database is locked" in answer["error"]) == (503, True)
            status, _ = await server.call("POST", "/api/v1/workers", "join", json=a.join_body(name="c"))
            assert status == 503
            assert (await server.call("GET", "/healthz"))[1]["unwritten"] == "database is locked"
            assert server.engine.observations.pulse(server.engine.lifecycle.pool, 0.0)["unwritten"]
            # Both have finished; that the job is done would be said, if it could be recorded.
            async with asyncio.timeout(20):
                while server.control.received.get("finished", 0) < 2:
                    assert (await server.job(job))["state"] == "running"
            assert len(server.engine.store.metrics(job)) < 6
            assert not any(isinstance(message, Stop) for worker in (a, b) for message in worker.received)
            other.execute("COMMIT")
            await server.until_state(job, "done")
        metrics = server.engine.store.metrics(job)
        assert [(metric["step"], metric["loss"]) for metric in metrics] == [(n, 1 / n) for n in range(1, 7)]
        events = server.engine.store.events()
        assert [event["seq"] for event in events] == list(range(1, len(events) + 1))
        assert [event["event"] for event in events].count("written-late") == 1
        assert sum("can't write to" in line for line in heard.lines) == 1
        assert (await server.call("GET", "/healthz"))[1]["unwritten"] is None
        await server.submit()


async def test_who_was_silent_only_because_nothing_could_be_written_is_not_lost(
    server: Server, tmp_path: Path, heard: Heard
) -> None:
    async with FakeWorker(server, "a"):
        with locked(tmp_path / "state") as other:
            server.engine.store.pin("x", ["y"])
            server.engine.store.commit()
            beats = server.control.received.get("heartbeat", 0)
            async with asyncio.timeout(20):
                # Longer than the failure timeout, in heartbeats.
                while server.control.received.get("heartbeat", 0) < beats + 12 / TIMING.failure_timeout:
                    await server.call("GET", "/healthz")
            assert len(server.engine._backlog) <= 1
            other.execute("COMMIT")
            await heard.until("can be written again")
        member = server.engine.lifecycle.pool.get("a")
        assert member is not None
        assert member.live


def test_of_heartbeats_the_last_is_kept_in_its_place() -> None:
    backlog = Backlog()
    backlog.hold(ev.Reported(1.0, "a", Heartbeat(incarnation="a", memory_used_bytes=1)))
    backlog.hold(ev.Reported(2.0, "a", Leaving(reason="x")))
    backlog.hold(ev.ClockTicked(2.5))
    backlog.hold(ev.Reported(3.0, "a", Heartbeat(incarnation="a", memory_used_bytes=3)))
    backlog.hold(ev.Reported(4.0, "b", Heartbeat(incarnation="b", memory_used_bytes=4)))
    times = [getattr(backlog.next(), "time", None) for _ in range(4)]
    assert times == [2.0, 3.0, 4.0, None]


async def test_a_store_that_can_never_be_written_ends_the_coordinator_in_one_line(tmp_path: Path) -> None:
    def forbid(server: Server) -> None:
        server.engine.store._db.execute("PRAGMA query_only=1")
        server.engine.store.pin("x", ["y"])

    with pytest.raises(ServiceError, match=r"can't write to .*readonly database; mend or move it"):
        await _until_it_ends(tmp_path / "state", forbid)


async def _until_it_ends(state: Path, harm: Callable[[Server], object]) -> None:
    """A coordinator that is harmed ends by itself, and raises why."""
    async with serving(state) as server:
        harm(server)
        async with asyncio.timeout(20):
            await server.engine.failing.wait()


# Whatever else fails ----------------------------------------------------------------------------------------------


class Faulty:
    """Makes the life cycle fail at the next so many events of a kind."""

    def __init__(self, server: Server, kind: type[Any], times: int) -> None:
        self.over = asyncio.Event()
        self._handle, self._kind, self._left = server.engine.lifecycle.handle, kind, times
        server.engine.lifecycle.handle = self  # type: ignore[method-assign,assignment]

    def __call__(self, event: ev.Event) -> list[ev.Instruction]:
        if self._left and isinstance(event, self._kind):
            self._left -= 1
            if not self._left:
                self.over.set()
            raise KeyError("a mistake in the rules")
        return self._handle(event)


@pytest.mark.parametrize("kind", [ev.ClockTicked, ev.Reported, ev.ConnectionClosed])
async def test_an_event_that_can_not_be_handled_is_logged_and_others_follow(
    server: Server, heard: Heard, kind: type[Any]
) -> None:
    async with FakeWorker(server, "a"):
        faulty = Faulty(server, kind, 1)
        async with FakeWorker(server, "b"):
            pass
        async with asyncio.timeout(20):
            await faulty.over.wait()
        job = await server.submit()
        await server.until_state(job["id"], "done")
    assert any("failed" in line for line in heard.lines)


async def test_ticks_that_fail_for_ever_end_the_coordinator_in_one_line(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(engine_module, "_FAILING_TICKS", 3)
    with pytest.raises(ServiceError, match="can't go on: KeyError: 'a mistake in the rules'"):
        await _until_it_ends(tmp_path / "state", lambda server: Faulty(server, ev.ClockTicked, 3))


# As a process -----------------------------------------------------------------------------------------------------

_RUN = """
import sys
from pathlib import Path
from coordinator import CoordinatorConfig, run_coordinator
sys.exit(run_coordinator(CoordinatorConfig(state=Path(sys.argv[1]), port=0, json_ready=True, relay=False)))
"""


class Daemon:
    """A coordinator's process; `give_room` says whether it may write to files."""

    def __init__(self, process: asyncio.subprocess.Process, ready: dict[str, str], session: aiohttp.ClientSession):
        self.process = process
        self.ready = ready
        self.session = session

    def give_room(self, room: bool) -> None:
        # With a limit on the size of files, writing fails like on a full disk.
        resource.prlimit(self.process.pid, resource.RLIMIT_FSIZE, (resource.RLIM_INFINITY if room else 1, -1))

    async def call(self, method: str, path: str, body: object = None) -> tuple[int, Any]:
        headers = {"Authorization": f"Bearer {self.ready['token']}"}
        async with self.session.request(method, self.ready["url"] + path, json=body, headers=headers) as answer:
            return answer.status, await answer.json()

    async def line(self) -> str:
        assert self.process.stderr is not None
        return (await self.process.stderr.readline()).decode()


@asynccontextmanager
async def running(state: Path) -> AsyncIterator[Daemon]:
    process = await asyncio.create_subprocess_exec(
        *(sys.executable, "-c", _RUN, str(state)),
        stdout=asyncio.subprocess.PIPE,
        stderr=asyncio.subprocess.PIPE,
        env={**os.environ, "FUSION_CONFIG_DIR": str(state / "config")},
    )
    try:
        assert process.stdout is not None
        async with asyncio.timeout(60), aiohttp.ClientSession() as session:
            ready = json.loads(await process.stdout.readline())
            yield Daemon(process, ready, session)
    finally:
        if process.returncode is None:
            process.kill()
            await process.wait()


needs_limits = pytest.mark.skipif(not hasattr(resource, "prlimit"), reason="needs Linux")
_TOKEN = {"role": "viewer"}


@needs_limits
async def test_a_short_lack_of_room_is_said_and_passes(tmp_path: Path) -> None:
    async with running(tmp_path / "state") as daemon:
        daemon.give_room(False)
        making = asyncio.create_task(daemon.call("POST", "/api/v1/tokens", _TOKEN))
        assert "can't write to" in await daemon.line()
        status, answer = await daemon.call("POST", "/api/v1/tokens", _TOKEN)
        assert (status, "nothing was done" in answer["error"]) == (503, True)
        assert not making.done()
        daemon.give_room(True)
        assert "can be written again" in await daemon.line()
        assert (await making)[0] == 201
        events = (await daemon.call("GET", "/api/v1/events"))[1]["events"]
        assert "written-late" in [event["event"] for event in events]
        daemon.process.send_signal(signal.SIGTERM)
        assert (await daemon.process.communicate())[1] == b""
        assert daemon.process.returncode == 0


@needs_limits
async def test_a_coordinator_that_has_to_end_without_room_says_so(tmp_path: Path) -> None:
    async with running(tmp_path / "state") as daemon:
        daemon.give_room(False)
        making = asyncio.create_task(daemon.call("POST", "/api/v1/tokens", _TOKEN))
        await daemon.line()
        daemon.process.send_signal(signal.SIGTERM)
        _, errors = await daemon.process.communicate()
        assert daemon.process.returncode == 1
        assert errors.decode().startswith("error: can't write to ")
        assert errors.count(b"\n") == 1
        making.cancel()
        await asyncio.gather(making, return_exceptions=True)
