"""One job's sending side of the data plane: connections to its peers, the replay log, and the encoder thread.

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

import torch
import zmq
from torch import Tensor

from compress import codec, edge_seed
from executor.staging import ToHost
from fusion.messages import PeerAddress
from fusion.wire import FrameKind, Header, encode_header
from worker.admission import Admission
from worker.replay_log import ReplayLog, Sent

log = logging.getLogger("fusion.worker")

# Below this size copying a payload is cheaper than pyzmq's bookkeeping for memory that it borrows.
_COPY_BYTES = 256 * 1024

Deliver = Callable[[Header, Tensor | None], None]


class Peer:
    """A DEALER to one peer, and the lock that lets several threads use it: ZeroMQ sockets are not thread-safe."""

    def __init__(self, socket: zmq.Socket[bytes], address: PeerAddress) -> None:
        self.socket = socket
        self.address = address
        self.lock = threading.Lock()

    def transmit(self, header: bytes, payload: memoryview | None) -> int:
        with self.lock:
            if self.socket.closed:
                return 0
            if payload is None:
                self.socket.send(header)
                return len(header)
            self.socket.send(header, zmq.SNDMORE)
            self.socket.send(payload, 0, copy=payload.nbytes < _COPY_BYTES)
            return len(header) + payload.nbytes

    def connect_again(self) -> None:
        """Try again to get in where the handshake was refused; what was queued for the peer is lost."""
        with self.lock:
            try:
                self.socket.disconnect(self.address.endpoint)
            except zmq.ZMQError as error:
                if error.errno != errno.ENOENT:  # ZeroMQ may have given the endpoint up by itself
                    raise
            self.socket.connect(self.address.endpoint)

    def close(self) -> None:
        with self.lock:
            self.socket.close(0)


class Route:
    """One job's part of the data plane, from `Mover.open` to `Mover.close_route`."""

    def __init__(
        self,
        admission: Admission,
        peers: dict[str, Peer],
        deliver: Deliver,
        seed: int,
        on_error: Callable[[Exception], None] = lambda _: None,
    ) -> None:
        self.admission = admission
        self.deliver = deliver
        self._on_error = on_error
        self._peers = peers
        self._seed = seed
        self._log: ReplayLog[memoryview | None] = ReplayLog()
        self._lock = threading.Lock()
        self._sent: Counter[str] = Counter()
        self._encoder = ThreadPoolExecutor(1, thread_name_prefix="encoder")
        self._names = {peer.address.public_key: name for name, peer in peers.items()}

    @property
    def keys(self) -> tuple[str, ...]:
        """The peers' public keys."""
        return tuple(self._names)

    @property
    def peers(self) -> tuple[str, ...]:
        return tuple(self._peers)

    def name_of(self, public_key: str) -> str:
        """The worker with this key; empty for a stranger."""
        return self._names.get(public_key, "")

    def send(
        self, to: str, header: Header, value: Tensor | ToHost | None, options: dict[str, float] | None = None
    ) -> None:
        """Send a value, and keep it to be sent again. Don't write to it afterwards.

        A codec other than `none`, and a copy from a device that is under way, are left to the encoder thread.
        """
        if value is None or (header.codec == "none" and isinstance(value, Tensor)):
            self._send_encoded(to, header, None if value is None else _bytes_of(value))
        else:
            self._encoder.submit(self._encode_and_send, to, header, value, options or {})

    def encoded(self, header: Header, tensor: Tensor, options: dict[str, float]) -> Tensor:
        """What the receiver of this message would get: for a lossy edge whose two ends are here."""
        return codec(header.codec, **options).round_trip(tensor, self._codec_seed(header))

    def request(self, to: str, header: Header) -> None:
        """Send a message that is not kept: RESEND."""
        self._count(to, self._peers[to].transmit(encode_header(header), None))

    def answer(self, request: Header, to: str) -> bool:
        """Send again what a RESEND names; False when it was not sent yet (it will be) or is long used up."""
        key = (FrameKind[request.codec], request.edge, request.step, request.micro_batch)
        with self._lock:
            sent = self._log.find(to, key)
        if sent is None:
            return False
        self._count(to, self._peers[to].transmit(sent.header, sent.payload))
        return True

    def forget(self, through: int) -> None:
        """Steps up to and including `through` will not be asked for again."""
        with self._lock:
            self._log.forget(through)

    def take_sent(self) -> dict[str, int]:
        """Bytes sent to each peer since the last call."""
        with self._lock:
            sent, self._sent = self._sent, Counter()
        return dict(sent)

    def close(self) -> None:
        self._encoder.shutdown(wait=True, cancel_futures=True)
        for peer in self._peers.values():
            peer.close()

    def _encode_and_send(self, to: str, header: Header, value: Tensor | ToHost, options: dict[str, float]) -> None:
        try:
            tensor = value.wait() if isinstance(value, ToHost) else value
            payload = codec(header.codec, **options).encode(tensor, self._codec_seed(header))
            self._send_encoded(to, header, payload)
        except Exception as error:
            log.exception("could not encode %s %d for %s", header.kind.name, header.edge, to)
            self._on_error(error)

    def _send_encoded(self, to: str, header: Header, payload: memoryview | None) -> None:
        packed = encode_header(header)
        with self._lock:
            self._log.record(header.key, Sent(to, packed, payload))
        self._count(to, self._peers[to].transmit(packed, payload))

    def _count(self, to: str, sent: int) -> None:
        with self._lock:
            self._sent[to] += sent

    def _codec_seed(self, header: Header) -> int:
        backward = header.kind is FrameKind.GRADIENT
        return edge_seed(self._seed, header.step, header.micro_batch, header.edge, gradient=backward)


def _bytes_of(value: Tensor) -> memoryview:
    """The value's memory; the short way for what most values are."""
    if value.dtype is torch.float32 and value.is_contiguous() and value.device.type == "cpu":
        array: memoryview = value.detach().numpy().data
        return array
    return codec("none").encode(value)
