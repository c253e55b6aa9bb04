"""ZeroMQ sockets with CURVE: key pairs, servers that admit known keys only, and clients that know their server's key.

Every socket of one ZeroMQ context that calls `secure_server` asks the context's `Gatekeeper` (a ZAP handler) before a
handshake completes. A peer whose key is not on the list of the socket's domain never gets a message through. The
gatekeeper names the peer to the receiver: `sender_key(frame)` is the authenticated public key behind a message.
"""

from __future__ import annotations

import contextlib
import sys
import threading
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import zmq
from zmq.utils import z85

from fusion.errors import FusionError

_COUNTS_ACKNOWLEDGEMENTS = sys.platform == "linux"
"""Elsewhere libzmq can't set after how long without one a connection is dead."""
_ZAP_ENDPOINT = "inproc://zeromq.zap.01"


@dataclass(frozen=True, slots=True)
class KeyPair:
    """A CURVE key pair, both halves Z85 text of 40 characters."""

    public: str
    secret: str = field(repr=False)


def new_keys() -> KeyPair:
    """A fresh CURVE key pair. Raises `FusionError` when this libzmq was built without CURVE."""
    if not zmq.has("curve"):
        raise FusionError("this libzmq has no CURVE support; install the pyzmq wheel from PyPI")
    public, secret = zmq.curve_keypair()
    return KeyPair(public.decode(), secret.decode())


def key_to_hex(public: str) -> str:
    """For places that Z85 does not fit into, such as URLs."""
    return z85.decode(public.encode()).hex()


def key_from_hex(text: str) -> str:
    """What `key_to_hex` made. Raises `ValueError`."""
    raw = bytes.fromhex(text)
    if len(raw) != 32:
        raise ValueError(f"a key has 32 bytes, not {len(raw)}")
    return z85.encode(raw).decode()


def secure_server(socket: zmq.Socket[Any], keys: KeyPair, domain: str) -> None:
    """Make `socket` a CURVE server; call before `bind`. `domain` chooses the gatekeeper's list of admitted keys."""
    socket.setsockopt(zmq.CURVE_SERVER, 1)
    socket.setsockopt(zmq.CURVE_SECRETKEY, keys.secret.encode())
    socket.setsockopt(zmq.CURVE_PUBLICKEY, keys.public.encode())
    socket.setsockopt(zmq.ZAP_DOMAIN, domain.encode())


def secure_client(socket: zmq.Socket[Any], keys: KeyPair, server_public_key: str) -> None:
    """Make `socket` a CURVE client of the server with this public key; call before `connect`."""
    socket.setsockopt(zmq.CURVE_SECRETKEY, keys.secret.encode())
    socket.setsockopt(zmq.CURVE_PUBLICKEY, keys.public.encode())
    socket.setsockopt(zmq.CURVE_SERVERKEY, server_public_key.encode())


def keep_alive(socket: zmq.Socket[Any], silence: float, stalled: float = 15.0) -> None:
    """Have both ends notice a dead connection after about `silence` seconds, and reconnect with growing delays.

    Dead is one on which the other machine acknowledges nothing. ZeroMQ's own answers come only after all that was queued
    before them: where links are slow, a connection that works may be without them for long, but not for `stalled` seconds.
    """
    milliseconds = max(100, int(silence * 1000))
    socket.setsockopt(zmq.HEARTBEAT_IVL, max(50, milliseconds // 3))
    if _COUNTS_ACKNOWLEDGEMENTS:
        socket.setsockopt(zmq.TCP_MAXRT, milliseconds)
        milliseconds = max(milliseconds, int(stalled * 1000))
    socket.setsockopt(zmq.HEARTBEAT_TIMEOUT, milliseconds)
    socket.setsockopt(zmq.RECONNECT_IVL, 100)
    socket.setsockopt(zmq.RECONNECT_IVL_MAX, 5000)


def end_monitor(socket: zmq.Socket[Any], monitor: zmq.Socket[Any]) -> None:
    """Close the monitor of `socket`, which nobody reads any more. Never blocks."""
    # libzmq itself says a last word to the monitor, and blocks where that is closed or full.
    now: zmq.Socket[bytes] = zmq.Socket.shadow(monitor.underlying)
    with contextlib.suppress(zmq.ZMQError):
        while True:
            now.recv_multipart(zmq.NOBLOCK)
    socket.disable_monitor()
    monitor.close(0)


def bind_tcp(socket: zmq.Socket[Any], host: str, port: int) -> int:
    """Bind to `host:port` (port 0: any free one) and return the port.

    Raises `FusionError`, in one line, when the port is taken or the address is not ours.
    """
    address = "*" if host in ("", "0.0.0.0", "*") else f"[{host}]" if ":" in host else host
    if ":" in host:
        socket.setsockopt(zmq.IPV6, 1)
    try:
        socket.bind(f"tcp://{address}:{port or '*'}")
    except zmq.ZMQError as error:
        if error.errno == zmq.EADDRINUSE:
            raise FusionError(f"port {port} on {host} is in use; choose another, or stop the program there") from None
        raise FusionError(f"can't listen on {host}:{port}: {error}") from None
    endpoint = socket.getsockopt(zmq.LAST_ENDPOINT)
    assert isinstance(endpoint, bytes)
    return int(endpoint.rstrip(b"\0").rsplit(b":", 1)[1])


def sender_key(frame: zmq.Frame) -> str:
    """The authenticated public key of the peer that sent `frame` (received with `copy=False`); empty without CURVE."""
    try:
        return str(frame.get("User-Id"))
    except zmq.ZMQError:
        return ""


class Gatekeeper:
    """Admits known public keys, per domain, to the CURVE servers of one ZeroMQ context.

    Runs its own small thread from `start` to `close`. Close the sockets it guards first: libzmq does not let go of a
    context while a handshake waits for a handler that is gone. `allow` and `forbid` may be called from any thread; a forbidden
    key keeps its open connections (drop its messages by `sender_key`) but can't make new ones. `on_refused(domain,
    address, key)` is called on the gatekeeper's thread for each refusal.
    """

    def __init__(self, context: zmq.Context[Any], on_refused: Callable[[str, str, str], None] | None = None) -> None:
        # A plain view of the context: the handler's thread is synchronous even when the context is asyncio's.
        self._context: zmq.Context[zmq.Socket[bytes]] = zmq.Context.shadow(context.underlying)
        self._on_refused = on_refused
        self._lock = threading.Lock()
        self._admitted: dict[str, set[str]] = {}
        self._stop = f"inproc://fusion.gatekeeper.{id(self)}"
        self._thread: threading.Thread | None = None
        self._stopper: zmq.Socket[bytes] | None = None
        self.refused = 0
        """Handshakes refused so far."""

    def allow(self, domain: str, public_key: str) -> None:
        with self._lock:
            self._admitted.setdefault(domain, set()).add(public_key)

    def forbid(self, domain: str, public_key: str) -> None:
        with self._lock:
            self._admitted.get(domain, set()).discard(public_key)

    def admits(self, domain: str, public_key: str) -> bool:
        with self._lock:
            return public_key in self._admitted.get(domain, ())

    def start(self) -> None:
        """Start answering; call before the first `secure_server` socket binds."""
        handler = self._context.socket(zmq.REP)
        handler.linger = 0
        handler.bind(_ZAP_ENDPOINT)
        waker = self._context.socket(zmq.PAIR)
        waker.bind(self._stop)
        self._stopper = self._context.socket(zmq.PAIR)
        self._stopper.connect(self._stop)
        self._thread = threading.Thread(target=self._serve, args=(handler, waker), name="gatekeeper", daemon=True)
        self._thread.start()

    def close(self) -> None:
        """Stop the thread and wait for it; safe to call twice."""
        if self._stopper is None or self._thread is None:
            return
        self._stopper.send(b"")
        self._thread.join()
        self._stopper.close(0)
        self._stopper = self._thread = None

    def _serve(self, handler: zmq.Socket[bytes], waker: zmq.Socket[bytes]) -> None:
        poller = zmq.Poller()
        poller.register(handler, zmq.POLLIN)
        poller.register(waker, zmq.POLLIN)
        try:
            while True:
                ready = dict(poller.poll())
                if waker in ready:
                    return
                if handler in ready:
                    handler.send_multipart(self._answer(handler.recv_multipart()))
        finally:
            handler.close(0)
            waker.close(0)

    def _answer(self, request: list[bytes]) -> list[bytes]:
        """Answer one ZAP 1.0 request: version, request id, domain, address, identity, mechanism, credentials."""
        request_id = request[1] if len(request) > 1 else b""
        if len(request) != 7 or request[0] != b"1.0" or request[5] != b"CURVE" or len(request[6]) != 32:
            return [b"1.0", request_id, b"400", b"CURVE only", b"", b""]
        domain, address = request[2].decode("utf-8", "replace"), request[3].decode("utf-8", "replace")
        key = z85.encode(request[6]).decode()
        if self.admits(domain, key):
            return [b"1.0", request_id, b"200", b"OK", key.encode(), b""]
        self.refused += 1
        if self._on_refused is not None:
            self._on_refused(domain, address, key)
        return [b"1.0", request_id, b"400", b"unknown key", b"", b""]
