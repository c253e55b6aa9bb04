"""Gradients that leave out the places of their activations: the same bits wherever they go, and nothing is kept for good."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from test_host import Crew, crew, partition_in_two, train
from worker_cases import make_case

from compress import Places, codec
from fusion.errors import PlanError
from fusion.messages import Warned
from fusion.plan import CodecChoice
from fusion.wire import FrameKind, Header
from worker.protocol.admission import Layout, Refused
from worker.transport.arrival import Thinned, kept, received, tensor_of
from worker.transport.parcel import Parcel
from worker.transport.sent_places import SentPlaces
from worker.transport.ways import ways

CASE = make_case(steps=3)
EDGE = next(edge.index for edge in partition_in_two(CASE).edges)
CODECS = {EDGE: CodecChoice(forward="topk", backward="topk-reused:value_bits=32", options={"ratio": 3.0})}
GRADIENT = Header("job-1", 0, FrameKind.GRADIENT, EDGE, 1, 0, "topk-reused", "float32", (2, 6))


def losses(made: Crew) -> list[float | None]:
    return [report.loss for report in made.steps()]


def assert_nothing_kept(made: Crew) -> None:
    for host in made.hosts.values():
        assert len(host._runner.sent) == 0
        assert not any(piece.places for piece in host._pieces.values())


def test_the_same_bits_on_one_worker_and_on_two(monkeypatch: pytest.MonkeyPatch) -> None:
    find, found = SentPlaces.find, list[Places | None]()

    def watched(self: SentPlaces, gradient: Header) -> Places | None:
        found.append(find(self, gradient))
        return found[-1]

    monkeypatch.setattr(SentPlaces, "find", watched)
    together = train(CASE, ("a", "a"), codecs=CODECS)
    assert not found
    apart = train(CASE, ("a", "b"), codecs=CODECS)
    assert len(found) == CASE.train.steps * CASE.train.micro_batches, "every gradient came without its places"
    assert None not in found
    own = train(CASE, ("a", "b"), codecs={EDGE: CODECS[EDGE].model_copy(update={"backward": "topk:value_bits=32"})})
    assert losses(apart) == losses(together) != losses(own)
    for made in (apart, together):
        assert_nothing_kept(made)


def test_a_gradient_whose_places_are_not_known_is_asked_for_and_comes_whole(monkeypatch: pytest.MonkeyPatch) -> None:
    find, missed = SentPlaces.find, list[Header]()

    def forgetful(self: SentPlaces, gradient: Header) -> Places | None:
        if not missed:
            missed.append(gradient)
            return None
        return find(self, gradient)

    expected = losses(train(CASE, ("a", "b"), codecs=CODECS))
    monkeypatch.setattr(SentPlaces, "find", forgetful)
    with crew(CASE, ("a", "b"), codecs=CODECS, failure_timeout=0.2) as made:
        made.start()
        made.finish()
    assert losses(made) == expected
    assert made.movers["a"].refused == {"places": 1}
    assert not any("places" in warned.message for warned in made.reports["a"].of(Warned))
    assert_nothing_kept(made)


def layout(name: str, *, answered: bool = False) -> Layout:
    return Layout("b", (2, 6), "float32", name, codec(name, ratio=3.0).settings, False, None, answered)


def test_what_is_sent_depends_on_what_the_header_says() -> None:
    activation = Parcel(torch.arange(12.0).view(2, 6), "topk", {"ratio": 3.0})
    places = activation.places()
    assert places is not None
    gradient = Parcel(torch.ones(2, 6), "topk-reused", {"ratio": 3.0}, places=places)
    whole, alone = gradient.payload_for("topk"), gradient.payload_for("topk-reused")
    assert whole is not None
    assert alone is not None
    assert (len(whole), len(alone)) == (5 + 2 + 2 * 4, 2 * 4)

    sent = SentPlaces()
    sent.put(replace(GRADIENT, kind=FrameKind.ACTIVATION), activation)
    back = layout("topk-reused")
    assert torch.equal(tensor_of(received(alone, GRADIENT, back, sent.find)), gradient.received())
    itself = replace(GRADIENT, codec="topk")
    assert torch.equal(tensor_of(received(whole, itself, back, lambda _: None)), gradient.received())
    sent.drop(EDGE, 1, 0)
    for header in (GRADIENT, replace(GRADIENT, kind=FrameKind.SHOWN_GRADIENT)):
        with pytest.raises(Refused, match=f"{header.kind.name} {EDGE} came without places"):
            received(alone, header, back, sent.find)


def test_an_activation_brings_its_places_where_they_are_needed() -> None:
    parcel = Parcel(torch.arange(12.0).view(2, 6), "topk", {"ratio": 3.0})
    header, payload = replace(GRADIENT, kind=FrameKind.ACTIVATION), parcel.payload()
    assert payload is not None
    thinned = received(payload, header, layout("topk", answered=True), lambda _: None)
    assert isinstance(thinned, Thinned)
    assert thinned.places == parcel.places()
    assert list(thinned.places.positions()) == [8, 9, 10, 11]
    assert isinstance(received(payload, header, layout("topk"), lambda _: None), torch.Tensor)
    assert isinstance(kept(parcel), Thinned)
    assert isinstance(kept(Parcel(torch.ones(3))), torch.Tensor)


def test_the_places_of_fragments_that_have_left_are_forgotten() -> None:
    sent = SentPlaces()
    for edge in (1, 2):
        sent.put(replace(GRADIENT, edge=edge), Parcel(None))
    sent.retain({2})
    assert len(sent) == 1


def test_a_plan_whose_activations_keep_everything_is_refused() -> None:
    plan = CASE.prepare(("a", "b"), codecs={EDGE: CodecChoice(forward="int8", backward="topk-reused")}).plan
    with pytest.raises(PlanError, match="topk-reused back needs top-k forward, not int8"):
        ways(plan, partition_in_two(CASE))
