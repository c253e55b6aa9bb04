"""The data plane over real sockets: what fits goes through, everything else is counted, warned of once and dropped."""

from __future__ import annotations

import logging
import queue
import threading
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from typing import Any

import pytest
import torch
import zmq
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from worker_cases import make_case, partition_of

from fusion.errors import PlanError, UnreachableError
from fusion.messages import PeerAddress
from fusion.plan import CodecChoice
from fusion.sockets import KeyPair, new_keys, secure_client
from fusion.wire import FrameKind, Header, encode_header
from worker.protocol.admission import Admission
from worker.transport import probe_marks
from worker.transport.mover import Mover
from worker.transport.parcel import Parcel
from worker.transport.route import Route
from worker.transport.slow_links import SlowLink

CASE = make_case()
MAX_FRAME = 10_000


@dataclass
class End:
    """One worker's data plane in this process."""

    name: str
    keys: KeyPair
    mover: Mover
    address: PeerAddress
    warnings: queue.SimpleQueue[str]
    arrived: queue.SimpleQueue[tuple[Header, Tensor | None]]
    lost: queue.SimpleQueue[str]

    def open(self, *peers: End, epoch: int = 0, codecs: dict[int, CodecChoice] | None = None, **options: Any) -> Route:
        prepare = CASE.prepare(("a", "b"), epoch=epoch, codecs=codecs)
        rules = Admission("job-1", prepare.plan, partition_of(prepare, CASE), self.name, micro_batches=3, last_step=4)
        return self.mover.open(
            rules,
            [peer.address for peer in peers],
            lambda header, _, value: self.arrived.put((header, value)),
            on_peer_lost=self.lost.put,
            **options,
        )

    def next(self) -> tuple[Header, Tensor | None]:
        return self.arrived.get(timeout=20)


def make_end(name: str, links: Mapping[str, SlowLink] | None = None) -> End:
    keys, warnings = new_keys(), queue.SimpleQueue[str]()
    mover = Mover(keys, warnings.put, max_frame_bytes=MAX_FRAME, links=links)
    port = mover.start("127.0.0.1", 0)
    address = PeerAddress(worker=name, endpoint=f"tcp://127.0.0.1:{port}", public_key=keys.public)
    return End(name, keys, mover, address, warnings, queue.SimpleQueue(), queue.SimpleQueue())


@pytest.fixture
def ends() -> Iterator[tuple[End, End]]:
    a, b = make_end("a"), make_end("b")
    yield a, b
    a.mover.close()
    b.mover.close()


def connect(a: End, b: End, **options: Any) -> tuple[Route, Route]:
    """As after Prepare: both admit, then both open."""
    a.mover.admit([b.address])
    b.mover.admit([a.address])
    return a.open(b, **options), b.open(a, **options)


def edge_between() -> int:
    partition = partition_of(CASE.prepare(("a", "b")), CASE)
    return int(next(e.index for e in partition.edges if e.kind == "activation"))


EDGE = edge_between()
ACTIVATION = Header("job-1", 0, FrameKind.ACTIVATION, EDGE, 1, 0, "none", "float32", (2, 6))


def test_values_and_null_gradients_arrive_as_they_were_sent(ends: tuple[End, End]) -> None:
    a, b = ends
    to_b, to_a = connect(a, b)
    value = torch.randn(6, 2).T
    to_b.send("b", ACTIVATION, Parcel(value))
    header, arrived = b.next()
    assert header == ACTIVATION
    assert arrived is not None
    assert torch.equal(arrived, value)
    assert arrived.data_ptr() % 64 == 0
    to_a.send("a", Header("job-1", 0, FrameKind.GRADIENT, EDGE, 1, 0), Parcel(None))
    header, nothing = a.next()
    assert (header.kind, nothing) == (FrameKind.GRADIENT, None)
    assert to_b.take_sent()["b"] > 48
    assert to_b.take_sent() == {}


def test_marked_messages_arrive_as_others_do(ends: tuple[End, End], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(probe_marks, "LARGE", 1)
    monkeypatch.setattr(probe_marks, "_ROW", 1)
    a, b = ends
    to_b, _ = connect(a, b)
    to_b.send("b", ACTIVATION, Parcel(torch.zeros(2, 6)))
    assert b.next()[0] == ACTIVATION
    plain = to_b.take_sent()["b"]
    # What comes after the second mark is delivered after it.
    second = replace(ACTIVATION, micro_batch=1)
    to_b.send("b", second, Parcel(torch.zeros(2, 6)))
    assert b.next()[0] == second
    assert set(b.mover.arrivals.take()) == {"a"}
    assert to_b.take_sent()["b"] == plain
    assert not b.mover.refused


@pytest.mark.parametrize(
    ("codec", "options"), [("bf16", {}), ("int8", {}), ("int8", {"block": 8.0}), ("topk", {"ratio": 2.0})]
)
def test_lossy_edges_give_the_same_values_over_the_wire_and_in_memory(
    ends: tuple[End, End], codec: str, options: dict[str, float]
) -> None:
    a, b = ends
    to_b, _ = connect(a, b, codecs={EDGE: CodecChoice(forward=codec, options=options)})
    header, value = replace(ACTIVATION, codec=codec), torch.randn(2, 6)
    parcel = Parcel(value, codec, options)
    to_b.send("b", header, parcel)
    _, arrived = b.next()
    kept = parcel.received()
    assert arrived is not None
    assert kept is not None
    assert torch.equal(arrived, kept)
    assert not torch.equal(arrived, value)


def test_the_word_that_a_message_is_under_way_comes_behind_it(ends: tuple[End, End]) -> None:
    a, b = ends
    to_b, _ = connect(a, b, codecs={EDGE: CodecChoice(forward="int8")})
    begin = threading.Event()
    to_b._encoder.submit(begin.wait)
    header = replace(ACTIVATION, codec="int8")
    to_b.send("b", header, Parcel(torch.randn(2, 6), "int8"))
    word = Header("job-1", 0, FrameKind.UNDER_WAY, EDGE, 1, 0, "ACTIVATION")
    to_b.send("b", word, None)
    begin.set()
    assert [b.next()[0], b.next()[0]] == [header, word]


class BrokenSocket:
    closed = False

    def send(self, *_: object, **__: object) -> None:
        raise zmq.ZMQError(zmq.ENOTSOCK)


def test_a_message_that_was_held_back_and_can_not_be_sent_is_reported(monkeypatch: pytest.MonkeyPatch) -> None:
    """Nobody would send it again: without a word the job would hang. What comes after it is sent all the same."""
    a, b = make_end("a", links={"b": SlowLink(1e6, 0.0)}), make_end("b")
    failed: queue.SimpleQueue[Exception] = queue.SimpleQueue()
    try:
        to_b, _ = connect(a, b, on_error=failed.put)
        with monkeypatch.context() as patch:
            patch.setattr(to_b.connections["b"], "socket", BrokenSocket())
            to_b.send("b", ACTIVATION, Parcel(torch.zeros(2, 6)))
            assert str(failed.get(timeout=20)).startswith("could not send to b: ")
        to_b.send("b", ACTIVATION, Parcel(torch.zeros(2, 6)))
        assert b.next()[0] == ACTIVATION
        assert failed.empty()
    finally:
        a.mover.close()
        b.mover.close()


def test_bad_messages_are_counted_warned_of_once_and_dropped(ends: tuple[End, End]) -> None:
    a, b = ends
    to_b, _ = connect(a, b, epoch=3)
    peer = to_b.connections["b"]
    good, payload = encode_header(replace(ACTIVATION, epoch=3)), memoryview(bytes(48))
    bad: list[tuple[str, list[bytes]]] = [
        ("unknown job", [encode_header(replace(ACTIVATION, epoch=3, job="job-9")), bytes(48)]),
        ("other epoch", [encode_header(replace(ACTIVATION, epoch=2)), bytes(48)]),
        ("size", [good, bytes(47)]),
        ("size", [good, bytes(4800)]),
        ("layout", [encode_header(replace(ACTIVATION, epoch=3, shape=(2, 7))), bytes(56)]),
        ("unknown key", [encode_header(replace(ACTIVATION, epoch=3, step=99)), bytes(48)]),
        ("malformed", [good[:-3], bytes(48)]),
        ("malformed", [b"", bytes(48)]),
        ("malformed", [good, bytes(24), bytes(24)]),
        ("version", [b"\x91\x63", bytes(48)]),
    ]
    for _ in range(2):
        for _, frames in bad:
            peer.socket.send_multipart(frames)
    peer.transmit(good, payload)
    header, value = b.next()
    assert header == replace(ACTIVATION, epoch=3)
    assert value is not None
    assert b.arrived.empty()
    counts: dict[str, int] = {}
    for category, _ in bad:
        counts[category] = counts.get(category, 0) + 2
    assert dict(b.mover.refused) == counts
    # Messages of another epoch are what a restart leaves behind: no reason to bother a person.
    warned = [b.warnings.get(timeout=10) for _ in range(len(counts) - 1)]
    assert b.warnings.empty()
    assert all("from a" in line for line in warned)


def test_an_oversized_frame_cuts_its_sender_off_and_the_rest_goes_on(ends: tuple[End, End]) -> None:
    a, b = ends
    to_b, _ = connect(a, b)
    to_b.connections["b"].socket.send_multipart([encode_header(ACTIVATION), bytes(MAX_FRAME * 2)])
    # The connection is made anew, and what is sent then arrives; the oversized frame never does.
    while True:
        to_b.send("b", ACTIVATION, Parcel(torch.zeros(2, 6)))
        try:
            header, _ = b.arrived.get(timeout=0.5)
        except queue.Empty:
            continue
        assert header == ACTIVATION
        break
    assert not b.mover.refused


def test_a_value_that_no_message_can_hold_is_refused_before_anybody_asks_for_it(ends: tuple[End, End]) -> None:
    """Its sender would be cut off each time."""
    a, _ = ends
    prepare = CASE.prepare(("a", "b"))
    rules = Admission("job-1", prepare.plan, partition_of(prepare, CASE), "b", micro_batches=3, last_step=4)
    a.mover.require_room(rules)
    with pytest.raises(
        PlanError, match=r"activation 0 takes up to 48 B and a message 47 B at most; .*micro_batch smaller"
    ):
        rules.require_room(47)


def test_an_unknown_key_gets_nothing_through(ends: tuple[End, End]) -> None:
    a, b = ends
    connect(a, b)
    context: zmq.Context[Any] = zmq.Context()
    stranger = context.socket(zmq.DEALER)
    secure_client(stranger, new_keys(), b.keys.public)
    monitor = stranger.get_monitor_socket(zmq.EVENT_HANDSHAKE_FAILED_AUTH | zmq.EVENT_DISCONNECTED)
    stranger.connect(b.address.endpoint)
    stranger.send_multipart([encode_header(ACTIVATION), bytes(48)])
    assert monitor.poll(20_000)
    assert b.arrived.empty()
    assert b.mover.refused["unknown key holder"] >= 1
    stranger.disable_monitor()
    context.destroy(0)


def test_a_peer_may_not_speak_for_another(ends: tuple[End, End]) -> None:
    """The right key, but not the worker that makes this value."""
    a, b = ends
    to_b, to_a = connect(a, b)
    to_a.send("a", ACTIVATION, Parcel(torch.zeros(2, 6)))
    to_a.send("a", Header("job-1", 0, FrameKind.GRADIENT, EDGE, 1, 0), Parcel(None))
    header, _ = a.next()
    assert header.kind is FrameKind.GRADIENT
    assert a.mover.refused["unknown key"] == 1
    assert tuple(to_b.connections) == ("b",)


def test_after_a_restart_messages_of_the_old_plan_are_dropped(ends: tuple[End, End]) -> None:
    a, b = ends
    old_a, old_b = connect(a, b)
    b.mover.close_route(old_b)
    b.mover.admit([a.address])
    new_b = b.open(a, epoch=1)
    old_a.send("b", ACTIVATION, Parcel(torch.zeros(2, 6)))
    a.mover.close_route(old_a)
    new_a = a.open(b, epoch=1)
    new_a.send("b", replace(ACTIVATION, epoch=1), Parcel(torch.ones(2, 6)))
    header, value = b.next()
    assert header.epoch == 1
    assert value is not None
    assert bool(value.eq(1).all())
    assert b.arrived.empty()
    assert new_b.admission.epoch == 1


def test_a_closed_connection_is_noticed_at_once(ends: tuple[End, End]) -> None:
    a, b = ends
    connect(a, b)
    b.mover.close()
    assert a.lost.get(timeout=5) == "b"


def test_a_peer_that_has_no_part_any_more_is_a_stranger(ends: tuple[End, End], monkeypatch: pytest.MonkeyPatch) -> None:
    """It may not have heard yet that it was declared lost: nobody is warned of that, it stands in the worker's own log."""
    a, b = ends
    logged: queue.SimpleQueue[str] = queue.SimpleQueue()
    monkeypatch.setattr(logging.getLogger("fusion.worker"), "warning", logged.put)
    to_b, _ = connect(a, b)
    b.mover.disconnect(b.mover._route, "a")  # type: ignore[arg-type]
    to_b.send("b", ACTIVATION, Parcel(torch.ones(2, 6)))
    assert "(sender)" in logged.get(timeout=10)
    assert b.warnings.empty()
    b.mover.admit([a.address])
    b.mover.connect(b.mover._route, [a.address])  # type: ignore[arg-type]
    to_b.send("b", replace(ACTIVATION, micro_batch=1), Parcel(torch.ones(2, 6)))
    header, _ = b.next()
    assert header.micro_batch == 1
    assert b.mover.refused["sender"] == 1


def test_a_peer_that_is_not_there_is_named(ends: tuple[End, End]) -> None:
    a, _ = ends
    nobody = PeerAddress(worker="b", endpoint="tcp://127.0.0.1:1", public_key=new_keys().public)
    prepare = CASE.prepare(("a", "b"))
    rules = Admission("job-1", prepare.plan, partition_of(prepare, CASE), "a", micro_batches=3, last_step=4)
    with pytest.raises(UnreachableError, match=r"can't reach b at tcp://127.0.0.1:1.*--advertise"):
        a.mover.open(rules, [nobody], lambda *_: None, patience=0.3)


def test_who_has_not_let_us_in_when_nobody_waits_any_more_is_connected_to_anew(ends: tuple[End, End]) -> None:
    """ZeroMQ never tries again after a refusal: a connection that was left like that would be none for good."""
    a, b = ends
    route = a.open()
    assert a.mover.connect(route, [b.address], cancelled=lambda: b.mover.refused.total() > 0) == ["b"]
    assert not route.connections
    b.open(a)
    assert a.mover.connect(route, [b.address]) == []
    route.send("b", ACTIVATION, Parcel(torch.ones(2, 6)))
    assert b.next()[0] == ACTIVATION


def test_one_that_can_t_be_reached_keeps_no_other_from_being_connected(ends: tuple[End, End]) -> None:
    a, b = ends
    nobody = PeerAddress(worker="c", endpoint="tcp://127.0.0.1:1", public_key=new_keys().public)
    route = a.open()
    a.mover.admit([b.address])
    b.open(a)
    with pytest.raises(UnreachableError, match="can't reach c at"):
        a.mover.connect(route, [nobody, b.address], patience=1.0)
    assert list(route.connections) == ["b"]
    route.send("b", ACTIVATION, Parcel(torch.ones(2, 6)))
    assert b.next()[0] == ACTIVATION


def test_peers_of_a_job_that_is_over_or_did_not_begin_are_let_in_no_more(ends: tuple[End, End]) -> None:
    a, b = ends
    nobody = PeerAddress(worker="c", endpoint="tcp://127.0.0.1:1", public_key=new_keys().public)
    _, to_a = connect(a, b)
    with pytest.raises(UnreachableError):
        b.mover.connect(to_a, [nobody], patience=0.3)
    assert b.mover._gate.admits("data", nobody.public_key)
    b.mover.close_route(to_a)
    for peer in (a.address, nobody):
        assert not b.mover._gate.admits("data", peer.public_key)
    with pytest.raises(UnreachableError):
        b.open(a, patience=0.0)
    b.mover.forget_peers()
    assert not b.mover._gate.admits("data", a.address.public_key)


class Fuzzed:
    """A mover whose receiver is driven by hand."""

    def __init__(self) -> None:
        self.mover = Mover(new_keys(), lambda _: None)
        prepare = CASE.prepare(("a", "b"))
        rules = Admission("job-1", prepare.plan, partition_of(prepare, CASE), "b", micro_batches=3, last_step=4)
        self.arrived: list[Header] = []
        self.mover._route = Route(rules, {}, lambda header, *_: self.arrived.append(header))


FUZZED = Fuzzed()


@given(st.lists(st.binary(max_size=80) | st.just(encode_header(ACTIVATION)), max_size=5))
@settings(max_examples=200, deadline=None)
def test_no_frames_whatsoever_upset_the_receiver(frames: list[bytes]) -> None:
    """Without an authenticated sender nothing is let in, and nothing but a count comes of it."""
    before = sum(FUZZED.mover.refused.values())
    FUZZED.mover.take_in([zmq.Frame(b"id"), *map(zmq.Frame, frames)])
    assert sum(FUZZED.mover.refused.values()) == before + 1
    assert FUZZED.arrived == []
