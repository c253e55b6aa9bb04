"""Whether the address that a joining worker names is tried, and what is said of it."""

from __future__ import annotations

import asyncio
import socket

import pytest
from coordinator_cases import FakeWorker, Server

from coordinator.entry import knock
from coordinator.entry.knock import can_be_reached


async def test_an_open_port_and_a_closed_one_are_told_apart(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(knock, "is_loopback", lambda host: False)
    came = asyncio.Event()
    server = await asyncio.start_server(lambda reader, writer: (came.set(), writer.close()), "127.0.0.1", 0)  # type: ignore[arg-type, return-value]
    async with server:
        port = server.sockets[0].getsockname()[1]
        assert await can_be_reached(f"tcp://127.0.0.1:{port}", "127.0.0.1") is True
        await asyncio.wait_for(came.wait(), 20)
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))  # Nobody listens there, and nobody else can.
        assert await can_be_reached(f"tcp://127.0.0.1:{taken.getsockname()[1]}", "127.0.0.1") is False


@pytest.mark.parametrize(
    ("endpoint", "seen_as"),
    [
        ("tcp://127.0.0.1:1", "127.0.0.1"),
        ("tcp://192.0.2.5:22", "192.0.2.6"),
        ("tcp://192.0.2.5", "192.0.2.5"),
        ("tcp://192.0.2.5:99999", "192.0.2.5"),
        ("nonsense", ""),
    ],
)
async def test_what_tells_nothing_or_is_not_the_workers_own_is_not_tried(
    endpoint: str, seen_as: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    async def open_connection(*_: object) -> None:
        raise AssertionError("it was tried")

    monkeypatch.setattr(asyncio, "open_connection", open_connection)
    assert await can_be_reached(endpoint, seen_as) is None


async def test_who_joins_hears_how_it_is_seen_and_what_time_it_is(server: Server) -> None:
    status, answer = await server.call("POST", "/api/v1/workers", "join", json=FakeWorker(server, "a").join_body())
    assert status == 201
    assert (answer["seen_as"], answer["reachable"]) == ("127.0.0.1", None)
    assert answer["time"] > 1.7e9
