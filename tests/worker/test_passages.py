"""Peers over a relay: what arrives is what was sent, encrypted from end to end, and the relay's death is no peer's."""

from __future__ import annotations

import asyncio
import logging
import os
import queue
import signal
import threading
from collections.abc import Callable, Iterator
from dataclasses import replace

import pytest
import torch
from test_mover import ACTIVATION, EDGE, End, make_end

from fusion.messages import RelayPass, UseRelay
from fusion.relay import server
from fusion.relay import splice as splicing
from fusion.relay.child import RelayProcess
from fusion.relay.port import listen
from fusion.relay.server import RelayServer
from fusion.wire import FrameKind, Header
from worker.transport import handshakes, passages, peer_watch
from worker.transport.parcel import Parcel
from worker.transport.probe_socket import measure_link, why_out_of_reach
from worker.transport.route import Route

TICKETS = {name: (letter * 32, letter * 64) for name, letter in (("a", "1"), ("b", "2"))}
"""Who calls -> ticket and secret."""


@pytest.fixture
def ends(monkeypatch: pytest.MonkeyPatch) -> Iterator[tuple[End, End]]:
    """Two workers with addresses where nobody listens."""
    monkeypatch.setattr(handshakes, "AWAY_SECONDS", 0.3)
    monkeypatch.setattr(peer_watch, "AWAY_SECONDS", 0.3)
    a, b = make_end("a"), make_end("b")
    for end in (a, b):
        port = end.address.endpoint.rpartition(":")[2]
        end.address = end.address.model_copy(update={"endpoint": f"tcp://127.0.0.9:{port}"})
    yield a, b
    a.mover.close()
    b.mover.close()


def use(port: int, me: End, other: End) -> None:
    def found(caller: End) -> RelayPass:
        ticket, secret = TICKETS[caller.name]
        return RelayPass(host="127.0.0.1", port=port, ticket=ticket, secret=secret)

    order = UseRelay(peer=other.name, public_key=other.address.public_key, call=found(me), answer=found(other))
    me.mover.use(order)


def use_both(port: int, a: End, b: End) -> None:
    use(port, a, b)
    use(port, b, a)


def connect(a: End, b: End) -> tuple[Route, Route]:
    """As two workers do: both admit, then each waits for the other to let it in."""
    a.mover.admit([b.address])
    b.mover.admit([a.address])
    found: dict[str, Route] = {}
    waits = [
        threading.Thread(target=lambda me=me, other=other: found.update({me.name: me.open(other)}))
        for me, other in ((a, b), (b, a))
    ]
    for thread in waits:
        thread.start()
    for thread in waits:
        thread.join(60)
    return found["a"], found["b"]


def until_arrived(route: Route, to: End) -> torch.Tensor:
    """Send, as often as it takes: what was on its way through a relay that died is lost."""
    for micro_batch in range(3):
        for _ in range(100):
            route.send(to.name, replace(ACTIVATION, micro_batch=micro_batch), Parcel(torch.ones(2, 6)))
            try:
                _, value = to.arrived.get(timeout=0.1)
            except queue.Empty:
                continue
            assert value is not None
            return value
    raise AssertionError("nothing arrives")


def test_workers_that_find_out_meet_at_a_relay_and_its_death_is_not_that_of_a_peer(ends: tuple[End, End]) -> None:
    a, b = ends
    relay = RelayProcess(listen("127.0.0.1", 0))
    reached, told = queue.SimpleQueue[str](), threading.Event()

    def unreached(name: str) -> None:
        """What the coordinator does."""
        assert name == "b"
        if not told.is_set():
            told.set()
            relay.allow(dict(TICKETS.values()))
            threading.Thread(target=use_both, args=(relay.port, a, b)).start()

    a.mover._unreached, a.mover._reached = unreached, reached.put
    try:
        to_b, to_a = connect(a, b)
        assert told.is_set()
        assert reached.get(timeout=20) == "b"
        assert torch.equal(until_arrived(to_b, b), torch.ones(2, 6))
        to_a.send("a", Header("job-1", 0, FrameKind.GRADIENT, EDGE, 1, 0), Parcel(None))
        assert a.next()[0].kind is FrameKind.GRADIENT
        assert relay.pid is not None
        os.kill(relay.pid, signal.SIGKILL)
        assert reached.get(timeout=20) == "b"
        until_arrived(to_b, b)
        assert a.lost.empty()
        assert not {"malformed", "unknown key holder"} & set(b.mover.refused)
    finally:
        relay.close()


def test_a_way_that_fails_for_a_defect_is_told_in_the_log(monkeypatch: pytest.MonkeyPatch) -> None:
    logged: queue.SimpleQueue[str] = queue.SimpleQueue()

    async def broken(*_: object) -> None:
        raise RuntimeError("a defect")

    monkeypatch.setattr(
        logging.getLogger("fusion.worker"), "error", lambda *words, **_: logged.put(words[0] % words[1:])
    )
    monkeypatch.setattr(passages, "_enter", broken)
    ways, found = passages.Passages(), RelayPass(host="127.0.0.1", port=1, ticket="1" * 32, secret="1" * 64)
    ways.use(UseRelay(peer="b", public_key="k" * 40, call=found, answer=found))
    assert logged.get(timeout=20) == "answer b failed"
    ways.close()


class Tapped:
    """A relay in a thread of this process that looks at what it copies, and may change it."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, change: Callable[[bytes], bytes] = lambda seen: seen) -> None:
        self.seen: list[bytes] = []
        self._loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self._loop.run_forever, daemon=True)
        self._thread.start()
        listener = listen("127.0.0.1", 0)
        listener.setblocking(False)
        self.port = listener.getsockname()[1]
        self._server = RelayServer()
        loop, seen = self._loop, self.seen

        class Reader:
            def __init__(self, reader: asyncio.StreamReader) -> None:
                self._reader = reader

            async def read(self, count: int) -> bytes:
                chunk = await self._reader.read(count)
                if asyncio.get_running_loop() is loop:
                    seen.append(chunk)
                    chunk = change(chunk)
                return chunk

        async def tapped(first: splicing.Stream, second: splicing.Stream, moved: Callable[[int, int], None]) -> None:
            await splicing.splice((Reader(first[0]), first[1]), (Reader(second[0]), second[1]), moved)  # type: ignore[arg-type]

        monkeypatch.setattr(server, "splice", tapped)
        self._run(self._server.start(listener))
        tickets = {bytes.fromhex(ticket): bytes.fromhex(secret) for ticket, secret in TICKETS.values()}
        self._loop.call_soon_threadsafe(self._server.allow, tickets)

    def _run(self, work: object) -> None:
        asyncio.run_coroutine_threadsafe(work, self._loop).result(20)  # type: ignore[arg-type]

    def close(self) -> None:
        self._run(self._server.close())
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join()
        self._loop.close()


def test_a_relay_sees_no_tensor_no_header_and_no_secret(ends: tuple[End, End], monkeypatch: pytest.MonkeyPatch) -> None:
    a, b = ends
    relay = Tapped(monkeypatch)
    use_both(relay.port, a, b)
    to_b, _ = connect(a, b)
    value = torch.full((2, 6), 1.2345678)
    to_b.send("b", ACTIVATION, Parcel(value))
    _, arrived = b.next()
    assert arrived is not None
    assert torch.equal(arrived, value)
    relay.close()
    seen = b"".join(relay.seen)
    assert b"CURVE" in seen  # ZeroMQ's greeting: this is what went between them.
    assert value.numpy().tobytes()[:8] not in seen
    assert b"job-1" not in seen
    for end in (a, b):
        assert end.keys.secret.encode() not in seen


def test_a_relay_that_changes_a_byte_gets_nothing_through(
    ends: tuple[End, End], monkeypatch: pytest.MonkeyPatch
) -> None:
    a, b = ends
    changed = threading.Event()

    def change(chunk: bytes) -> bytes:
        if len(chunk) > 900 and not changed.is_set():
            changed.set()
            return chunk[:-20] + bytes([chunk[-20] ^ 1]) + chunk[-19:]
        return chunk

    relay = Tapped(monkeypatch, change)
    use_both(relay.port, a, b)
    to_b, _ = connect(a, b)
    peer = to_b.connections["b"]
    peer.transmit(b"x", memoryview(bytes(1000)))
    assert changed.wait(20)
    # The stream is given up; the next one is as it should be.
    assert torch.equal(until_arrived(to_b, b), torch.ones(2, 6))
    assert b.mover.refused["malformed"] == 0
    relay.close()


def test_links_are_measured_over_the_relay(ends: tuple[End, End], monkeypatch: pytest.MonkeyPatch) -> None:
    a, b = ends
    monkeypatch.setattr("worker.transport.probe_socket.HANDSHAKE_SECONDS", 0.5)
    assert "127.0.0.9" in why_out_of_reach(a.keys, b.address)
    failed = measure_link(a.keys, b.address, 2**18, 1.0)
    assert not failed.reached
    monkeypatch.setattr("worker.transport.probe_socket.HANDSHAKE_SECONDS", 20.0)
    relay = Tapped(monkeypatch)
    use_both(relay.port, a, b)
    b.mover.expect_probe(a.address, 2**18, 60.0)
    found = measure_link(a.keys, b.address, 2**18, 1.0, endpoint=a.mover.passages.endpoint(b.address))
    assert found.there is not None, found.error
    assert found.reached
    relay.close()
    assert len(b"".join(relay.seen)) > 2**14


def test_without_passes_the_way_is_direct_again(ends: tuple[End, End]) -> None:
    a, b = ends
    use(1, a, b)
    assert a.mover.passages.relayed(b.address.public_key)
    assert a.mover.passages.endpoint(b.address) != b.address.endpoint
    a.mover.use(UseRelay(peer="b", public_key=b.address.public_key))
    assert a.mover.passages.endpoint(b.address) == b.address.endpoint
