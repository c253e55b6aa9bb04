"""When messages leave and arrive on the links of a topology, played without a clock; and once with one."""

from __future__ import annotations

import queue
from time import monotonic

import pytest
from hypothesis import given
from hypothesis import strategies as st

from worker.transport.delay_line import DelayLine
from worker.transport.slow_links import SlowLink, SlowLinks

CITY, SEA = SlowLink(1e6, 0.02), SlowLink(500.0, 0.5)


def arrivals(links: SlowLinks[str]) -> list[tuple[float, str]]:
    found = []
    while (at := links.next_at) is not None:
        assert not links.take(at - 1e-9)
        found += [(at, message) for message in links.take(at)]
    return found


def test_a_message_takes_its_bytes_over_the_rate_and_the_latency() -> None:
    links: SlowLinks[str] = SlowLinks({"lima": CITY})
    assert links.next_at is None
    links.put(10.0, "lima", 500_000, "half a megabyte")
    assert arrivals(links) == [(10.52, "half a megabyte")]


def test_messages_of_a_pair_queue_and_latency_does_not_limit_the_rate() -> None:
    links: SlowLinks[str] = SlowLinks({"lima": SEA})
    for number in range(4):
        links.put(0.0, "lima", 250, str(number))
    assert arrivals(links) == [(1.0, "0"), (1.5, "1"), (2.0, "2"), (2.5, "3")]
    assert links.busy_for(0.5, "lima") == 1.5
    assert links.busy_for(2.5, "lima") == 0.0
    # The link has been idle since 2.0: that time is not saved up for a burst.
    links.put(9.0, "lima", 250, "late")
    links.put(9.0, "lima", 250, "later")
    assert arrivals(links) == [(10.0, "late"), (10.5, "later")]


def test_links_do_not_share_their_rates() -> None:
    links: SlowLinks[str] = SlowLinks({"lima": SEA, "oslo": SEA})
    links.put(0.0, "lima", 500, "there")
    links.put(0.0, "oslo", 250, "elsewhere")
    assert arrivals(links) == [(1.0, "elsewhere"), (1.5, "there")]


def test_a_peer_without_a_link() -> None:
    links: SlowLinks[str] = SlowLinks({"lima": SEA})
    assert links.covers("lima")
    assert not links.covers("oslo")
    with pytest.raises(KeyError):
        links.put(0.0, "oslo", 1, "")


@given(st.lists(st.tuples(st.floats(0, 2), st.integers(0, 5000), st.booleans()), max_size=30))
def test_no_link_carries_more_than_its_rate_and_order_is_kept(sent: list[tuple[float, int, bool]]) -> None:
    """Whatever is handed over when: between two arrivals of a link there is time for the bytes of the second."""
    links: SlowLinks[tuple[str, int, float, int]] = SlowLinks({"lima": SEA, "oslo": CITY})
    shapes, now = {"lima": SEA, "oslo": CITY}, 0.0
    for number, (pause, size, far) in enumerate(sent):
        now += pause
        peer = "lima" if far else "oslo"
        links.put(now, peer, size, (peer, size, now, number))
    last: dict[str, tuple[float, int]] = {}
    while (at := links.next_at) is not None:
        for peer, size, handed_over, number in links.take(at):
            link = shapes[peer]
            wire = size / link.bytes_per_second
            before, previous = last.get(peer, (0.0, -1))
            idle_until = max(handed_over, before - link.seconds)
            assert at == pytest.approx(idle_until + wire + link.seconds)
            assert number > previous
            last[peer] = (at, number)


def test_the_delay_line_keeps_to_them() -> None:
    line = DelayLine({"lima": SlowLink(1e6, 0.05)})
    try:
        arrived: queue.SimpleQueue[tuple[int, float]] = queue.SimpleQueue()
        begin = monotonic()
        for number in range(3):
            line.put("lima", 20_000, lambda number=number: arrived.put((number, monotonic() - begin)))
        line.put("lima", 0, lambda: arrived.put((3, monotonic() - begin)))
        for number, least in enumerate((0.07, 0.09, 0.11, 0.11)):
            found, at = arrived.get(timeout=20)
            assert found == number
            assert at >= least
    finally:
        line.close()
    line.close()


def test_a_message_that_takes_longer_than_a_wait_can_be_holds_up_no_other() -> None:
    arrived: queue.Queue[str] = queue.Queue()
    line = DelayLine({"moon": SlowLink(0.125, 3600.0), "lima": SlowLink(1e9, 0.0)})
    try:
        line.put("moon", 2**40, lambda: arrived.put("moon"))
        for _ in range(20):  # The thread waits for the moon between two of them.
            line.put("lima", 1, lambda: arrived.put("lima"))
            assert arrived.get(timeout=10) == "lima"
    finally:
        line.close()
