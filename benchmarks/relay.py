"""Helper of `testbed.py`: carries packets between network namespaces, as late and as slowly as a topology says.

`python -m benchmarks.relay SPEC_JSON` makes a TUN device in each namespace, prints `ready`, and carries IPv4 packets until its
standard input ends. Rate and delay are those of `worker.transport.slow_links`, so a device's queues are its links to each other device;
a packet that finds more than the queue's worth before it is dropped, as in a router.
"""

from __future__ import annotations

import fcntl
import json
import os
import select
import struct
import sys
from contextlib import suppress
from pathlib import Path
from time import monotonic

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from benchmarks import namespaces
from worker.transport.slow_links import SlowLink, SlowLinks

DEVICE = "t0"
MTU = 9000
_TUNSETIFF = 0x400454CA
_IFF_TUN, _IFF_NO_PI = 0x0001, 0x1000
_QUEUE_SECONDS = 0.1
_QUEUE_PACKETS = 32
"""The queue of a link holds what it sends in so many seconds, and no fewer packets than this."""
_LEAST_WAIT = 1e-4


class Fabric:
    """The links of all ordered pairs of hosts; a host is the last byte of an address. Sans I/O."""

    def __init__(self, links: dict[int, dict[int, SlowLink]]) -> None:
        self._links = links
        # Peers are named by text there.
        self._ways: dict[int, SlowLinks[tuple[int, bytes]]] = {
            source: SlowLinks({str(target): link for target, link in targets.items()})
            for source, targets in links.items()
        }
        self.dropped = 0

    def put(self, now: float, source: int, packet: bytes) -> None:
        """A packet has left a host."""
        if len(packet) < 20 or packet[0] >> 4 != 4:
            return  # what IPv6 says to its neighbours, of which there are none
        target = packet[19]
        link = self._links[source].get(target)
        if link is None:
            return
        queue = max(_QUEUE_SECONDS, _QUEUE_PACKETS * MTU / link.bytes_per_second)
        ways = self._ways[source]
        if ways.busy_for(now, str(target)) > queue:
            self.dropped += 1
        else:
            ways.put(now, str(target), len(packet), (target, packet))

    def take(self, now: float) -> list[tuple[int, bytes]]:
        """Packets that have arrived, with their hosts."""
        return [arrived for ways in self._ways.values() for arrived in ways.take(now)]

    def wait(self, now: float) -> float | None:
        """Seconds until something arrives; None when nothing is under way."""
        soonest = min((at for ways in self._ways.values() if (at := ways.next_at) is not None), default=None)
        return None if soonest is None else max(0.0, soonest - now)


def open_device(namespace: str | None) -> int:
    """A TUN device in this network namespace (None: the one where we are)."""
    if namespace is not None:
        namespaces.enter(namespace)
    descriptor = os.open("/dev/net/tun", os.O_RDWR | os.O_NONBLOCK)
    fcntl.ioctl(descriptor, _TUNSETIFF, struct.pack("16sH22x", DEVICE.encode(), _IFF_TUN | _IFF_NO_PI))
    return descriptor


def carry(fabric: Fabric, devices: dict[int, int]) -> None:
    """Until standard input ends. `devices`: host -> file descriptor."""
    hosts = {descriptor: host for host, descriptor in devices.items()}
    while True:
        wait = fabric.wait(monotonic())
        # Waking for every single packet would cost more than a tenth of a millisecond of patience does.
        ready, _, _ = select.select([0, *hosts], [], [], wait if wait is None else max(wait, _LEAST_WAIT))
        if 0 in ready and not os.read(0, 1):
            return
        now = monotonic()
        for descriptor in ready:
            if descriptor == 0:
                continue
            with suppress(BlockingIOError):
                while True:
                    fabric.put(now, hosts[descriptor], os.read(descriptor, MTU + 64))
        for host, packet in fabric.take(monotonic()):
            with suppress(BlockingIOError):
                os.write(devices[host], packet)


def main() -> None:
    spec = json.loads(sys.argv[1])
    links = {
        int(source): {int(target): SlowLink(*link) for target, link in targets.items()}
        for source, targets in spec["links"].items()
    }
    # Late packets would be a fault of ours, not of the links: before all else, as far as we are let.
    with suppress(PermissionError):
        os.sched_setscheduler(0, os.SCHED_FIFO, os.sched_param(1))
    devices = {int(host): open_device(namespace) for host, namespace in spec["namespaces"].items()}
    print("ready", flush=True)
    carry(Fabric(links), devices)


if __name__ == "__main__":
    main()
