"""A worker's door: only a refused connection says that its process is gone."""

from __future__ import annotations

import asyncio
import socket

import pytest
import zmq

from coordinator.probing import refuses


def free_port() -> int:
    with socket.create_server(("127.0.0.1", 0)) as listener:
        return int(listener.getsockname()[1])


async def test_nobody_listens() -> None:
    assert await refuses(f"tcp://127.0.0.1:{free_port()}")


async def test_a_live_worker_greets() -> None:
    context: zmq.Context[zmq.Socket[bytes]] = zmq.Context()
    router = context.socket(zmq.ROUTER)
    try:
        port = router.bind_to_random_port("tcp://127.0.0.1")
        assert not await refuses(f"tcp://127.0.0.1:{port}")
    finally:
        router.close(0)
        context.term()


async def test_a_stalled_worker_is_left_to_its_heartbeats() -> None:
    with socket.create_server(("127.0.0.1", 0)) as listener:  # Accepts, as the kernel does for a stopped process.
        assert not await refuses(f"tcp://127.0.0.1:{listener.getsockname()[1]}", 0.1)


async def test_a_process_that_is_being_taken_down_is_tried_again() -> None:
    knocks = 0

    async def hang_up(_: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        nonlocal knocks
        knocks += 1
        server.close()
        writer.close()

    server = await asyncio.start_server(hang_up, "127.0.0.1", 0)
    port = server.sockets[0].getsockname()[1]
    assert await refuses(f"tcp://127.0.0.1:{port}", 5.0)
    assert knocks == 1


async def test_a_connection_that_is_reset_before_it_stands_is_tried_again(monkeypatch: pytest.MonkeyPatch) -> None:
    answers = [ConnectionResetError(), ConnectionRefusedError()]

    async def connect(host: str, port: int) -> None:
        raise answers.pop(0)

    monkeypatch.setattr(asyncio, "open_connection", connect)
    assert await refuses("tcp://127.0.0.1:1", 5.0)
    assert not answers


async def test_an_answer_that_was_lost_is_asked_for_again() -> None:
    knocked = asyncio.Event()

    async def say_nothing(_: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        knocked.set()
        server.close()

    server = await asyncio.start_server(say_nothing, "127.0.0.1", 0)
    port = server.sockets[0].getsockname()[1]
    assert await refuses(f"tcp://127.0.0.1:{port}", 5.0)
    assert knocked.is_set()


async def test_an_address_that_can_t_be_reached_says_nothing() -> None:
    assert not await refuses("tcp://host.invalid:1", 0.5)
    assert not await refuses("tcp://nowhere", 0.1)
    assert not await refuses("tcp://host:port", 0.1)
