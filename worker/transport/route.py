"""One job's sending side of the data plane: connections to its peers, and the encoder thread.

Sending costs the caller a header and a hand-over to ZeroMQ's own I/O thread, which encrypts and writes. Lossy codecs, and
copies from a device that are under way, are left to the encoder thread.
"""

from __future__ import annotations

import errno
import logging
import threading
from collections import Counter
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from time import monotonic

import zmq

from fusion.errors import ServiceError
from fusion.messages import PeerAddress
from fusion.sockets import keep_alive
from fusion.wire import FrameKind, Header, encode_header
from worker.protocol.admission import Admission
from worker.transport.arrival import FindPlaces, Received
from worker.transport.delay_line import DelayLine
from worker.transport.parcel import Parcel
from worker.transport.probe_marks import Marks

log = logging.getLogger("fusion.worker")

# Below this size copying a payload is cheaper than pyzmq's bookkeeping for memory that it borrows.
_COPY_BYTES = 256 * 1024
_STALLED_SECONDS = 60.0
"""Large messages that wait in the kernel take longer than this on no link that could train."""
_UNANSWERED = 2.0

Deliver = Callable[[Header, str, Received], None]
"""(header, authenticated sender, value)."""
Spoilt = Callable[[Header, str, str], None]
"""(header, authenticated sender, why its value was refused)."""


class Peer:
    """A DEALER to one peer, and the lock that lets several threads use it: ZeroMQ sockets are not thread-safe."""

    def __init__(
        self, socket: zmq.Socket[bytes], address: PeerAddress, endpoint: str | None = None, silence: float = 5.0
    ) -> None:
        self.socket = socket
        self.address = address
        self.endpoint = endpoint or address.endpoint
        """Where the socket connects to: on this machine, when a relay is between."""
        self.lock = threading.Lock()
        self._silence = silence

    def connect(self) -> None:
        """Begin to connect to the endpoint of the moment; a dead connection is noticed and made again."""
        relayed = self.endpoint != self.address.endpoint
        # This machine acknowledges all that goes to a relay, so that only the peer's own answers tell whether it gets there.
        keep_alive(self.socket, self._silence, _UNANSWERED * self._silence if relayed else _STALLED_SECONDS)
        self.socket.setsockopt(zmq.RECONNECT_IVL_MAX, 1000)
        self.socket.connect(self.endpoint)

    def transmit(self, header: bytes, payload: memoryview | None) -> int:
        with self.lock:
            if self.socket.closed:
                return 0
            try:
                if payload is None:
                    self.socket.send(header)
                    return len(header)
                self.socket.send(header, zmq.SNDMORE)
                self.socket.send(payload, 0, copy=payload.nbytes < _COPY_BYTES)
            except zmq.ZMQError as error:
                raise ServiceError(f"could not send to {self.address.worker}: {error}") from error
            return len(header) + payload.nbytes

    def connect_again(self) -> None:
        """Try again to get in where the handshake was refused; what was queued for the peer is lost."""
        self.move(self.endpoint)

    def move(self, endpoint: str) -> None:
        """Connect there from now on; what was queued for the peer is lost, and will be asked for again."""
        with self.lock:
            if self.socket.closed:
                return
            try:
                self.socket.disconnect(self.endpoint)
            except zmq.ZMQError as error:
                if error.errno != errno.ENOENT:  # ZeroMQ may have given the endpoint up by itself
                    raise
            self.endpoint = endpoint
            self.connect()

    def close(self) -> None:
        with self.lock:
            self.socket.close(0)


class Route:
    """One job's part of the data plane, from `Mover.open` to `Mover.close_route`.

    `admission` may be replaced at any time: by that of the plan that is followed from then on. With a `line`, messages to
    the peers that it covers go through it. `places` finds those that an arriving gradient leaves out. `on_error` hears of
    what fails on a thread that nobody waits for: the encoder's or the line's; `on_spoilt` of a value that is expected from
    its sender, but came in a form that was refused.
    """

    def __init__(
        self,
        admission: Admission,
        peers: dict[str, Peer],
        deliver: Deliver,
        on_error: Callable[[Exception], None] = lambda _: None,
        line: DelayLine | None = None,
        places: FindPlaces = lambda _: None,
        on_spoilt: Spoilt = lambda *_: None,
    ) -> None:
        self.admission = admission
        self.places = places
        self.on_spoilt = on_spoilt
        self._line = line
        self.deliver = deliver
        self._on_error = on_error
        self._lock = threading.Lock()
        self._sent: Counter[str] = Counter()
        self._marks = Marks()
        self._encoder = ThreadPoolExecutor(1, thread_name_prefix="encoder")
        self._peers: dict[str, Peer] = {}
        self._names: dict[str, str] = {}
        self.add(peers)

    @property
    def connections(self) -> dict[str, Peer]:
        """Peers by name."""
        return dict(self._peers)

    def add(self, peers: dict[str, Peer]) -> None:
        """Know these peers too."""
        # Other threads read without the lock, so both are replaced whole.
        self._names = self._names | {peer.address.public_key: name for name, peer in peers.items()}
        self._peers = self._peers | peers

    def remove(self, name: str) -> Peer | None:
        """Know this peer no longer: its messages are a stranger's. Returns its connection, to be closed."""
        peer = self._peers.get(name)
        self._peers = {other: kept for other, kept in self._peers.items() if other != name}
        self._names = {key: other for key, other in self._names.items() if other != name}
        return peer

    def name_of(self, public_key: str) -> str:
        """The worker with this key; empty for a stranger."""
        return self._names.get(public_key, "")

    def send(self, to: str, header: Header, parcel: Parcel | None) -> None:
        """Send a message. What costs time to encode is left to the encoder thread, which keeps the order.

        A peer that is not known (any more) gets nothing: its place has been, or is about to be, taken by another.
        """
        if header.kind is FrameKind.UNDER_WAY:
            # Behind what it speaks of, which may still have to be encoded.
            self._encoder.submit(self._or_report, _sending(to, header), partial(self._transmit, to, header, None))
        elif parcel is None or parcel.ready:
            self._transmit(to, header, None if parcel is None else parcel.payload_for(header.codec))
        else:
            work = partial(self._encode_and_transmit, to, header, parcel)
            self._encoder.submit(self._or_report, _sending(to, header), work)

    def send_bytes(self, to: str, header: Header, payload: memoryview | None) -> None:
        """Send a payload as it is."""
        self._transmit(to, header, payload)

    def encode(self, parcel: Parcel) -> None:
        """Have the encoder thread encode it now, whether or not it will be sent."""
        if not parcel.ready:
            self._encoder.submit(self._or_report, "encode a value", parcel.payload)

    def take_sent(self) -> dict[str, int]:
        """Bytes sent to each peer since the last call."""
        with self._lock:
            sent, self._sent = self._sent, Counter()
        return dict(sent)

    def close(self) -> None:
        self._encoder.shutdown(wait=True, cancel_futures=True)
        for peer in self._peers.values():
            peer.close()

    def _or_report(self, doing: str, work: Callable[[], object]) -> None:
        """For work that is done later, on another thread: whoever asked for it can't be told any more."""
        try:
            work()
        except Exception as error:
            log.exception("could not %s", doing)
            self._on_error(error)

    def _encode_and_transmit(self, to: str, header: Header, parcel: Parcel) -> None:
        self._transmit(to, header, parcel.payload_for(header.codec))

    def _transmit(self, to: str, header: Header, payload: memoryview | None) -> None:
        peer = self._peers.get(to)
        if peer is None:
            return
        marks = self._marks.around(to, header, payload.nbytes, monotonic()) if payload is not None else None
        if marks is not None:
            self._hand_over(peer, to, marks[0], None)
        sent = self._hand_over(peer, to, header, payload)
        if marks is not None:
            self._hand_over(peer, to, marks[1], None)
        with self._lock:
            self._sent[to] += sent

    def _hand_over(self, peer: Peer, to: str, header: Header, payload: memoryview | None) -> int:
        encoded = encode_header(header)
        if self._line is not None and self._line.covers(to):
            size = len(encoded) + (0 if payload is None else payload.nbytes)
            work = partial(peer.transmit, encoded, payload)
            self._line.put(to, size, partial(self._or_report, _sending(to, header), work))
            return size
        return peer.transmit(encoded, payload)


def _sending(to: str, header: Header) -> str:
    return f"send {header.kind.name.lower()} {header.edge} to {to}"
