"""Error feedback across the values of an edge: the chain of parcels, and its state in a snapshot."""

from __future__ import annotations

import pytest
import torch

from compress import ErrorFeedback, codec
from dag.graph import TensorMeta
from fusion.errors import BlobError
from worker.jobs.feedback import Feedback
from worker.transport.ways import Way

SHAPE = (4, 48)
WAY = Way(TensorMeta(SHAPE, "float32"), torch.float32, "int4", {}, feedback=True, reuses=False)
SENDS = {(False, 3): WAY}


def values(count: int) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(5)
    return [torch.randn(SHAPE, generator=generator) for _ in range(count)]


def expected(given: list[torch.Tensor]) -> tuple[list[bytes], torch.Tensor | None]:
    residual, payloads = None, []
    for seed, value in enumerate(given):
        payload, residual = ErrorFeedback(codec("int4")).encode(value, seed, residual)
        payloads.append(bytes(payload))
    return payloads, residual


def test_each_value_takes_along_what_the_one_before_left_over():
    given = values(5)
    feedback = Feedback("plan", SENDS)
    parcels = [feedback.parcel(False, 3, value, seed, None) for seed, value in enumerate(given)]
    found = [bytes(parcel.payload()) for parcel in parcels]
    wanted, residual = expected(given)
    assert found == wanted
    assert found != [bytes(codec("int4").encode(value, seed)) for seed, value in enumerate(given)]
    (state,) = feedback.state().values()
    assert torch.equal(state, residual)


def test_asking_for_the_last_one_first_changes_nothing():
    """A long chain of values that nobody has asked for, as in a replay, is encoded in its order all the same."""
    given = values(3) * 700
    feedback = Feedback("plan", SENDS)
    parcels = [feedback.parcel(False, 3, value, seed, None) for seed, value in enumerate(given)]
    wanted, _ = expected(given)
    assert bytes(parcels[-1].payload()) == wanted[-1]
    assert [bytes(parcel.payload()) for parcel in parcels] == wanted


def test_from_its_state_on_the_same_bits_are_sent_again():
    given = values(6)
    first = Feedback("plan", SENDS)
    for seed, value in enumerate(given[:3]):
        first.parcel(False, 3, value, seed, None)
    state = first.state()
    assert list(state) == list(first.keys) == ["feedback/plan/3/forward"]
    after = [bytes(first.parcel(False, 3, value, seed, None).payload()) for seed, value in enumerate(given[3:])]
    again = Feedback("plan", SENDS)
    again.load(state | {"parameter/weight": torch.zeros(2)})
    assert [bytes(again.parcel(False, 3, value, seed, None).payload()) for seed, value in enumerate(given[3:])] == after
    cold = Feedback("plan", SENDS)
    assert bytes(cold.parcel(False, 3, given[3], 0, None).payload()) != after[0]


def test_the_state_of_another_plan_is_passed_over():
    feedback = Feedback("plan", SENDS)
    feedback.load({"feedback/other/3/forward": torch.ones(7)})
    assert feedback.state() == {}


def test_a_residual_of_another_shape_is_refused():
    with pytest.raises(BlobError, match=r"feedback/plan/3/forward of the snapshot is of shape \[7\]"):
        Feedback("plan", SENDS).load({"feedback/plan/3/forward": torch.ones(7)})
