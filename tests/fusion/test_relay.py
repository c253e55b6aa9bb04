"""The relay: whoever holds a pair's ticket is joined with the other end; nobody else gets anything, and takes little."""

from __future__ import annotations

import asyncio
import os
import signal
import socket
import subprocess
import threading
from collections.abc import AsyncIterator, Iterator

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fusion.relay import child, handshake, server
from fusion.relay.child import RelayProcess
from fusion.relay.desk import Desk, Limits
from fusion.relay.handshake import ANSWER_BYTES, RefusedError, Role, enter
from fusion.relay.port import listen as listen_on
from fusion.relay.server import RelayServer
from fusion.relay.splice import Stream

TICKET, SECRET = b"t" * 16, b"s" * 32
OTHER = b"o" * 16
LIMITS = Limits(arrived=2, per_ticket=4, connections=6)


# Who is let in, without sockets ---------------------------------------------------------------------------------------


def desk_with(*waiting: Role) -> Desk:
    desk = Desk(LIMITS, {TICKET: SECRET})
    for number, role in enumerate(waiting):
        assert desk.arrived(number, 0.0)
        assert desk.showed(number, TICKET, role, 0.0) is None
    return desk


def test_the_two_ends_of_a_ticket_are_joined_and_go_together() -> None:
    desk = desk_with("call")
    assert desk.arrived(1, 1.0)
    assert desk.showed(1, TICKET, "answer", 1.0) == 0
    assert desk.joined == 1
    assert desk.gone(0) == 1
    assert desk.gone(1) is None
    assert len(desk) == 0


def test_two_of_one_role_or_of_two_tickets_are_not_joined() -> None:
    desk = desk_with("call", "call")
    desk.arrived(2, 0.0)
    assert desk.showed(2, OTHER, "answer", 0.0) is None
    assert desk.joined == 0


def test_strangers_and_tickets_take_a_bounded_number_of_connections() -> None:
    desk = desk_with("call", "call", "call", "call")
    assert desk.arrived(4, 0.0)
    with pytest.raises(PermissionError):
        desk.showed(4, TICKET, "call", 0.0)
    assert desk.arrived(5, 0.0)
    assert not desk.arrived(6, 0.0)
    desk.denied(5)
    assert desk.refused == 3
    assert desk.arrived(6, 0.0)


def test_time_ends_for_who_shows_nothing_waits_or_is_silent() -> None:
    desk = desk_with("call")
    desk.arrived(1, 0.0)
    assert desk.overdue(LIMITS.arrived_seconds + 1) == [1]
    desk.showed(1, TICKET, "answer", 3.0)
    assert desk.overdue(LIMITS.waiting_seconds + 5) == []
    desk.moved(0, 100.0)
    assert desk.overdue(99.0 + LIMITS.silent_seconds) == []
    assert desk.overdue(101.0 + LIMITS.silent_seconds) == [0, 1]


def test_a_ticket_that_is_taken_back_ends_its_streams() -> None:
    desk = desk_with("call")
    desk.arrived(1, 0.0)
    assert desk.allow({TICKET: SECRET}) == []
    assert desk.allow({OTHER: SECRET}) == [0]


@given(
    st.lists(st.tuples(st.sampled_from(["arrive", "call", "answer", "gone", "deny"]), st.integers(0, 9)), max_size=60)
)
@settings(max_examples=150, deadline=None)
def test_whatever_comes_the_books_stay_right(events: list[tuple[str, int]]) -> None:
    desk, shown, here = Desk(LIMITS, {TICKET: SECRET}), set[int](), set[int]()
    for what, number in events:
        if what == "arrive" and number not in here:
            if desk.arrived(number, 0.0):
                here.add(number)
        elif what in ("call", "answer") and number in here - shown:
            try:
                partner = desk.showed(number, TICKET, what, 0.0)  # type: ignore[arg-type]
            except PermissionError:
                desk.gone(number)
                here.discard(number)
                continue
            shown.add(number)
            assert partner is None or partner in shown - {number}
        elif what == "gone":
            other = desk.gone(number)
            assert other is None or other in here - {number}
            for each in (number, other):
                here.discard(each)  # type: ignore[arg-type]
                shown.discard(each)  # type: ignore[arg-type]
            if other is not None:
                assert desk.gone(other) is None
        elif what == "deny" and number in here - shown:
            desk.denied(number)
            here.discard(number)
        assert len(desk) == len(here) <= LIMITS.connections
        assert len(shown) <= LIMITS.per_ticket
        assert 2 * desk.joined <= len(shown)


@given(st.binary(min_size=ANSWER_BYTES, max_size=ANSWER_BYTES))
def test_no_bytes_pass_for_a_proof_and_an_overheard_one_is_worth_nothing_later(noise: bytes) -> None:
    first, second = handshake.challenge(), handshake.challenge()
    proof = handshake.answer(first, TICKET, SECRET, "call")
    assert handshake.shown(first, proof, {TICKET: SECRET}) == (TICKET, "call")
    assert handshake.shown(second, proof, {TICKET: SECRET}) is None
    assert handshake.shown(first, proof, {OTHER: SECRET}) is None
    assert handshake.shown(first, proof.replace(b"C", b"A", 1), {TICKET: SECRET}) is None
    assert handshake.shown(first, noise, {TICKET: SECRET}) is None


# Over sockets ---------------------------------------------------------------------------------------------------------


def listen() -> socket.socket:
    listener = listen_on("127.0.0.1", 0)
    listener.setblocking(False)
    return listener


@pytest.fixture
async def relay() -> AsyncIterator[tuple[RelayServer, int]]:
    found, listener = RelayServer(Limits(arrived=2)), listen()
    await found.start(listener)
    found.allow({TICKET: SECRET})
    yield found, listener.getsockname()[1]
    await found.close()


async def end(port: int, role: Role, ticket: bytes = TICKET, secret: bytes = SECRET) -> Stream:
    reader, writer = await asyncio.open_connection("127.0.0.1", port)
    await enter(reader, writer, ticket, secret, role)
    return reader, writer


async def joined(port: int) -> tuple[Stream, Stream]:
    async with asyncio.timeout(10):
        first, second = await asyncio.gather(end(port, "call"), end(port, "answer"))
    return first, second


async def test_bytes_go_both_ways_as_they_are_and_one_end_takes_the_other_along(relay: tuple[RelayServer, int]) -> None:
    served, port = relay
    (reader, writer), (far_reader, far_writer) = await joined(port)
    sent = os.urandom(3_000_000)
    writer.write(sent)
    far_writer.write(sent[::-1])
    async with asyncio.timeout(20):
        assert await far_reader.readexactly(len(sent)) == sent
        assert await reader.readexactly(len(sent)) == sent[::-1]
        assert served.bytes == 2 * len(sent)
        writer.close()
        assert await far_reader.read() == b""


async def test_one_ticket_joins_several_pairs(relay: tuple[RelayServer, int]) -> None:
    pairs = [await joined(relay[1]) for _ in range(3)]
    for number, ((_, writer), (reader, _)) in enumerate(pairs):
        writer.write(bytes([number]) * 5)
        assert await asyncio.wait_for(reader.readexactly(5), 10) == bytes([number]) * 5
    assert relay[0].desk.joined == 3


@pytest.mark.parametrize(("ticket", "secret"), [(OTHER, SECRET), (TICKET, b"x" * 32)])
async def test_without_the_ticket_nobody_gets_through(
    relay: tuple[RelayServer, int], ticket: bytes, secret: bytes
) -> None:
    served, port = relay
    waits = asyncio.create_task(end(port, "answer"))
    with pytest.raises(RefusedError):
        await asyncio.wait_for(end(port, "call", ticket, secret), 10)
    assert not waits.done()
    assert served.desk.refused == 1
    waits.cancel()


async def test_a_ticket_that_is_taken_back_closes_what_is_open(relay: tuple[RelayServer, int]) -> None:
    served, port = relay
    (reader, _), _ = await joined(port)
    served.allow({})
    with pytest.raises((ConnectionError, asyncio.IncompleteReadError)):
        await asyncio.wait_for(reader.readexactly(1), 10)


async def test_an_end_that_reads_nothing_stops_the_other_and_takes_bounded_memory(
    relay: tuple[RelayServer, int],
) -> None:
    served, port = relay
    (_, writer), (far_reader, _) = await joined(port)
    far_reader._transport.pause_reading()  # type: ignore[attr-defined]

    async def flood() -> None:
        for _ in range(200):
            writer.write(bytes(2**20))
            await asyncio.wait_for(writer.drain(), 0.5)

    with pytest.raises(TimeoutError):
        await flood()
    assert served.bytes < 100 * 2**20  # The kernel's own buffers take some.


async def test_whoever_shows_nothing_is_sent_away(
    relay: tuple[RelayServer, int], monkeypatch: pytest.MonkeyPatch
) -> None:
    port = relay[1]
    idle = [await asyncio.open_connection("127.0.0.1", port) for _ in range(2)]
    for reader, _ in idle:
        await reader.readexactly(40)
    with pytest.raises(RefusedError):
        await asyncio.wait_for(end(port, "call"), 10)
    monkeypatch.setattr(server, "monotonic", lambda: 1e9)
    for reader, _ in idle:
        with pytest.raises((ConnectionError, asyncio.IncompleteReadError)):
            await asyncio.wait_for(reader.readexactly(1), 10)
    monkeypatch.undo()
    assert await joined(port)


async def test_an_end_that_speaks_before_it_is_joined_is_dropped(relay: tuple[RelayServer, int]) -> None:
    reader, writer = await asyncio.open_connection("127.0.0.1", relay[1])
    challenged = await reader.readexactly(40)
    writer.write(handshake.answer(challenged, TICKET, SECRET, "call") + b"early")
    with pytest.raises((ConnectionError, asyncio.IncompleteReadError)):
        await asyncio.wait_for(reader.readexactly(1), 10)


# In a process of its own ----------------------------------------------------------------------------------------------


@pytest.fixture
def process() -> Iterator[RelayProcess]:
    found = RelayProcess(listen())
    yield found
    found.close()


async def test_the_process_serves_with_the_first_ticket_and_is_back_after_its_death(process: RelayProcess) -> None:
    process.allow({})
    assert process.pid is None
    process.allow({TICKET.hex(): SECRET.hex()})
    async with asyncio.timeout(60):
        (reader, _), far = pair = await until_joined(process.port)
        far[1].write(b"hello")
        assert await reader.readexactly(5) == b"hello"
        assert process.pid is not None
        os.kill(process.pid, signal.SIGKILL)
        with pytest.raises((ConnectionError, asyncio.IncompleteReadError)):
            await reader.readexactly(1)
        assert await until_joined(process.port) != pair


async def until_joined(port: int) -> tuple[Stream, Stream]:
    """As workers do: a relay that has just begun may not have heard of the ticket."""
    while True:
        try:
            return await joined(port)
        except ConnectionError:
            continue


async def test_a_process_that_can_not_be_started_is_tried_again(
    process: RelayProcess, monkeypatch: pytest.MonkeyPatch
) -> None:
    started, refused = subprocess.Popen, threading.Event()

    def no_room(*_: object, **__: object) -> None:
        monkeypatch.setattr(child.subprocess, "Popen", started)
        refused.set()
        raise BlockingIOError("no more processes")

    monkeypatch.setattr(child.subprocess, "Popen", no_room)
    process.allow({OTHER.hex(): SECRET.hex()})
    assert await asyncio.to_thread(refused.wait, 20)
    process.allow({TICKET.hex(): SECRET.hex()})
    async with asyncio.timeout(60):
        await until_joined(process.port)
