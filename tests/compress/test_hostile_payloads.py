"""Payloads that no encoder wrote: an error or a tensor of the asked shape, never a crash and never memory without bound."""

from __future__ import annotations

import struct
import tracemalloc

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import compress
from compress import indices
from compress.indices import IndexEncoding
from compress.settings import CODECS, self_contained
from fusion.errors import FrameError

NAMES = [*CODECS, "topk:ratio=2,value_bits=8", "topk-sampled:ratio=3,value_bits=32"]


@given(
    payload=st.binary(max_size=400),
    name=st.sampled_from(NAMES),
    shape=st.lists(st.integers(0, 9), max_size=3).map(tuple),
    dtype=st.sampled_from(["float32", "bfloat16", "float16", "int64", "bool"]),
)
@settings(deadline=None, max_examples=500)
def test_random_bytes(payload: bytes, name: str, shape: tuple[int, ...], dtype: str) -> None:
    try:
        out = compress.codec(name).decode(payload, shape, dtype)
    except FrameError:
        return
    assert tuple(out.shape) == shape


@given(data=st.data(), name=st.sampled_from(NAMES))
@settings(deadline=None, max_examples=500)
def test_valid_payloads_with_bytes_changed_cut_or_added(data: st.DataObject, name: str) -> None:
    values = torch.randn(40, 7, generator=torch.Generator().manual_seed(data.draw(st.integers(0, 99))))
    codec = compress.codec(name)
    payload = bytearray(compress.codec(self_contained(name)).encode(values))
    for _ in range(data.draw(st.integers(1, 4))):
        at = data.draw(st.integers(0, len(payload)))
        change = data.draw(st.sampled_from(["set", "cut", "add"]))
        if change == "set" and at < len(payload):
            payload[at] = data.draw(st.integers(0, 255))
        elif change == "cut":
            del payload[at:]
        else:
            payload[at:at] = data.draw(st.binary(max_size=9))
    try:
        out = codec.decode(payload, (40, 7), "float32")
    except FrameError:
        return
    assert out.shape == (40, 7)


@pytest.mark.parametrize("name", NAMES)
def test_a_huge_claimed_shape_takes_no_memory(name: str) -> None:
    tracemalloc.start()
    for payload in (b"", b"\x00" * 5, b"\x01\x00\x00\x00\x00\x07", bytes(64)):
        with pytest.raises(FrameError):
            compress.codec(name).decode(payload, (2**40, 2**10), "float32")
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert peak < 1 << 20


@pytest.mark.parametrize(
    ("prefix", "rest", "message"),
    [
        (b"", b"", "no room"),
        (struct.pack("<IB", 2**32 - 1, 0), b"", "at most"),
        (struct.pack("<IB", 50, 0), b"", "can't hold"),
        (struct.pack("<IB", 1, 9), bytes(4), "unknown index encoding"),
        (struct.pack("<IB", 1, IndexEncoding.VARINT), b"\xff\xff" + bytes(2), "varints"),
        (struct.pack("<IB", 1, IndexEncoding.VARINT), b"\x80" + bytes(2), "cut off"),
        (struct.pack("<IB", 2, IndexEncoding.VARINT), b"\x7f" * 2 + bytes(4), "outside"),
        (struct.pack("<IB", 1, IndexEncoding.BITMAP), bytes(13) + bytes(2), "0 positions where 1"),
        (struct.pack("<IB", 1, IndexEncoding.BITMAP), bytes(7) + bytes(2), "bitmap of 7 bytes"),
        (struct.pack("<IB", 1, IndexEncoding.BITMAP), bytes(12) + b"\x80" + bytes(2), "outside"),
    ],
)
def test_topk_says_what_is_wrong(prefix: bytes, rest: bytes, message: str) -> None:
    with pytest.raises(FrameError, match=message):
        compress.codec("topk", ratio=2).decode(prefix + rest, (100,), "float32")


def test_shape_and_dtype_that_never_travel() -> None:
    with pytest.raises(FrameError, match="complex64"):
        compress.codec("none").decode(b"", (0,), "complex64")


@given(
    elements=st.integers(1, 200_000),
    seed=st.integers(0, 2**32),
    density=st.sampled_from([0.0, 1e-5, 1e-3, 0.02, 0.2, 0.9, 1.0]),
)
@settings(deadline=None, max_examples=60)
def test_positions_come_back_whatever_the_encoding(elements: int, seed: int, density: float) -> None:
    mask = np.random.default_rng(seed).random(elements) < density
    positions = np.flatnonzero(mask)
    encoding, data = indices.encode(positions, elements)
    assert np.array_equal(indices.decode(encoding, data, len(positions), elements), positions)
    assert len(data) <= min(-(-elements // 8), 2 * len(positions) + 2 * -(-elements // 65536))


@pytest.mark.parametrize(
    ("positions", "elements", "encoding"),
    [
        (np.arange(0, 60_000, 3), 60_000, IndexEncoding.BITMAP),
        (np.arange(0, 60_000, 100), 60_000, IndexEncoding.VARINT),
        (np.arange(0, 30_000_000, 200), 30_000_000, IndexEncoding.VARINT),
        (np.array([5, 2**30]), 2**31 - 1, IndexEncoding.VARINT),
        (np.arange(0, 64_000 * 256, 16_500), 64_000 * 256, IndexEncoding.BLOCKED),
    ],
)
def test_the_smallest_encoding_is_chosen(positions: np.ndarray, elements: int, encoding: IndexEncoding) -> None:
    chosen, data = indices.encode(positions, elements)
    assert chosen == encoding
    assert np.array_equal(indices.decode(chosen, data, len(positions), elements), positions)


@pytest.mark.parametrize("within", [[5, 5], [9, 3]])
def test_blocked_positions_must_ascend(within: list[int]) -> None:
    data = np.concatenate([np.array([2], "<u2").view(np.uint8), np.array(within, "<u2").view(np.uint8)])
    with pytest.raises(FrameError, match="ascend"):
        indices.decode(IndexEncoding.BLOCKED, data, 2, 100)


def test_blocked_counts_must_add_up() -> None:
    data = np.concatenate([np.array([2**16 - 1], "<u2").view(np.uint8), np.array([1, 2], "<u2").view(np.uint8)])
    with pytest.raises(FrameError, match="add up"):
        indices.decode(IndexEncoding.BLOCKED, data, 2, 100)
