"""The relay's sockets: takes connections in, asks the desk, and joins pairs."""

from __future__ import annotations

import asyncio
import contextlib
import itertools
import socket
from collections.abc import Mapping
from dataclasses import dataclass
from time import monotonic

from fusion.relay.desk import Desk, Limits
from fusion.relay.handshake import ANSWER_BYTES, JOINED, challenge, shown
from fusion.relay.splice import CHUNK_BYTES, Stream, splice

_SWEEP_SECONDS = 1.0


@dataclass(slots=True)
class _Waiting:
    """A connection whose other end is not there yet."""

    early: asyncio.Task[bytes]
    """Ends when it is closed, or says something that nobody can hear yet."""
    over: asyncio.Future[None]
    joined: bool = False


class RelayServer:
    """Serves a listening socket of its own, from `start` to `close`. Belongs to one event loop."""

    def __init__(self, limits: Limits | None = None) -> None:
        self.desk = Desk(limits or Limits())
        self.bytes = 0
        """Copied so far."""
        self._numbers = itertools.count()
        self._streams: dict[int, Stream] = {}
        self._waiting: dict[int, _Waiting] = {}
        self._tasks: set[asyncio.Task[None]] = set()
        self._server: asyncio.Server | None = None
        self._sweeper: asyncio.Task[None] | None = None

    async def start(self, listener: socket.socket) -> None:
        self._server = await asyncio.start_server(self._take_in, sock=listener, limit=CHUNK_BYTES, backlog=128)
        self._sweeper = asyncio.create_task(self._sweep(), name="relay sweep")

    def allow(self, tickets: Mapping[bytes, bytes]) -> None:
        """Only these tickets (with their secrets) count from now on; streams of others end."""
        for number in self.desk.allow(tickets):
            self._drop(number)

    async def close(self) -> None:
        if self._server is not None:
            self._server.close()
        if self._sweeper is not None:
            self._sweeper.cancel()
        for number in list(self._streams):
            self._drop(number)
        # They end with their connections; asyncio complains about those that are cancelled.
        await asyncio.gather(*self._tasks, return_exceptions=True)

    async def _take_in(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        number = next(self._numbers)
        if not self.desk.arrived(number, monotonic()):
            writer.close()
            return
        task = asyncio.current_task()
        assert task is not None
        self._tasks.add(task)
        self._streams[number] = (reader, writer)
        keep_open(writer)
        try:
            await self._serve(number, reader, writer)
        except (OSError, asyncio.IncompleteReadError, PermissionError):
            pass  # Whoever it was has gone, or must.
        finally:
            self._tasks.discard(task)
            self._streams.pop(number, None)
            self._waiting.pop(number, None)
            writer.close()
            partner = self.desk.gone(number)
            if partner is not None:
                self._drop(partner)

    async def _serve(self, number: int, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        challenged = challenge()
        writer.write(challenged)
        found = shown(challenged, await reader.readexactly(ANSWER_BYTES), self.desk.tickets)
        if found is None:
            self.desk.denied(number)
            return
        partner = self.desk.showed(number, *found, monotonic())
        if partner is None:
            await self._wait(number, reader)
        else:
            await self._join(number, partner)

    async def _wait(self, number: int, reader: asyncio.StreamReader) -> None:
        """Until the other end has come and gone, who copies for both; or this end goes away, or speaks too early."""
        early = asyncio.create_task(reader.read(1))
        waiting = self._waiting[number] = _Waiting(early, asyncio.get_running_loop().create_future())
        try:
            await asyncio.wait([early])
            if waiting.joined:
                await waiting.over
        finally:
            early.cancel()

    async def _join(self, number: int, partner: int) -> None:
        waiting, streams = self._waiting[partner], (self._streams[number], self._streams[partner])
        waiting.joined = True
        try:
            # One of us at a time can read from it.
            waiting.early.cancel()
            await asyncio.gather(waiting.early, return_exceptions=True)
            if not waiting.early.cancelled():
                return  # It went away in this very moment.
            for _, writer in streams:
                writer.write(JOINED)
            numbers = (number, partner)

            def moved(which: int, count: int) -> None:
                self.bytes += count
                self.desk.moved(numbers[which], monotonic())

            await splice(*streams, moved)
        finally:
            waiting.over.set_result(None)

    async def _sweep(self) -> None:
        while True:
            await asyncio.sleep(_SWEEP_SECONDS)
            for number in self.desk.overdue(monotonic()):
                self._drop(number)

    def _drop(self, number: int) -> None:
        stream = self._streams.get(number)
        if stream is not None:
            # Not `close`: what an end does not take must not keep its connection.
            stream[1].transport.abort()


def keep_open(writer: asyncio.StreamWriter) -> None:
    """Have the system notice a dead other end, and keep the way through routers open while nothing is said."""
    found = writer.get_extra_info("socket")
    with contextlib.suppress(OSError, AttributeError):
        found.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
        for name, seconds in (("TCP_KEEPIDLE", 20), ("TCP_KEEPINTVL", 5), ("TCP_KEEPCNT", 4)):
            if hasattr(socket, name):
                found.setsockopt(socket.IPPROTO_TCP, getattr(socket, name), seconds)
