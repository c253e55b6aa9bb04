"""One-way tensor rate between two workers' data planes, over raw pyzmq with `copy=False` and the same security.

`python benchmarks/transport.py`. Workers always encrypt; to see what else our data plane costs, a second table has CURVE taken out
of both sides. Both sides are two processes on loopback with a window of unacknowledged messages; raw pyzmq
hands over frames as they come, ours checks each header against a plan and delivers tensors in memory of their own.
"""

from __future__ import annotations

import multiprocessing
import os
import sys
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from benchmarks.common import ONE_THREAD, Sample, arguments, interleave, machine, ratios, report

os.environ.update(ONE_THREAD)

import torch
import zmq

from dag.cut import Edge, Partition
from dag.graph import TensorMeta
from fusion.messages import PeerAddress
from fusion.plan import Plan
from fusion.sockets import Gatekeeper, KeyPair, new_keys, secure_client, secure_server
from fusion.units import format_bytes
from fusion.wire import FrameKind, Header
from worker.protocol.admission import Admission
from worker.transport import mover as data_plane
from worker.transport.mover import Mover
from worker.transport.parcel import Parcel

SIZES = (64 * 2**10, 256 * 2**10, 2**20, 4 * 2**20, 16 * 2**20)
WINDOW = 8
"""The receiver answers every so many messages; the sender may be two windows ahead."""
PEER = "0" * 40
"""Stands for the peer's key where there is no CURVE."""
PLAN = Plan(policy="benchmark", cuts=(1,), placement=("sender", "receiver"), in_flight=(1, 1))
PARTITION = Partition(
    (1,),
    (),
    tuple(
        Edge(index, index, 0, 1, "activation", TensorMeta((size // 4,), "float32"), True)
        for index, size in enumerate(SIZES)
    ),
)


@dataclass(frozen=True)
class Introduction:
    """What the two ends tell each other through the parent."""

    endpoint: str
    public_key: str


def leave_out_curve(peer_key: str) -> None:
    """Take encryption out of this process's data plane; whatever arrives counts as the peer's."""
    data_plane.secure_server = lambda *_: None
    data_plane.secure_client = lambda *_: None
    data_plane.sender_key = lambda _: peer_key


class RawSender:
    def __init__(self, secure: bool, keys: KeyPair, receiver: Introduction) -> None:
        self._socket = zmq.Context.instance().socket(zmq.DEALER)
        self._socket.setsockopt(zmq.SNDHWM, 0)
        if secure:
            secure_client(self._socket, keys, receiver.public_key)
        self._socket.connect(receiver.endpoint)
        self._buffers = {size: [torch.rand(size // 4).numpy() for _ in range(4)] for size in SIZES}

    def send(self, edge: int, serial: int) -> None:
        self._socket.send(b"%d %d" % (edge, serial), zmq.SNDMORE)
        self._socket.send(self._buffers[SIZES[edge]][serial % 4], copy=False)

    def await_answer(self) -> None:
        self._socket.recv()


class OurSender:
    def __init__(self, mover: Mover, receiver: Introduction) -> None:
        self._answers = threading.Semaphore(0)
        admission = Admission("benchmark", PLAN, PARTITION, "sender", micro_batches=WINDOW, last_step=2**60)
        peer = PeerAddress(worker="receiver", endpoint=receiver.endpoint, public_key=receiver.public_key)
        self._route = mover.open(admission, [peer], lambda *_: self._answers.release())
        self._tensors = {size: [torch.rand(size // 4) for _ in range(4)] for size in SIZES}
        self._step = 0

    def send(self, edge: int, serial: int) -> None:
        if serial % WINDOW == 0:
            self._step += 1
        shape = (SIZES[edge] // 4,)
        header = Header(
            "benchmark", 0, FrameKind.ACTIVATION, edge, self._step, serial % WINDOW, "none", "float32", shape
        )
        self._route.send("receiver", header, Parcel(self._tensors[SIZES[edge]][serial % 4]))

    def await_answer(self) -> None:
        self._answers.acquire()


def transfer(sender: RawSender | OurSender, edge: int, count: int) -> float:
    """Seconds until `count` messages (whole windows) of `SIZES[edge]` bytes are through."""
    started = time.perf_counter()
    ahead = 0
    for serial in range(count):
        sender.send(edge, serial)
        if serial % WINDOW == WINDOW - 1:
            ahead += 1
            if ahead > 2:
                sender.await_answer()
                ahead -= 1
    for _ in range(ahead):
        sender.await_answer()
    return time.perf_counter() - started


def serve_raw(secure: bool, pipe: Connection) -> None:
    context = zmq.Context.instance()
    keys = new_keys()
    gate = Gatekeeper(context)
    router = context.socket(zmq.ROUTER)
    pipe.send(keys.public)
    if secure:
        gate.allow("data", pipe.recv())
        gate.start()
        secure_server(router, keys, "data")
    port = router.bind_to_random_port("tcp://127.0.0.1")
    pipe.send(Introduction(f"tcp://127.0.0.1:{port}", keys.public))
    while True:
        identity, header, payload = router.recv_multipart(copy=False)
        edge, serial = map(int, bytes(header.buffer).split())
        if len(payload.buffer) != SIZES[edge]:
            raise SystemExit("a message of the wrong size")
        if serial % WINDOW == WINDOW - 1:
            router.send_multipart([identity, b"answer"])


def serve_ours(secure: bool, pipe: Connection) -> None:
    keys = new_keys()
    pipe.send(keys.public)
    if not secure:
        leave_out_curve(PEER)
    mover = Mover(keys, print)
    port = mover.start("127.0.0.1", 0)
    pipe.send(Introduction(f"tcp://127.0.0.1:{port}", keys.public if secure else PEER))
    sender: Introduction = pipe.recv()

    def deliver(header: Header, _: str, value: torch.Tensor | None) -> None:
        if value is None or value.numel() * 4 != SIZES[header.edge]:
            raise SystemExit("a tensor of the wrong size")
        if header.micro_batch == WINDOW - 1:
            answer = Header("benchmark", 0, FrameKind.GRADIENT, header.edge, header.step, header.micro_batch)
            route.send("sender", answer, Parcel(None))

    admission = Admission("benchmark", PLAN, PARTITION, "receiver", micro_batches=WINDOW, last_step=2**60)
    peer = PeerAddress(worker="sender", endpoint=sender.endpoint, public_key=sender.public_key)
    mover.admit([peer])
    pipe.send("admitted")
    route = mover.open(admission, [peer], deliver)
    threading.Event().wait()


def serve_sender(ours: bool, secure: bool, pipe: Connection) -> None:
    """Runs transfers that the parent asks for."""
    torch.set_num_threads(1)
    keys = new_keys()
    sender: RawSender | OurSender
    if ours:
        if not secure:
            leave_out_curve(PEER)
        mover = Mover(keys, print)
        port = mover.start("127.0.0.1", 0)
        pipe.send(Introduction(f"tcp://127.0.0.1:{port}", keys.public if secure else PEER))
        receiver = pipe.recv()
        sender = OurSender(mover, receiver)
    else:
        pipe.send(Introduction("", keys.public))
        receiver = pipe.recv()
        sender = RawSender(secure, keys, receiver)
    while True:
        edge, count = pipe.recv()
        pipe.send(transfer(sender, edge, count))


class Pair:
    """Two processes and the transfers between them."""

    def __init__(self, ours: bool, secure: bool) -> None:
        context = multiprocessing.get_context("spawn")
        to_receiver, receiver_end = context.Pipe()
        self._sender, sender_end = context.Pipe()
        serve: Callable[..., None] = serve_ours if ours else serve_raw
        self._processes: list[Any] = [
            context.Process(target=serve, args=(secure, receiver_end), daemon=True),
            context.Process(target=serve_sender, args=(ours, secure, sender_end), daemon=True),
        ]
        for process in self._processes:
            process.start()
        to_receiver.recv()
        introduction = self._sender.recv()
        if ours:
            receiver = to_receiver.recv()
            to_receiver.send(introduction)
            to_receiver.recv()
        else:
            if secure:
                to_receiver.send(introduction.public_key)
            receiver = to_receiver.recv()
        self._sender.send(receiver)

    def rate(self, edge: int, count: int) -> float:
        """Bytes per second."""
        self._sender.send((edge, count))
        seconds: float = self._sender.recv()
        return SIZES[edge] * count / seconds

    def close(self) -> None:
        for process in self._processes:
            process.terminate()
            process.join()


def main() -> None:
    parser = arguments(__doc__)
    parser.add_argument("--bytes", type=int, default=256 * 2**20, help="bytes of each transfer")
    options = parser.parse_args()
    about = machine()
    rows: list[list[str]] = []
    results: list[dict[str, object]] = []
    for secure in (True, False):
        pairs = {"ours": Pair(True, secure), "raw": Pair(False, secure)}
        try:
            for edge, size in enumerate(SIZES):
                count = min(max(options.bytes // size, 4 * WINDOW), 2048) // WINDOW * WINDOW

                for pair in pairs.values():
                    pair.rate(edge, 2 * WINDOW)
                rates, disturbed = interleave(
                    {name: partial(pair.rate, edge, count) for name, pair in pairs.items()},
                    options.rounds,
                    options.repeats,
                )
                ours, raw = Sample(tuple(rates["ours"])), Sample(tuple(rates["raw"]))
                ratio = ratios(ours.values, raw.values)
                rows.append(
                    [
                        f"{'CURVE' if secure else 'no security'}, {format_bytes(size)}",
                        f"{ours.median / 1e9:.2f}",
                        f"{raw.median / 1e9:.2f}",
                        f"{ratio.median:.2f}",
                        ratio.spread(digits=2),
                    ]
                )
                results.append(
                    {
                        "secure": secure,
                        "cores_taken_by_others": disturbed,
                        "bytes": size,
                        "messages": count,
                        "ours": ours.values,
                        "raw": raw.values,
                        "ratio": ratio.median,
                        "ratios": ratio.values,
                    }
                )
        finally:
            for pair in pairs.values():
                pair.close()
    report(
        "transport",
        "One-way rate between two workers over raw pyzmq (GB/s)",
        ["message", "ours", "pyzmq copy=False", "ratio", "spread"],
        rows,
        {"machine": about, "target": "ratio >= 0.8 for 1 MiB and larger", "results": results},
    )


if __name__ == "__main__":
    main()
