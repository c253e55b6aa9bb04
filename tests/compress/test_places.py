"""Gradients at the places that the activation kept: the same on both ends, exact in size, and nothing else is taken."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import compress
from compress.places import Places
from compress.settings import TopKReused, reuses, self_contained
from fusion.errors import FrameError, PlanError

DTYPES = ["float32", "bfloat16", "float16", "float64"]


def gaussian(shape: tuple[int, ...], seed: int, dtype: str = "float32") -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(getattr(torch, dtype))


def kept(name: str, activation: torch.Tensor, **options: float) -> Places:
    """As both ends find them: in the payload."""
    codec = compress.codec(name, **options)
    found = codec.places(codec.encode(activation), tuple(activation.shape), activation.dtype)
    assert found is not None
    return found


@given(
    shape=st.lists(st.integers(1, 12), min_size=1, max_size=3).map(tuple),
    seed=st.integers(0, 2**32),
    dtype=st.sampled_from(DTYPES),
    ratio=st.sampled_from([1.0, 3.0, 40.0]),
    value_bits=st.sampled_from([8, 16, 32]),
    forward=st.sampled_from(["topk", "topk-sampled", "topk:value_bits=8"]),
    zeros=st.sampled_from([0.0, 0.5, 1.0]),
)
@settings(deadline=None, max_examples=80)
def test_the_values_alone_give_the_same_bits_as_the_whole_payload(
    shape: tuple[int, ...], seed: int, dtype: str, ratio: float, value_bits: int, forward: str, zeros: float
) -> None:
    activation, gradient = gaussian(shape, seed, dtype), gaussian(shape, seed + 1, dtype)
    activation[torch.rand(shape, generator=torch.Generator().manual_seed(seed)) < zeros] = 0
    places = kept(forward, activation, ratio=ratio)
    codec = compress.codec("topk-reused", ratio=ratio, value_bits=value_bits)
    whole = codec.encode(gradient, seed, places)
    values = whole[len(places.head) :]

    assert isinstance(codec.settings, TopKReused)
    assert len(values) == codec.settings.value_bytes(places.count, gradient.dtype.itemsize)
    assert len(whole) <= codec.max_payload_bytes(shape, dtype)
    assert len(whole) == len(values) + len(places.head)
    out = codec.decode(bytes(values), shape, dtype, places)
    assert torch.equal(out, codec.decode(whole, shape, dtype))
    there = torch.zeros(out.numel(), dtype=torch.bool)
    there[torch.from_numpy(places.positions())] = True
    assert not out.flatten()[~there].any()
    if value_bits == 32 and dtype != "float64":
        assert torch.equal(out.flatten()[there], gradient.flatten()[there])


@pytest.mark.parametrize("ratio", [4.0, 100.0])
def test_a_gradient_takes_the_bytes_of_its_values(ratio: float) -> None:
    shape = (64, 300)
    own, reused = (compress.codec(name, ratio=ratio) for name in ("topk", "topk-reused"))
    places = kept("topk", gaussian(shape, 1), ratio=ratio)
    payload = reused.encode(gaussian(shape, 2), 0, places)[len(places.head) :]
    assert len(payload) == reused.expected_payload_bytes(shape, "float32") == 2 * -(-64 * 300 // int(ratio))
    assert reused.wire_ratio(shape, "float32") > 1.2 * own.wire_ratio(shape, "float32")


def test_error_feedback_keeps_what_stood_elsewhere() -> None:
    activation, gradient = gaussian((40, 7), 1), gaussian((40, 7), 2)
    codec = compress.codec("topk-reused:value_bits=32", ratio=5)
    places = kept("topk", activation, ratio=5)
    payload, residual = compress.ErrorFeedback(codec).encode(gradient, 0, None, places)
    assert torch.equal(codec.decode(payload, (40, 7), "float32") + residual, gradient)
    assert int((residual == 0).sum()) == places.count


def test_where_nothing_is_left_out_there_are_no_places() -> None:
    for name in ("none", "int8", "topk", "topk-reused"):
        codec = compress.codec(name)
        for tensor in (torch.arange(4), torch.empty(0, 3)):
            payload = codec.encode(tensor)
            assert codec.places(payload, tuple(tensor.shape), tensor.dtype) is None
            assert torch.equal(codec.decode(payload, tuple(tensor.shape), tensor.dtype), tensor)
    assert compress.codec("int8").places(bytes(66), (64,), "float32") is None


def test_what_does_not_fit_is_said() -> None:
    places, codec = kept("topk", gaussian((10, 10), 1), ratio=10), compress.codec("topk-reused", ratio=10)
    with pytest.raises(PlanError, match="needs the places"):
        codec.encode(gaussian((10, 10), 2))
    with pytest.raises(PlanError, match="places in a tensor of 100 elements for one of 110"):
        codec.encode(gaussian((10, 11), 2), 0, places)
    with pytest.raises(FrameError, match="22 bytes of values, 20 expected for 10 places"):
        codec.decode(bytes(22), (10, 10), "float32", places)
    with pytest.raises(FrameError, match="places in a tensor of 100 elements, not \\[10, 11\\]"):
        codec.decode(bytes(20), (10, 11), "float32", places)


@given(payload=st.binary(max_size=60), name=st.sampled_from(["topk", "topk-reused"]))
@settings(deadline=None)
def test_places_of_random_bytes(payload: bytes, name: str) -> None:
    codec = compress.codec(name, ratio=4)
    try:
        places = codec.places(payload, (9, 7), "float32")
        assert places is not None
        positions = places.positions()
    except FrameError:
        return
    assert len(positions) == places.count <= codec.max_payload_bytes((9, 7), "float32")


def test_names() -> None:
    assert [reuses(name) for name in ("topk", "topk-reused", "topk-reused:ratio=3", "none")] == [
        False,
        True,
        True,
        False,
    ]
    assert self_contained("topk-reused:ratio=3,value_bits=8") == "topk:ratio=3,value_bits=8"
    assert self_contained("topk-sampled:ratio=3") == "topk-sampled:ratio=3"
