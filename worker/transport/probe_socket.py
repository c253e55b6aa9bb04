"""Measures the link to another worker over a connection of its own, encrypted and authenticated as those of a job. Blocks."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from time import perf_counter

import zmq

from fusion.errors import FrameError, FusionError, UnreachableError
from fusion.messages import LinkMeasured, PeerAddress
from fusion.sockets import KeyPair, secure_client
from fusion.units import format_seconds
from fusion.wire import FrameKind, Header, decode_header, encode_header
from worker.transport.handshakes import HANDSHAKE_EVENTS, await_handshakes, close_monitors
from worker.transport.probe_course import SIZES, Course, Exchange
from worker.transport.route import Peer

HANDSHAKE_SECONDS = 4.0
_POLL_MILLISECONDS = 200
_ZEROS = memoryview(bytes(max(SIZES)))
"""What is sent; encrypted, so that no link can make less of it."""


def measure_link(
    keys: KeyPair,
    peer: PeerAddress,
    max_bytes: int,
    seconds: float,
    cancelled: Callable[[], bool] = lambda: False,
    endpoint: str | None = None,
) -> LinkMeasured:
    """Probe the link to `peer` within these bounds; what goes wrong is in the answer's `error`.

    `endpoint` is where it is found, when that is not its own address.
    """
    try:
        with _connected(keys, peer, endpoint, cancelled) as socket:
            return _probe(socket, peer.worker, Course(max_bytes, seconds), cancelled)
    except UnreachableError as error:
        return LinkMeasured(peer=peer.worker, error=str(error), reached=False)
    except (FusionError, zmq.ZMQError) as error:
        return LinkMeasured(peer=peer.worker, error=str(error))


def why_out_of_reach(keys: KeyPair, peer: PeerAddress, cancelled: Callable[[], bool] = lambda: False) -> str:
    """Why `peer` can't be connected to, in words; empty when it lets us in. Blocks."""
    try:
        with _connected(keys, peer, None, cancelled):
            return ""
    except (FusionError, zmq.ZMQError) as error:
        return str(error)


@contextmanager
def _connected(
    keys: KeyPair, peer: PeerAddress, endpoint: str | None, cancelled: Callable[[], bool]
) -> Iterator[zmq.Socket[bytes]]:
    """A connection of its own to `peer`, which has let us in. Raises `UnreachableError`, or `FusionError` when cancelled."""
    context: zmq.Context[zmq.Socket[bytes]] = zmq.Context()
    socket = context.socket(zmq.DEALER)
    socket.setsockopt(zmq.LINGER, 0)
    secure_client(socket, keys, peer.public_key)
    connection = {peer.worker: Peer(socket, peer, endpoint)}
    monitors = {peer.worker: socket.get_monitor_socket(HANDSHAKE_EVENTS)}
    try:
        socket.connect(connection[peer.worker].endpoint)
        if await_handshakes(monitors, connection, HANDSHAKE_SECONDS, cancelled):
            raise FusionError(f"nobody waits any more for {peer.worker} to answer")
        yield socket
    finally:
        close_monitors(connection, monitors)
        context.destroy(0)


def _probe(socket: zmq.Socket[bytes], worker: str, course: Course, cancelled: Callable[[], bool]) -> LinkMeasured:
    begin = perf_counter()
    number = 0
    while (exchange := course.next(perf_counter() - begin)) is not None:
        number += 1
        sent_at, deadline = perf_counter(), begin + course.seconds
        answered = _send(socket, number, exchange, deadline, cancelled) and _await_answer(
            socket, number, deadline, cancelled
        )
        if not answered and exchange == Exchange(0, 0):
            break
        course.took(exchange, perf_counter() - sent_at)
        if not answered:
            break
    figures = course.figures()
    if figures is None:
        what = "a small message" if number > 1 else "a probe"
        return LinkMeasured(
            peer=worker, error=f"{worker} did not answer {what} within {format_seconds(course.seconds)}"
        )
    return LinkMeasured(peer=worker, there=figures[0], back=figures[1])


def _send(
    socket: zmq.Socket[bytes], number: int, exchange: Exchange, deadline: float, cancelled: Callable[[], bool]
) -> bool:
    shape = (exchange.back,) if exchange.back else ()
    frames: list[bytes | memoryview] = [encode_header(Header("", 0, FrameKind.PROBE, 0, number, 0, shape=shape))]
    if exchange.there:
        frames.append(_ZEROS[: exchange.there])
    # A peer that has gone and now refuses us leaves nothing to send to.
    while _ready(socket, zmq.POLLOUT, deadline, cancelled):
        with suppress(zmq.Again):
            socket.send_multipart(frames, zmq.NOBLOCK)
            return True
    return False


def _await_answer(socket: zmq.Socket[bytes], number: int, deadline: float, cancelled: Callable[[], bool]) -> bool:
    while _ready(socket, zmq.POLLIN, deadline, cancelled):
        try:
            header = decode_header(socket.recv_multipart()[0])
        except FrameError:
            continue
        if header.kind is FrameKind.PROBED and header.step == number:
            return True
    return False


def _ready(socket: zmq.Socket[bytes], what: int, deadline: float, cancelled: Callable[[], bool]) -> bool:
    """Wait until one may send or receive; False at the deadline (seconds of `perf_counter`), or when cancelled."""
    while (left := deadline - perf_counter()) > 0 and not cancelled():
        if socket.poll(min(_POLL_MILLISECONDS, max(1, int(1000 * left))), what):
            return True
    return False
