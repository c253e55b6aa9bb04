"""The control channel's socket: a CURVE-secured ROUTER that only joined workers' keys are admitted to.

A message is attributed by the sender's authenticated key, never by what it says of itself.
"""

from __future__ import annotations

import asyncio
import logging
from collections import deque
from collections.abc import Callable
from contextlib import suppress
from time import monotonic

import zmq
import zmq.asyncio

from fusion.errors import FrameError
from fusion.messages import (
    MAX_MESSAGE_BYTES,
    ToCoordinator,
    ToWorker,
    decode_to_coordinator,
    encode,
)
from fusion.sockets import Gatekeeper, KeyPair, bind_tcp, end_monitor, keep_alive, secure_server, sender_key

logger = logging.getLogger(__name__)

DOMAIN = "control"
_MAX_WAITING = 64
_GONE = 1000
"""Incarnations that are no part of the pool any more and can still say something, and be told so. Who went before them is
refused at the door, and joins anew."""
_TURN_SECONDS = 0.005
"""Messages of workers that come back after a restart are many: people's requests are answered in between."""

_LAST_WORDS_SECONDS = 0.5

Handler = Callable[[str, ToCoordinator], None]
"""Called with (incarnation, message)."""
_BATCH, _PAUSE_SECONDS = 1000, 0.05
"""Between two looks at what was closed: strangers may open and close many connections."""


class Control:
    """Receives workers' messages and sends instructions to them by incarnation."""

    def __init__(self, keys: KeyPair, handler: Handler, on_closed: Callable[[], None] | None = None) -> None:
        """`on_closed` hears that connections were closed; whose, ZeroMQ does not tell."""
        self.keys = keys
        self._handler = handler
        self._on_closed = on_closed
        self._context = zmq.asyncio.Context()
        self._gatekeeper = Gatekeeper(self._context, on_refused=self._refused_handshake)
        self._socket = self._context.socket(zmq.ROUTER)
        self._incarnations: dict[str, str] = {}
        self._keys: dict[str, str] = {}
        self._gone: dict[str, None] = {}
        self._routes: dict[str, bytes] = {}
        self._waiting: dict[str, deque[bytes]] = {}
        self._task: asyncio.Task[None] | None = None
        self._watching: asyncio.Task[None] | None = None
        self._monitor: zmq.asyncio.Socket | None = None
        self.on_failure: Callable[[BaseException], None] = lambda _: None
        """Hears of what ended the channel without having been asked to: no worker is heard any more."""
        self.port = 0
        self.received: dict[str, int] = {}
        """Messages by type, for the metrics page."""
        self.refused = 0
        """Messages that were not understood, or whose sender is unknown."""

    def start(self, host: str, port: int) -> int:
        """Bind and begin to receive; returns the port. Raises `FusionError` when the port is taken."""
        self.bind(host, port)
        self.receive()
        return self.port

    def bind(self, host: str, port: int) -> None:
        """Let workers connect whose keys are admitted; what they say waits. Raises `FusionError`."""
        self._gatekeeper.start()
        try:
            secure_server(self._socket, self.keys, DOMAIN)
            keep_alive(self._socket, 5.0)
            self._socket.setsockopt(zmq.MAXMSGSIZE, MAX_MESSAGE_BYTES)
            self._socket.setsockopt(zmq.LINGER, 500)
            self.port = bind_tcp(self._socket, host, port)
        except BaseException:
            self._socket.close(0)
            self._gatekeeper.close()
            self._context.destroy(0)
            raise

    def receive(self) -> None:
        """Take messages in from now on."""
        if self._task is None:
            self._task = asyncio.create_task(self._receive(), name="control channel")
            self._task.add_done_callback(self._ended)
        if self._watching is None and self._on_closed is not None:
            self._monitor = self._socket.get_monitor_socket(zmq.EVENT_DISCONNECTED)
            self._watching = asyncio.create_task(self._watch(self._monitor, self._on_closed), name="control monitor")
            self._watching.add_done_callback(self._ended)

    def admit(self, public_key: str, incarnation: str) -> None:
        """Messages of this key are from `incarnation` from now on."""
        former = self._incarnations.get(public_key)
        if former is not None and former != incarnation:
            self._drop(former)
        self._incarnations[public_key], self._keys[incarnation] = incarnation, public_key
        self._gatekeeper.allow(DOMAIN, public_key)

    def forget(self, incarnation: str) -> None:
        """It is no part of the pool any more. Nothing more is to be sent to it, unless it is heard again."""
        self._waiting.pop(incarnation, None)
        if incarnation in self._keys:
            self._gone.pop(incarnation, None)
            self._gone[incarnation] = None
        while len(self._gone) > _GONE:
            key = self._drop(next(iter(self._gone)))
            del self._incarnations[key]
            self._gatekeeper.forbid(DOMAIN, key)

    def _drop(self, incarnation: str) -> str:
        """Keep nothing for it; returns its key."""
        self._gone.pop(incarnation, None)
        self._routes.pop(incarnation, None)
        self._waiting.pop(incarnation, None)
        return self._keys.pop(incarnation)

    def send(self, incarnation: str, message: ToWorker) -> None:
        """Send, or keep until the incarnation is heard for the first time (after a restart, say); after `close`, neither."""
        if self._socket.closed or incarnation not in self._keys:
            return
        data = encode(message)
        route = self._routes.get(incarnation)
        if route is None:
            self._waiting.setdefault(incarnation, deque(maxlen=_MAX_WAITING)).append(data)
            return
        self._send(route, data)

    async def close(self) -> None:
        """Handle what has already arrived, then close; workers that report all the time are not listened to for ever."""
        if self._task is not None:
            self._task.cancel()
            await asyncio.gather(self._task, return_exceptions=True)
            until = monotonic() + _LAST_WORDS_SECONDS
            while monotonic() < until and await self._socket.poll(20):
                self._take(await self._socket.recv_multipart(copy=False))
        if self._watching is not None and self._monitor is not None:
            self._watching.cancel()
            await asyncio.gather(self._watching, return_exceptions=True)
            end_monitor(self._socket, self._monitor)
        self._socket.close()
        await asyncio.to_thread(self._gatekeeper.close)
        await asyncio.to_thread(self._context.term)

    def _ended(self, task: asyncio.Task[None]) -> None:
        if not task.cancelled() and (error := task.exception()) is not None:
            self.on_failure(error)

    async def _receive(self) -> None:
        """Whatever has come is taken in without a future for each message, and others have their turn all along."""
        now: zmq.Socket[bytes] = zmq.Socket.shadow(self._socket.underlying)
        while True:
            await self._socket.poll()
            until = monotonic() + _TURN_SECONDS
            with suppress(zmq.Again):
                while monotonic() < until:
                    self._take(now.recv_multipart(zmq.NOBLOCK, copy=False))
            await asyncio.sleep(0)

    async def _watch(self, monitor: zmq.asyncio.Socket, on_closed: Callable[[], None]) -> None:
        now: zmq.Socket[bytes] = zmq.Socket.shadow(monitor.underlying)
        while True:
            await monitor.poll()
            with suppress(zmq.Again):
                for _ in range(_BATCH):
                    now.recv_multipart(zmq.NOBLOCK)
            try:
                on_closed()
            except Exception:
                logger.exception("what follows from closed connections failed")
            await asyncio.sleep(_PAUSE_SECONDS)

    def _take(self, frames: list[zmq.Frame]) -> None:
        incarnation = self._incarnations.get(sender_key(frames[-1]))
        if incarnation is None or len(frames) != 2:
            self.refused += 1
            return
        route = bytes(frames[0].buffer)
        try:
            message = decode_to_coordinator(bytes(frames[1].buffer))
        except FrameError as error:
            self.refused += 1
            logger.warning("worker incarnation %s: %s", incarnation, error)
            return
        if self._routes.get(incarnation) != route:
            self._routes[incarnation] = route
            for data in self._waiting.pop(incarnation, ()):
                self._send(route, data)
        self.received[message.type] = self.received.get(message.type, 0) + 1
        try:
            self._handler(incarnation, message)
        except Exception:
            # One message of one worker: all others are to be heard all the same.
            logger.exception("worker incarnation %s: what follows from its %s failed", incarnation, message.type)

    def _send(self, route: bytes, data: bytes) -> None:
        # An unroutable message is dropped by the ROUTER: its worker is gone, which the heartbeats will tell.
        future = self._socket.send_multipart([route, data])
        if isinstance(future, asyncio.Future):
            future.add_done_callback(_log_failure)

    def _refused_handshake(self, domain: str, address: str, key: str) -> None:
        logger.warning("refused a connection from %s: its key has not joined", address)


def _log_failure(future: asyncio.Future[object]) -> None:
    if not future.cancelled() and (error := future.exception()) is not None:
        logger.warning("could not send a control message: %s", error)
