"""Ways to peers that can't be reached directly: through a relay, by connections that both ends open to it.

::

    DEALER ── loopback ── call ══> relay <══ answer ── loopback ── ROUTER

ZeroMQ speaks to this machine only, and CURVE from end to end. A thread of its own copies the bytes.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import threading
from collections.abc import Coroutine
from dataclasses import dataclass, field
from time import monotonic
from typing import Any, TypeVar

from fusion.messages import PeerAddress, RelayPass, UseRelay
from fusion.relay.handshake import Role, enter
from fusion.relay.server import keep_open
from fusion.relay.splice import CHUNK_BYTES, Stream, splice

_CONNECT_SECONDS = 5.0
_CALL_SECONDS = 10.0
"""For the other end to come; ZeroMQ tries again after that."""
_ANSWER_SECONDS = 90.0
"""Longer than a relay keeps a connection that waits."""
_PAUSE = 0.3
_FIRST_PAUSE, _LONGEST_PAUSE = 0.1, 3.0
_MOST_ANSWERED = 4
"""Streams from one peer at a time: a job's, a probe's, and those that they replace."""

log = logging.getLogger("fusion.worker")

T = TypeVar("T")


@dataclass
class _Way:
    order: UseRelay
    endpoint: str
    """Where our own ZeroMQ finds the peer."""
    server: asyncio.Server
    tasks: set[asyncio.Task[Any]] = field(default_factory=set)


class Passages:
    """`use` whatever the coordinator says; `endpoint` is where a peer is found now. All may be called from any thread.

    `host` and `port` are where our own data socket listens, on this machine.
    """

    def __init__(self) -> None:
        self.host, self.port = "127.0.0.1", 0
        self._ways: dict[str, _Way] = {}
        self._lock = threading.Lock()
        self._loop: asyncio.AbstractEventLoop | None = None
        self._thread: threading.Thread | None = None

    def endpoint(self, peer: PeerAddress) -> str:
        """Where to connect to reach this peer."""
        way = self._ways.get(peer.public_key)
        return way.endpoint if way is not None else peer.endpoint

    def relayed(self, public_key: str) -> bool:
        return public_key in self._ways

    def use(self, order: UseRelay) -> None:
        """Reach a peer, and be reached by it, as this says from now on; streams of another way end."""
        with self._lock:
            known = self._ways.get(order.public_key)
            if known is not None and known.order == order:
                return
            self._forget(order.public_key)
            if order.call is not None and order.answer is not None:
                self._ways[order.public_key] = self._run(self._begin(order, order.call, order.answer))

    def forget_all(self) -> None:
        """Every peer is reached directly again."""
        with self._lock:
            for key in list(self._ways):
                self._forget(key)

    def close(self) -> None:
        """End every stream, and the thread."""
        self.forget_all()
        with self._lock:
            if self._loop is None or self._thread is None:
                return
            self._loop.call_soon_threadsafe(self._loop.stop)
            self._thread.join()
            self._loop.close()
            self._loop = self._thread = None

    def _forget(self, key: str) -> None:
        way = self._ways.pop(key, None)
        if way is not None:
            self._run(_end(way))

    def _run(self, work: Coroutine[Any, Any, T]) -> T:
        if self._loop is None:
            self._loop = asyncio.new_event_loop()
            self._thread = threading.Thread(target=self._loop.run_forever, name="passages", daemon=True)
            self._thread.start()
        return asyncio.run_coroutine_threadsafe(work, self._loop).result()

    # In the thread ------------------------------------------------------------------------------------------------

    async def _begin(self, order: UseRelay, call: RelayPass, answer: RelayPass) -> _Way:
        tasks: set[asyncio.Task[Any]] = set()

        def called(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
            """Our own DEALER wants to talk to the peer."""
            _spawn(tasks, _pass_on(order.peer, call, (reader, writer)), f"call {order.peer}")

        server = await asyncio.start_server(called, "127.0.0.1", 0, limit=CHUNK_BYTES)
        port = server.sockets[0].getsockname()[1]
        _spawn(tasks, self._answer(order.peer, answer, tasks), f"answer {order.peer}")
        return _Way(order, f"tcp://127.0.0.1:{port}", server, tasks)

    async def _answer(self, peer: str, found: RelayPass, tasks: set[asyncio.Task[Any]]) -> None:
        """Be there for the peer's next call, always."""
        room, pause = asyncio.Semaphore(_MOST_ANSWERED), _FIRST_PAUSE
        while True:
            await room.acquire()
            began = monotonic()
            try:
                far = await _enter(found, "answer", _ANSWER_SECONDS)
            except (OSError, TimeoutError) as error:
                room.release()
                # A relay sends away who has waited for long; that is no failure.
                pause = _FIRST_PAUSE if monotonic() - began > _LONGEST_PAUSE else min(2 * pause, _LONGEST_PAUSE)
                log.debug("not reachable for %s over the relay at %s:%d: %s", peer, found.host, found.port, error)
                await asyncio.sleep(pause)
                continue
            pause = _FIRST_PAUSE
            task = _spawn(tasks, self._let_in(far), f"let {peer} in")
            task.add_done_callback(lambda _: room.release())

    async def _let_in(self, far: Stream) -> None:
        """The peer has come: take it to our own data socket, which asks for its key."""
        try:
            near = await asyncio.open_connection(self.host, self.port, limit=CHUNK_BYTES)
        except OSError:
            far[1].close()
            return
        await splice(near, far)


def _spawn(tasks: set[asyncio.Task[Any]], work: Coroutine[Any, Any, None], name: str) -> asyncio.Task[None]:
    """A task that ends with its way; what ends it before that is logged."""

    def ended(task: asyncio.Task[None]) -> None:
        tasks.discard(task)
        if not task.cancelled() and (error := task.exception()) is not None:
            log.error("%s failed", task.get_name(), exc_info=error)

    task = asyncio.create_task(work, name=name)
    tasks.add(task)
    task.add_done_callback(ended)
    return task


async def _pass_on(peer: str, found: RelayPass, near: Stream) -> None:
    try:
        far = await _enter(found, "call", _CALL_SECONDS)
    except (OSError, TimeoutError) as error:
        log.debug("no way to %s over the relay at %s:%d: %s", peer, found.host, found.port, error)
        # ZeroMQ tries again at once when its connection to this machine ends.
        await asyncio.sleep(_PAUSE)
    else:
        await splice(near, far)
    finally:
        near[1].close()


async def _enter(found: RelayPass, role: Role, patience: float) -> Stream:
    """A stream to the other end. Raises `OSError` or `TimeoutError`."""
    async with asyncio.timeout(_CONNECT_SECONDS):
        reader, writer = await asyncio.open_connection(found.host, found.port, limit=CHUNK_BYTES)
    keep_open(writer)
    with contextlib.ExitStack() as unless_let_in:
        unless_let_in.callback(writer.close)
        async with asyncio.timeout(patience):
            await enter(reader, writer, bytes.fromhex(found.ticket), bytes.fromhex(found.secret), role)
        unless_let_in.pop_all()
    return reader, writer


async def _end(way: _Way) -> None:
    way.server.close()
    for task in way.tasks:
        task.cancel()
    with contextlib.suppress(asyncio.CancelledError):
        await asyncio.gather(*way.tasks, return_exceptions=True)
