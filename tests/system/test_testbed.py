"""The testbed's relay, without packets of the kernel: what it carries where, and what a full queue drops."""

from __future__ import annotations

import pytest

from benchmarks import topologies
from benchmarks.relay import MTU, Fabric
from worker.transport.slow_links import SlowLink


def packet(target: int, size: int = 100) -> bytes:
    header = bytes([0x45, 0, *size.to_bytes(2), *bytes(12), 10, 78, 0, target])
    return header + bytes(size - len(header))


def test_packets_go_where_they_are_addressed_and_arrive_when_their_link_has_carried_them() -> None:
    fabric = Fabric({2: {3: SlowLink(1000.0, 0.5), 4: SlowLink(1000.0, 0.0)}, 3: {2: SlowLink(1000.0, 0.5)}, 4: {}})
    assert fabric.wait(0.0) is None
    fabric.put(0.0, 2, packet(3))
    fabric.put(0.0, 2, packet(4))
    fabric.put(0.0, 3, packet(2))
    assert fabric.wait(0.0) == pytest.approx(0.1)
    assert fabric.take(0.05) == []
    assert fabric.take(0.1) == [(4, packet(4))]
    assert sorted(fabric.take(0.6)) == [(2, packet(2)), (3, packet(3))]


def test_what_has_no_link_and_what_is_no_packet_goes_nowhere() -> None:
    fabric = Fabric({2: {3: SlowLink(1000.0, 0.0)}})
    fabric.put(0.0, 2, packet(9))
    fabric.put(0.0, 2, b"\x60" + packet(3)[1:])
    fabric.put(0.0, 2, b"")
    assert fabric.wait(0.0) is None


def test_a_full_queue_drops_and_an_emptied_one_takes_again() -> None:
    fabric = Fabric({2: {3: SlowLink(1e6, 0.0)}})
    for _ in range(100):
        fabric.put(0.0, 2, packet(3, MTU))
    carried = len(fabric.take(10.0))
    assert 0 < carried < 100
    assert fabric.dropped == 100 - carried
    fabric.put(10.0, 2, packet(3, MTU))
    assert len(fabric.take(20.0)) == 1


def test_a_worker_that_is_not_started_makes_the_others_slower() -> None:
    pool = topologies.slower(topologies.home_devices(), 2.0)
    assert topologies.names(pool) == ["h-1", "h-2", "h-3", "h-4"]
    assert [pool.slowdown(name) for name in topologies.names(pool)] == pytest.approx([2, 8 / 3, 4, 8])
    assert pool.link("h-1", "h-4") == (1e6, 0.015)
