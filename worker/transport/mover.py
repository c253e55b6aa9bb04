"""The data plane: takes tensors to peers and brings theirs in, beside the compute thread.

One ROUTER is bound for as long as the worker lives; it belongs to the receiver thread, which admits, decodes and delivers
what arrives. Each job has a route (`worker.transport.route`) with one DEALER per peer.
"""

from __future__ import annotations

import contextlib
import logging
import threading
from collections import Counter, deque
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from time import monotonic, perf_counter

import zmq

from fusion.addresses import WILDCARDS
from fusion.errors import FrameError, VersionError
from fusion.messages import PeerAddress, UseRelay
from fusion.sockets import Gatekeeper, KeyPair, bind_tcp, secure_client, secure_server, sender_key
from fusion.wire import FrameKind, Header, decode_header, encode_header
from worker.protocol.admission import Admission, Refused, is_spoilt
from worker.transport.arrival import FindPlaces, Received, received
from worker.transport.delay_line import DelayLine
from worker.transport.handshakes import HANDSHAKE_EVENTS, UnreachedPeersError, await_handshakes, close_monitors
from worker.transport.passages import Passages
from worker.transport.peer_watch import PeerWatch
from worker.transport.probe_answers import ProbeAnswers
from worker.transport.probe_marks import ArrivalTimes
from worker.transport.route import Deliver, Peer, Route, Spoilt
from worker.transport.slow_links import SlowLink

DOMAIN = "data"
_POLL_MILLISECONDS = 200
# Expected after a restart or a stop, while a peer has not heard of it yet, and of a gradient that comes twice: counted and
# logged here, not reported.
_QUIET = frozenset({"other epoch", "places", "stopped job"})

_MONITORED = HANDSHAKE_EVENTS | zmq.EVENT_DISCONNECTED

log = logging.getLogger("fusion.worker")


class Mover:
    """Owns the worker's data sockets. `start`, then `open` a route per job, then `close`.

    `warn(message)` is called, on the receiver thread, the first time that a peer has a message of some category refused.
    What goes to the peers that `links` names is as slow as those links. `unreached(peer)` hears, on some thread, of a peer that
    can't be connected to, now and then as long as that is so; `reached(peer)` when one is by way of a relay.
    """

    def __init__(
        self,
        keys: KeyPair,
        warn: Callable[[str], None],
        *,
        max_frame_bytes: int = 2**30,
        links: Mapping[str, SlowLink] | None = None,
        unreached: Callable[[str], None] = lambda _: None,
        reached: Callable[[str], None] = lambda _: None,
    ) -> None:
        self._context: zmq.Context[zmq.Socket[bytes]] = zmq.Context()
        self._keys = keys
        self._warn = warn
        self._unreached = unreached
        self._reached = reached
        self._max_frame_bytes = max_frame_bytes
        self.passages = Passages()
        """Ways to peers that can't be reached directly."""
        self._gate = Gatekeeper(self._context, self._stranger)
        self._route: Route | None = None
        self._line = DelayLine(links) if links else None
        self._watch: PeerWatch
        self._silence = 5.0
        self._stopped: deque[str] = deque(maxlen=64)
        self._warned: set[tuple[str, str]] = set()
        self._stopping = threading.Event()
        self._thread = threading.Thread(target=self._receive_all, name="mover", daemon=True)
        self._router = self._context.socket(zmq.ROUTER)
        self._router.setsockopt(zmq.MAXMSGSIZE, max_frame_bytes)
        self._router.setsockopt(zmq.LINGER, 0)
        self._router.setsockopt(zmq.RCVTIMEO, _POLL_MILLISECONDS)
        secure_server(self._router, keys, DOMAIN)
        self._admitting = threading.Lock()
        self._peer_keys: set[str] = set()
        self._probes = ProbeAnswers()
        self.arrivals = ArrivalTimes()
        """How fast large messages of the peers came in."""
        self.refused: Counter[str] = Counter()
        """Messages dropped, by category."""

    def start(self, host: str, port: int) -> int:
        """Bind the data socket and start the receiver; returns the port. Raises `FusionError` when it is taken."""
        self._gate.start()
        bound = bind_tcp(self._router, host, port)
        self.passages.host = "127.0.0.1" if host in WILDCARDS else host
        self.passages.port = bound
        self._thread.start()
        return bound

    def admit(self, peers: Sequence[PeerAddress]) -> None:
        """Let these peers connect; do this as soon as they are known."""
        with self._admitting:
            for peer in peers:
                self._peer_keys.add(peer.public_key)
                self._gate.allow(DOMAIN, peer.public_key)

    def expect_probe(self, peer: PeerAddress, max_bytes: int, seconds: float) -> None:
        """Let this worker measure its link to us for so long; call `end_probes` after that."""
        with self._admitting:
            self._probes.expect(peer.public_key, max_bytes, monotonic() + seconds)
            self._gate.allow(DOMAIN, peer.public_key)

    def end_probes(self) -> None:
        """Whose time to measure is over has no business here any more, unless it is a peer."""
        with self._admitting:
            for key in self._probes.forget(monotonic()):
                if key not in self._peer_keys:
                    self._gate.forbid(DOMAIN, key)

    def _forbid(self, key: str) -> None:
        with self._admitting:
            self._peer_keys.discard(key)
            if not self._probes.expects(key):
                self._gate.forbid(DOMAIN, key)

    def forget_peers(self) -> None:
        """There is no job here any more, so nobody is a peer, connected or not."""
        with self._admitting:
            keys = tuple(self._peer_keys)
        for key in keys:
            self._forbid(key)

    def open(
        self,
        admission: Admission,
        peers: Sequence[PeerAddress],
        deliver: Deliver,
        *,
        places: FindPlaces = lambda _: None,
        on_error: Callable[[Exception], None] = lambda _: None,
        on_peer_lost: Callable[[str], None] = lambda _: None,
        on_peer_back: Callable[[str], None] = lambda _: None,
        on_spoilt: Spoilt = lambda *_: None,
        silence: float = 5.0,
        patience: float = 30.0,
        cancelled: Callable[[], bool] = lambda: False,
    ) -> Route:
        """Connect to the job's peers and route its messages to `deliver` (called on the receiver thread).

        `on_error` hears, on a thread of the route, of a value that could not be encoded or sent; `on_peer_lost`, on a
        thread of its own, of a peer whose connection breaks, and `on_peer_back` when it stands again.
        `on_spoilt` is that of `Route`. `places` finds those that an arriving gradient leaves out. `silence` is the time after
        which a dead connection is noticed.
        Waits until every peer's handshake is through; raises `UnreachableError` when one is not within `patience`
        seconds, `PlanError` when something that should arrive is too large.
        """
        self.require_room(admission)
        route = Route(admission, {}, deliver, on_error, self._line, places, on_spoilt)
        self._silence = silence

        def again(name: str) -> None:
            self._back(route, name)
            on_peer_back(name)

        self._watch = PeerWatch(partial(self._lost, route, on_peer_lost), self._unreached, again)
        # Peers may start before we do: what they send must find the route.
        self._route = route
        if admission.job in self._stopped:
            self._stopped.remove(admission.job)
        try:
            self.connect(route, peers, patience=patience, cancelled=cancelled)
        except BaseException:
            self._route = None
            self._close_connections(route)
            raise
        return route

    def require_room(self, admission: Admission) -> None:
        """Raises `PlanError` when something that should arrive is larger than a message may be."""
        admission.require_room(self._max_frame_bytes)

    def connect(
        self,
        route: Route,
        peers: Sequence[PeerAddress],
        *,
        patience: float = 30.0,
        cancelled: Callable[[], bool] = lambda: False,
    ) -> list[str]:
        """Admit these workers and connect to them too; waits for the handshakes as `open` does.

        Returns those that had not let us in when it was `cancelled`; they are as unknown as before. Raises `UnreachableError` when
        some have not within `patience`; the others are connected.
        """
        self.admit(peers)
        connections: dict[str, Peer] = {}
        monitors: dict[str, zmq.Socket[bytes]] = {}
        try:
            for address in peers:
                socket = self._context.socket(zmq.DEALER)
                socket.setsockopt(zmq.SNDHWM, 0)
                socket.setsockopt(zmq.LINGER, 0)
                secure_client(socket, self._keys, address.public_key)
                peer = Peer(socket, address, self.passages.endpoint(address), max(self._silence, 2.0))
                connections[address.worker] = peer
                monitors[address.worker] = socket.get_monitor_socket(_MONITORED)
                peer.connect()
            # Before the handshakes are through, so that a peer whose own went faster is no stranger.
            route.add(connections)
            self._move_along(connections)
            unreached: UnreachedPeersError | None = None
            try:
                missing = await_handshakes(monitors, connections, patience, cancelled, self._unreached)
            except UnreachedPeersError as error:
                missing, unreached = error.names, error
        except BaseException:
            self._let_go(route, connections, monitors)
            raise
        self._let_go(
            route, {name: connections.pop(name) for name in missing}, {name: monitors.pop(name) for name in missing}
        )
        for name in connections:
            self._back(route, name)
        self._watch.add(monitors)
        if unreached is not None:
            raise unreached
        return missing

    def _let_go(self, route: Route, connections: dict[str, Peer], monitors: dict[str, zmq.Socket[bytes]]) -> None:
        """Of connections on which there was no handshake."""
        for name in connections:
            route.remove(name)
        close_monitors(connections, monitors)
        for peer in connections.values():
            peer.close()

    def use(self, order: UseRelay) -> None:
        """Reach a peer as the coordinator says from now on; a connection that is there moves."""
        self.passages.use(order)
        if self._route is not None:
            self._move_along(self._route.connections)

    def _move_along(self, connections: Mapping[str, Peer]) -> None:
        for peer in connections.values():
            endpoint = self.passages.endpoint(peer.address)
            if peer.endpoint != endpoint:
                peer.move(endpoint)

    def _lost(self, route: Route, tell: Callable[[str], None], name: str) -> None:
        # A relay that is gone says nothing of the peer behind it.
        if not self._is_relayed(route, name):
            tell(name)

    def _back(self, route: Route, name: str) -> None:
        if self._is_relayed(route, name):
            self._reached(name)

    def _is_relayed(self, route: Route, name: str) -> bool:
        peer = route.connections.get(name)
        return peer is not None and self.passages.relayed(peer.address.public_key)

    def disconnect(self, route: Route, name: str) -> None:
        """This worker has no part in the job any more: refuse what it sends, close the connection to it."""
        peer = route.remove(name)
        if peer is None:
            return
        self._forbid(peer.address.public_key)

        def dispose(monitor: zmq.Socket[bytes]) -> None:
            close_monitors({name: peer}, {name: monitor})
            peer.close()

        self._watch.retire(name, dispose)

    def close_route(self, route: Route) -> None:
        """Forget a job: its messages are refused from now on, its connections closed."""
        if self._route is route:
            self._route = None
            self._stopped.append(route.admission.job)
        self.forget_peers()
        self._close_connections(route)

    def _close_connections(self, route: Route) -> None:
        close_monitors(route.connections, self._watch.close())
        route.close()

    def close(self) -> None:
        """Stop the receiver and close every socket."""
        if self._route is not None:
            self.close_route(self._route)
        if self._line is not None:
            self._line.close()
        self._stopping.set()
        if self._thread.is_alive():
            self._thread.join()
        self.passages.close()
        self._router.close(0)
        self._gate.close()
        self._context.destroy(0)

    def _receive_all(self) -> None:
        while not self._stopping.is_set():
            try:
                frames = self._router.recv_multipart(copy=False)
            except zmq.Again:
                continue
            self.take_in(frames)

    def take_in(self, frames: list[zmq.Frame]) -> None:
        """Deliver one message, or count why not; whatever it is, no error comes out."""
        try:
            self._receive(frames)
        except Refused as refused:
            self._refuse(refused.category, frames, str(refused))
        except VersionError as error:
            self._refuse("version", frames, str(error))
        except FrameError as error:
            self._refuse("malformed", frames, str(error))
        except Exception as error:
            # A defect of ours must not end the receiver: the job asks again for what it is owed.
            log.exception("could not take in a message")
            self._refuse("malformed", frames, f"{type(error).__name__}: {error}")

    def _receive(self, frames: list[zmq.Frame]) -> None:
        """One message: `[identity, header, payload...]`. Raises `FrameError`."""
        if not 2 <= len(frames) <= 3:
            raise Refused("malformed", f"message of {len(frames) - 1} frames, expected one or two")
        header = decode_header(frames[1].buffer)
        if header.kind is FrameKind.PROBE:
            self._answer_probe(header, frames)
            return
        route = self._route
        if header.job in self._stopped:
            raise Refused("stopped job", f"message of job {header.job!r}, which has stopped here")
        if route is None:
            raise Refused("unknown job", f"message of job {header.job!r}, which this worker does not have")
        sender = route.name_of(sender_key(frames[1]))
        payloads = frames[2:]
        try:
            layout = route.admission.check(header, sender, [len(payload.buffer) for payload in payloads])
            value: Received = None
            if layout is not None and payloads:
                value = received(payloads[0].buffer, header, layout, route.places)
        except Exception as error:
            if is_spoilt(header, error):
                route.on_spoilt(header, sender, str(error))
            raise
        if header.kind is FrameKind.MARK:
            self.arrivals.mark(header, sender, perf_counter())
            return
        route.deliver(header, sender, value)

    def _answer_probe(self, header: Header, frames: list[zmq.Frame]) -> None:
        """Answer over the connection that the probe came in by. Raises `Refused`."""
        sizes = [len(payload.buffer) for payload in frames[2:]]
        answer, size = self._probes.answer(header, sender_key(frames[1]), sizes, monotonic())
        reply: list[zmq.Frame | bytes] = [frames[0], encode_header(answer), *([bytes(size)] if size else [])]
        with contextlib.suppress(zmq.Again):  # Its own queue is full: it asked for more than its link carries.
            self._router.send_multipart(reply, zmq.NOBLOCK)

    def _refuse(self, category: str, frames: list[zmq.Frame], why: str) -> None:
        self.refused[category] += 1
        key = sender_key(frames[1]) if len(frames) > 1 else ""
        route = self._route
        name = route.name_of(key) if route else ""
        peer = name or (f"the peer with key {key[:8]}…" if key else "a peer")
        if (peer, category) in self._warned:
            return
        self._warned.add((peer, category))
        line = f"dropped a message from {peer} ({category}): {why}; more like it are only counted"
        log.warning(line)
        # Who was declared lost and wakes has not heard of it yet: nobody needs to know, unless they look into this log.
        if category not in _QUIET and name:
            self._warn(line)

    def _stranger(self, domain: str, address: str, key: str) -> None:
        """A connection with a key that is not of this job: a late peer of an earlier job, or somebody else."""
        self.refused["unknown key holder"] += 1
        log.info("refused a connection from %s with unknown key %s…", address, key[:8])
