"""A network that is real: each worker in a network namespace of its own, each pair with the rate and delay of a topology.

Needs root, Linux and `ip`. The kernel's own TCP runs over TUN devices between which a small relay carries packets
(`relay.py`): rate and one-way delay per ordered pair, a queue of 100 ms, no loss but that of a full queue. The coordinator
stands outside, with a fast link to everybody.

`python benchmarks/testbed.py --check` compares a plain socket transfer with what was asked for, on links from 1 Mbit/s to
1 Gbit/s and from 1 to 100 ms, one way at a time and both at once.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from contextlib import ExitStack, suppress
from dataclasses import asdict, dataclass
from pathlib import Path
from statistics import median
from typing import Any, TypeVar

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from benchmarks import namespaces, topologies
from benchmarks.common import Disturbance, child_environment, machine, report
from benchmarks.namespaces import COORDINATOR, NamespaceNetwork, run
from benchmarks.relay import DEVICE, MTU
from fusion.topology import Topology

T = TypeVar("T")
OUTSIDE = (1.25e9, 0.0)
"""Bytes per second and seconds to and from the coordinator."""
TOLERANCE = 0.1
_PORT = 5301


def unavailable() -> str | None:
    """Why this machine can't have a testbed, in words; None when it can."""
    if os.geteuid() != 0:
        return "network namespaces need root"
    if shutil.which("ip") is None:
        return "ip not found; install iproute2"
    if not Path("/dev/net/tun").exists():
        return "no /dev/net/tun: this kernel has no TUN devices, or the container hides them"
    return None


class Testbed(NamespaceNetwork):
    """The network of a topology."""

    def __init__(self, topology: Topology) -> None:
        names = topologies.names(topology)
        super().__init__(names, "10.78")
        self._hosts = {worker: COORDINATOR + 1 + number for number, worker in enumerate(names)}
        self._links = {
            self._hosts[first]: {
                **{self._hosts[second]: topology.link(first, second) for second in names if second != first},
                COORDINATOR: OUTSIDE,
            }
            for first in names
        }
        self._links[COORDINATOR] = dict.fromkeys(self._hosts.values(), OUTSIDE)

    def address(self, worker: str) -> str:
        return self._address(self._hosts[worker])

    def _build(self, undo: ExitStack) -> None:
        # The coordinator's device comes first: the relay can't come back from a namespace to where it was.
        places: dict[int, str | None] = {COORDINATOR: None}
        places |= {self._hosts[worker]: namespace for worker, namespace in self.namespaces.items()}
        relay = subprocess.Popen(
            [sys.executable, "-m", "benchmarks.relay", json.dumps({"namespaces": places, "links": self._links})],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            env=child_environment(),
        )
        undo.enter_context(relay)  # closes its input, by which it ends, and waits
        assert relay.stdout is not None
        if relay.stdout.readline() != b"ready\n":
            raise SystemExit("the relay did not start")
        for host, where in places.items():
            ip = ("ip",) if where is None else ("ip", "-n", where)
            run(*ip, "addr", "add", f"{self._address(host)}/24", "dev", DEVICE)
            run(*ip, "link", "set", DEVICE, "mtu", str(MTU), "up")
            if where is not None:
                run(*ip, "link", "set", "lo", "up")


# The check ------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Link:
    """One of the links that are checked: what was asked for, what a socket got."""

    megabits: float
    milliseconds: float
    one_way: float
    """Mbit/s of payload, the other direction idle."""
    both_ways: float
    """The slower direction of two transfers at once."""
    delay: float
    """Half a round trip of a byte on the idle link, median, in milliseconds."""

    @property
    def fits(self) -> bool:
        rates = (abs(self.one_way / self.megabits - 1), abs(self.delay / self.milliseconds - 1))
        return all(error <= TOLERANCE for error in rates)


CHECKED = ((1.0, 100.0), (8.0, 20.0), (20.0, 20.0), (100.0, 20.0), (100.0, 5.0), (1000.0, 1.0))


def inside(namespace: str, work: Callable[[], T]) -> Callable[[], T]:
    """Start `work` on a thread in the namespace; returns what waits for its result."""
    result: list[T] = []

    def enter_and_work() -> None:
        namespaces.enter(namespace)
        result.append(work())

    thread = threading.Thread(target=enter_and_work, daemon=True)
    thread.start()

    def wait() -> T:
        thread.join()
        return result[0]

    return wait


def receive(listener: socket.socket, seconds: float) -> float:
    """Mbit/s of what comes in over the last two thirds of the time, when the connection is up to speed."""
    connection, _ = listener.accept()
    with connection:
        begin = time.monotonic()
        counted, since = 0, None
        while (now := time.monotonic()) < begin + seconds:
            size = len(connection.recv(2**18))
            if size == 0:
                break
            if since is not None:
                counted += size
            elif now > begin + seconds / 3:
                since = time.monotonic()
        assert since is not None, "nothing came for a third of the time"
        return counted * 8e-6 / (time.monotonic() - since)


def transfer(bed: Testbed, source: str, target: str, seconds: float) -> Callable[[], float]:
    """Start to send as fast as it goes; the result is the receiver's rate in Mbit/s."""
    ready = threading.Event()

    def take() -> float:
        with socket.create_server((bed.address(target), _PORT)) as listener:
            ready.set()
            return receive(listener, seconds)

    def give() -> None:
        with suppress(OSError), socket.create_connection((bed.address(target), _PORT)) as connection:
            chunk = bytes(2**16)
            while True:
                connection.sendall(chunk)

    taking = inside(bed.namespaces[target], take)
    ready.wait()
    giving = inside(bed.namespaces[source], give)

    def wait() -> float:
        rate = taking()
        giving()
        return rate

    return wait


def echo(bed: Testbed, source: str, target: str, count: int = 15) -> float:
    """Half of the median round trip of a byte, in milliseconds."""
    ready = threading.Event()

    def answer() -> None:
        with socket.create_server((bed.address(target), _PORT)) as listener:
            ready.set()
            connection, _ = listener.accept()
            with connection:
                connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
                while received := connection.recv(1):
                    connection.sendall(received)

    def ask() -> float:
        with socket.create_connection((bed.address(target), _PORT)) as connection:
            connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
            trips = []
            for _ in range(count):
                begin = time.monotonic()
                connection.sendall(b"x")
                connection.recv(1)
                trips.append(time.monotonic() - begin)
            return median(trips) * 500

    answering = inside(bed.namespaces[target], answer)
    ready.wait()
    delay = inside(bed.namespaces[source], ask)()
    answering()
    return delay


def check(seconds: float) -> list[Link]:
    found = []
    for megabits, milliseconds in CHECKED:
        with Testbed(topologies.two_cities(megabits, milliseconds)) as bed:
            delay = echo(bed, "a-1", "b-1")
            one_way = transfer(bed, "a-1", "b-1", seconds)()
            both = [transfer(bed, "a-2", "b-2", seconds), transfer(bed, "b-2", "a-2", seconds)]
            found.append(Link(megabits, milliseconds, one_way, min(wait() for wait in both), delay))
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--check", action="store_true", help="measure what the links are like")
    parser.add_argument("--seconds", type=float, default=3.0, help="of each transfer")
    options = parser.parse_args()
    if not options.check:
        parser.error("nothing to do: give --check, or use `Testbed` from another benchmark")
    reason = unavailable()
    if reason is not None:
        raise SystemExit(f"error: {reason}")
    # Ended from outside, it still removes its networks.
    signal.signal(signal.SIGTERM, lambda number, frame: sys.exit(128 + number))
    about, disturbance = machine(), Disturbance()
    links = check(options.seconds)
    disturbed = round(disturbance.cores(), 2)
    rows = [
        [
            f"{link.megabits:g} Mbit/s, {link.milliseconds:g} ms",
            f"{link.one_way:.2f}",
            f"{link.both_ways:.2f}",
            f"{link.delay:.1f}",
            "yes" if link.fits else "NO",
        ]
        for link in links
    ]
    data: dict[str, Any] = {
        "machine": about,
        "tolerance": TOLERANCE,
        "cores_taken_by_others": disturbed,
        "links": [asdict(link) | {"fits": link.fits} for link in links],
    }
    report(
        "testbed",
        f"Links of the testbed; others took {disturbed} cores",
        ["asked for", "Mbit/s one way", "both ways", "ms one way", "within 10%"],
        rows,
        data,
    )
    raise SystemExit(0 if all(link.fits for link in links) else 1)


if __name__ == "__main__":
    main()
