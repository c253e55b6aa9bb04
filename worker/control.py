"""The control channel's worker side: reports go out in order and outlive a coordinator that is away for a while.

ZeroMQ connects again by itself. While nobody is there, reports are kept; once the coordinator is back, those of the last
seconds before the break are said again, because some may have been lost on the way (the coordinator ignores repeats).
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import math
from collections import deque
from collections.abc import Callable
from time import monotonic

import zmq
import zmq.asyncio
from pydantic import BaseModel
from zmq.utils.monitor import recv_monitor_message

from fusion.errors import FrameError
from fusion.messages import (
    MAX_MESSAGE_BYTES,
    Arrivals,
    Heartbeat,
    JoinResponse,
    Leaving,
    LinkMeasured,
    ToWorker,
    Unreached,
    decode_to_worker,
    encode,
)
from fusion.sockets import KeyPair, end_monitor, keep_alive, secure_client

_DEAD_SECONDS = 4.0
"""Two of our packets in a row may be lost, and it takes no new connection, whose handshake would have to get through as well."""
_STALLED_SECONDS = 15.0
_REPEAT_SECONDS = 20.0
"""More than it may take to notice that a connection is dead, or stalled: what was said meanwhile may be lost. Time in which this
process was stopped does not count: nothing was said in it, and nothing noticed."""
_REFUSED = zmq.EVENT_HANDSHAKE_FAILED_AUTH
_AGAIN_SECONDS = 0.5
_LOST = zmq.EVENT_DISCONNECTED | zmq.EVENT_CLOSED

log = logging.getLogger("fusion.worker")


class Control:
    """One session with a coordinator, from `open` to `close`.

    `on_message(message)` and `on_connection(is there)` are called in the event loop. `send` belongs to the event loop too.
    """

    def __init__(
        self, keys: KeyPair, on_message: Callable[[ToWorker], None], on_connection: Callable[[bool], None]
    ) -> None:
        self._keys = keys
        self._on_message = on_message
        self._on_connection = on_connection
        self._context = zmq.asyncio.Context()
        self._socket: zmq.asyncio.Socket | None = None
        self._monitor: zmq.asyncio.Socket | None = None
        self._tasks: list[asyncio.Task[None]] = []
        self._failed: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        self._kept: deque[bytes] = deque()
        self._recent: deque[tuple[float, bytes]] = deque()
        """By when it was said, as `_awake` counts."""
        self._awake_before, self._beat_at, self._longest_beat = 0.0, monotonic(), math.inf
        self._lost_awake = 0.0
        self._answer: JoinResponse | None = None
        self.connected = False
        self.lost_at: float | None = None
        """When the connection broke (monotonic seconds); None while it stands, and between two sessions."""
        self.memory_used: Callable[[], int] = lambda: 0
        self.refused: Callable[[], int] = lambda: 0
        """Messages of peers that were refused."""

    @property
    def waiting(self) -> int:
        """Reports kept for a coordinator that is away."""
        return len(self._kept)

    def open(self, answer: JoinResponse) -> None:
        """Connect with what the join answered; reports kept from an earlier session go to this one."""
        self._answer = answer
        self.lost_at, self._lost_awake = monotonic(), self._awake()
        self._longest_beat = 2 * answer.heartbeat_seconds
        socket = self._context.socket(zmq.DEALER)
        socket.setsockopt(zmq.LINGER, 1000)
        socket.setsockopt(zmq.SNDHWM, 0)
        socket.setsockopt(zmq.MAXMSGSIZE, MAX_MESSAGE_BYTES)
        keep_alive(socket, max(_DEAD_SECONDS, 4 * answer.heartbeat_seconds), _STALLED_SECONDS)
        secure_client(socket, self._keys, answer.control_public_key)
        monitor = self._monitor = socket.get_monitor_socket(zmq.EVENT_HANDSHAKE_SUCCEEDED | _REFUSED | _LOST)
        socket.connect(answer.control_endpoint)
        self._socket = socket
        self._tasks = [
            asyncio.create_task(self._watch(monitor), name="control monitor"),
            asyncio.create_task(self._receive(socket), name="control channel"),
            asyncio.create_task(self._beat(answer), name="heartbeat"),
        ]
        for task in self._tasks:
            task.add_done_callback(self._task_ended)

    async def ended(self) -> None:
        """Wait for what ends the channel without having been asked to, and raise it: nothing is heard, or said, any more."""
        await asyncio.shield(self._failed)

    def _task_ended(self, task: asyncio.Task[None]) -> None:
        if not task.cancelled() and (error := task.exception()) is not None and not self._failed.done():
            self._failed.set_exception(error)

    def send(self, message: BaseModel) -> None:
        """Send a report, or keep it until the coordinator is back."""
        passing = Heartbeat | Leaving | LinkMeasured | Arrivals | Unreached
        self._send(encode(message), lasting=not isinstance(message, passing))

    async def close(self) -> None:
        """End the session; what was handed to ZeroMQ gets a second to leave. Kept reports stay for the next `open`."""
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)
        self._tasks = []
        self.connected, self.lost_at = False, None
        if self._socket is not None and self._monitor is not None:
            end_monitor(self._socket, self._monitor)
            self._socket.close()
            self._socket = self._monitor = None

    def forget(self) -> None:
        """Drop all kept reports: they are of an incarnation that is over."""
        self._kept.clear()
        self._recent.clear()

    async def destroy(self) -> None:
        """`close`, and let go of ZeroMQ."""
        await self.close()
        await asyncio.to_thread(self._context.term)

    def _send(self, data: bytes, *, lasting: bool) -> None:
        if not self.connected or self._socket is None:
            if lasting:
                self._kept.append(data)
            return
        self._socket.send(data)
        if lasting:
            now = self._awake()
            self._recent.append((now, data))
            while self._recent[0][0] < now - _REPEAT_SECONDS:
                self._recent.popleft()

    def _awake(self) -> float:
        """Seconds that this process has not been stopped: between two beats no more count than they can be apart."""
        return self._awake_before + min(monotonic() - self._beat_at, self._longest_beat)

    async def _beat(self, answer: JoinResponse) -> None:
        while True:
            self._awake_before, self._beat_at = self._awake(), monotonic()
            self.send(self._heartbeat(answer))
            await asyncio.sleep(answer.heartbeat_seconds)

    def _heartbeat(self, answer: JoinResponse) -> Heartbeat:
        return Heartbeat(incarnation=answer.incarnation, memory_used_bytes=self.memory_used(), refused=self.refused())

    async def _watch(self, monitor: zmq.asyncio.Socket) -> None:
        while True:
            event = (await recv_monitor_message(monitor))["event"]
            try:
                self._happened(event)
            except Exception:
                log.exception("what follows from an event of the control channel failed")

    def _happened(self, event: int) -> None:
        if event == zmq.EVENT_HANDSHAKE_SUCCEEDED:
            self._back()
        elif event == _REFUSED:
            # A coordinator that has just started may not know its workers yet. ZeroMQ itself gives up here.
            asyncio.get_running_loop().call_later(_AGAIN_SECONDS, self._connect_again, self._socket)
        elif event & _LOST and self.connected:
            self.connected = False
            self.lost_at, self._lost_awake = monotonic(), self._awake()
            self._on_connection(False)

    def _connect_again(self, socket: zmq.asyncio.Socket | None) -> None:
        if socket is None or socket is not self._socket or self.connected or self._answer is None:
            return
        endpoint = self._answer.control_endpoint
        with contextlib.suppress(zmq.ZMQError):  # It may have given the endpoint up by itself.
            socket.disconnect(endpoint)
        socket.connect(endpoint)

    def _back(self) -> None:
        assert self._answer is not None
        lost_at = self._lost_awake if self.lost_at is not None else self._awake()
        self.connected, self.lost_at = True, None
        # The coordinator learns our new route from the first message.
        self.send(self._heartbeat(self._answer))
        repeated = [data for sent_at, data in self._recent if sent_at >= lost_at - _REPEAT_SECONDS]
        kept = list(self._kept)
        self._recent.clear()
        self._kept.clear()
        for data in (*repeated, *kept):
            self._send(data, lasting=True)
        self._on_connection(True)

    async def _receive(self, socket: zmq.asyncio.Socket) -> None:
        while True:
            frames = await socket.recv_multipart()
            try:
                message = decode_to_worker(frames[-1])
            except FrameError as error:
                log.warning("ignored a message of the coordinator: %s", error)
                continue
            self._on_message(message)
