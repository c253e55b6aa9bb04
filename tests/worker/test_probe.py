"""Measuring a link: what is sent stays within its bounds, and what comes out is the link, over simulated and real sockets."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from random import Random

import pytest
import zmq
from fake_coordinator import FakeCoordinator
from pool_cases import addresses, pool

from fusion.messages import ExpectProbe, LinkMeasured, PeerAddress, ProbeLink
from fusion.sockets import KeyPair, new_keys
from fusion.wire import FrameKind, Header
from worker.protocol.admission import Refused
from worker.transport import probe_marks, probe_socket
from worker.transport.mover import Mover
from worker.transport.probe_answers import ProbeAnswers
from worker.transport.probe_course import Course, Exchange
from worker.transport.probe_marks import ArrivalTimes, Marks
from worker.transport.probe_socket import measure_link

MAX_BYTES, SECONDS = 2**20, 2.0


def play(course: Course, answer: Callable[[Exchange], float]) -> tuple[float, int]:
    """Run a course over a link that answers after so long; returns what it took, in seconds and bytes."""
    elapsed, sent = 0.0, 0
    while (exchange := course.next(elapsed)) is not None:
        spent = min(answer(exchange), course.seconds - elapsed)
        course.took(exchange, spent)
        elapsed += spent
        sent += exchange.there + exchange.back
        if elapsed >= course.seconds:
            break
    return elapsed, sent


@pytest.mark.parametrize("there", [1e6, 2.5e6, 1.25e7, 1.25e8])
@pytest.mark.parametrize("latency", [0.0005, 0.02, 0.09])
def test_a_course_finds_both_directions_through_noise(there: float, latency: float) -> None:
    noise, back = Random(5), there / 4
    course = Course(MAX_BYTES, SECONDS)
    elapsed, sent = play(
        course,
        lambda each: (2 * latency + each.there / there + each.back / back) * noise.uniform(1.0, 1.05),
    )
    figures = course.figures()
    assert figures is not None
    assert figures[0].seconds == figures[1].seconds == pytest.approx(latency, rel=0.06)
    # What the largest message adds to the round trip must be more than the noise to be seen.
    if 262144 / there > latency:
        assert figures[0].bytes_per_second == pytest.approx(there, rel=0.2)
        assert figures[1].bytes_per_second == pytest.approx(back, rel=0.2)
    assert elapsed <= SECONDS
    assert sent <= MAX_BYTES


def test_a_slow_link_is_known_after_small_messages() -> None:
    course = Course(MAX_BYTES, SECONDS)
    elapsed, sent = play(course, lambda each: 0.1 + (each.there + each.back) / 20_000)
    assert sent <= 40_000
    assert elapsed <= SECONDS
    figures = course.figures()
    assert figures is not None
    assert figures[0].bytes_per_second == pytest.approx(20_000, rel=0.1)


def test_a_link_on_which_nothing_larger_comes_through_is_as_slow_as_that_or_unknown() -> None:
    course = Course(MAX_BYTES, SECONDS)
    play(course, lambda each: 0.01 if each == Exchange(0, 0) else 1e9)
    assert course.figures() is None


def test_long_round_trips_leave_time_for_both_directions() -> None:
    course = Course(MAX_BYTES, SECONDS)
    elapsed, _ = play(course, lambda each: 0.6 + (each.there + each.back) / 1e6)
    assert elapsed <= SECONDS
    assert course.figures() is not None


# Who is answered --------------------------------------------------------------------------------------------------


def probe(number: int, back: int = 0) -> Header:
    return Header("", 0, FrameKind.PROBE, 0, number, 0, shape=(back,) if back else ())


def test_only_announced_probes_are_answered_within_their_bytes_and_time() -> None:
    answers = ProbeAnswers()
    with pytest.raises(Refused, match="not announced"):
        answers.answer(probe(1), "a", [], 0.0)
    answers.expect("a", 1000, until=5.0)
    header, size = answers.answer(probe(7, 400), "a", [100], 1.0)
    assert (header.kind, header.step, size) == (FrameKind.PROBED, 7, 400)
    with pytest.raises(Refused, match="not announced"):
        answers.answer(probe(1), "b", [], 1.0)
    with pytest.raises(Refused, match="more bytes"):
        answers.answer(probe(8, 2**40), "a", [], 1.0)
    with pytest.raises(Refused, match="more bytes"):
        answers.answer(probe(9), "a", [1], 1.0)
    with pytest.raises(Refused, match="not announced"):
        answers.answer(probe(9), "a", [], 5.0)
    assert answers.forget(4.0) == []
    assert answers.forget(5.0) == ["a"]


# Marks ------------------------------------------------------------------------------------------------------------

LARGE = Header("job", 3, FrameKind.ACTIVATION, 1, 5, 0)


def test_large_messages_are_marked_now_and_then() -> None:
    marks = Marks()
    assert marks.around("b", LARGE, probe_marks.LARGE - 1, 0.0) is None
    found = marks.around("b", LARGE, 10**6, 0.0)
    assert found is not None
    before, after = found
    assert (before.kind, before.job, before.epoch) == (FrameKind.MARK, "job", 3)
    assert (before.step, before.micro_batch, after.step, after.micro_batch) == (1, 0, 1, 1)
    assert after.shape == (10**6,)
    assert marks.around("b", LARGE, 10**6, 0.5) is None
    assert marks.around("c", LARGE, 10**6, 0.5) is not None
    assert marks.around("b", LARGE, 10**6, 1.0) is not None


def test_the_time_between_marks_is_the_link_whatever_waited_before_them() -> None:
    times, marks, noise = ArrivalTimes(), Marks(), Random(1)
    for second in range(5):
        found = marks.around("b", LARGE, 200_000, float(second))
        assert found is not None
        begin = 10.0 * second + noise.uniform(0, 3)
        times.mark(found[0], "a", begin)
        # One of them while the receiver had other things to do.
        times.mark(found[1], "a", begin + 200_000 / 1e6 * (5 if second == 3 else noise.uniform(1, 1.02)))
    taken = times.take()
    assert not taken["a"].at_least
    assert taken["a"].bytes_per_second == pytest.approx(1e6, rel=0.05)
    assert times.take() == {}


class Arriving:
    """Marked messages of one peer, one a second."""

    def __init__(self) -> None:
        self.times, self.marks, self.now = ArrivalTimes(), Marks(), 0.0

    def comes(self, *spent: float, size: int = 100_000) -> tuple[int, bool] | None:
        """One message after the other, with so many seconds between its marks; what is told in the end: rate, at least."""
        for seconds in spent:
            self.now += 1.0
            found = self.marks.around("b", LARGE, size, self.now)
            assert found is not None
            self.times.mark(found[0], "a", self.now)
            self.times.mark(found[1], "a", self.now + seconds)
        told = self.times.take().get("a")
        return (round(told.bytes_per_second / 1e6), told.at_least) if told is not None else None


def test_half_a_pair_of_marks_says_nothing() -> None:
    times, marks = ArrivalTimes(), Marks()
    first, second = marks.around("b", LARGE, 10**6, 0.0), marks.around("b", LARGE, 10**6, 1.0)
    assert first is not None
    assert second is not None
    times.mark(first[0], "a", 0.0)
    times.mark(second[1], "a", 1.0)
    times.mark(first[1], "a", 2.0)
    assert times.take() == {}
    times.mark(second[0], "a", 3.0)
    times.mark(second[1], "a", 3.01)
    assert times.take()["a"].bytes_per_second == pytest.approx(1e8)


def test_marks_that_come_out_together_make_no_link_fast() -> None:
    """On a link of 2 MB/s the receiver is late for many messages: their marks, and with them all of the message, waited for it."""
    arriving = Arriving()
    assert arriving.comes(1e-5) is None
    late = Random(3)
    for _ in range(500):
        assert arriving.comes(1e-5 if late.random() < 0.4 else 0.05) in (None, (2, False))
    assert arriving.comes(0.05, 0.05, 0.05) == (2, False)
    # Few in a row are chance.
    assert arriving.comes(*[1e-5] * 10) is None


def test_a_link_that_has_become_faster_is_found_out_and_said_to_carry_no_more_than_was_seen() -> None:
    arriving = Arriving()
    arriving.comes(0.05, 0.05, 0.05, 0.05, 0.05)
    assert arriving.comes(*[1e-3] * 14) is None
    assert arriving.comes(1e-3) == (20, True)
    assert arriving.comes(0.05) is None
    # Of another size: the slowest of what was seen.
    assert arriving.comes(*[1e-3] * 14) is None
    assert arriving.comes(1e-6, size=10**6) == (20, True)


# Over sockets -----------------------------------------------------------------------------------------------------


@dataclass
class End:
    keys: KeyPair
    mover: Mover
    address: PeerAddress


def make_end(name: str) -> End:
    keys = new_keys()
    mover = Mover(keys, lambda _: None)
    port = mover.start("127.0.0.1", 0)
    address = PeerAddress(worker=name, endpoint=f"tcp://127.0.0.1:{port}", public_key=keys.public)
    return End(keys, mover, address)


@pytest.fixture
def ends() -> Iterator[tuple[End, End]]:
    a, b = make_end("a"), make_end("b")
    yield a, b
    a.mover.close()
    b.mover.close()


def test_a_link_is_measured_over_authenticated_sockets(ends: tuple[End, End]) -> None:
    a, b = ends
    b.mover.expect_probe(a.address, MAX_BYTES, 30.0)
    found = measure_link(a.keys, b.address, MAX_BYTES, SECONDS)
    assert found.error == ""
    assert found.there is not None
    assert found.back is not None
    assert 0 < found.there.seconds < SECONDS
    assert min(found.there.bytes_per_second, found.back.bytes_per_second) > 1e4
    assert not b.mover.refused


def test_who_was_not_announced_is_not_let_in(ends: tuple[End, End], monkeypatch: pytest.MonkeyPatch) -> None:
    a, b = ends
    monkeypatch.setattr(probe_socket, "HANDSHAKE_SECONDS", 0.3)
    found = measure_link(a.keys, b.address, MAX_BYTES, SECONDS)
    assert found.there is None
    assert "can't reach b at tcp://127.0.0.1" in found.error


def test_a_peer_that_was_probed_stays_a_peer(ends: tuple[End, End]) -> None:
    a, b = ends
    b.mover.admit([a.address])
    b.mover.expect_probe(a.address, MAX_BYTES, 0.0)
    b.mover.end_probes()
    assert b.mover._gate.admits("data", a.keys.public)
    c = new_keys()
    b.mover.expect_probe(PeerAddress(worker="c", endpoint="tcp://x:1", public_key=c.public), MAX_BYTES, 0.0)
    b.mover.end_probes()
    assert not b.mover._gate.admits("data", c.public)


def test_who_has_no_time_to_find_out_does_not_say_that_a_peer_is_reached(ends: tuple[End, End]) -> None:
    a, b = ends
    assert probe_socket.why_out_of_reach(a.keys, b.address, lambda: True)
    found = measure_link(a.keys, b.address, MAX_BYTES, SECONDS, lambda: True)
    # Nor that it is not: no relay is to be looked for.
    assert (found.reached, found.there) == (True, None)


@pytest.mark.timeout(20)
def test_a_peer_that_is_gone_keeps_no_probe_waiting() -> None:
    """ZeroMQ lets go of a peer that has come back and refuses us: there is nothing to send to, and sending would block."""
    context: zmq.Context[zmq.Socket[bytes]] = zmq.Context()
    with context, context.socket(zmq.DEALER) as lonely:
        found = probe_socket._probe(lonely, "b", Course(MAX_BYTES, 0.3), lambda: False)
        assert "did not answer" in found.error
        looks = iter([False, False, True])
        probe_socket._probe(lonely, "b", Course(MAX_BYTES, 3600.0), lambda: next(looks))


# On the coordinator's order ---------------------------------------------------------------------------------------


async def test_a_worker_measures_the_link_it_is_asked_to() -> None:
    coordinator = FakeCoordinator()
    await coordinator.start()
    try:
        async with pool(coordinator, "a", "b"):
            a, b = addresses(coordinator, "a", "b")
            coordinator.send("b", ExpectProbe(peer=a, max_bytes=MAX_BYTES, seconds=SECONDS))
            coordinator.send("a", ProbeLink(peer=b, max_bytes=MAX_BYTES, seconds=SECONDS))
            found = await coordinator.message("a", LinkMeasured)
            assert (found.peer, found.error) == ("b", "")
            assert found.there is not None
    finally:
        await coordinator.stop()
