"""Every codec: round trips, bounds on the error, exact sizes, and what it does with values that are not ordinary."""

from __future__ import annotations

import math
import subprocess
import sys
from collections.abc import Iterator

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

import compress
from compress.settings import CODECS, Blocks, TopK
from fusion.errors import PlanError

FLOATS = [torch.float32, torch.bfloat16, torch.float16, torch.float64]
EXACT_BYTES = ["none", "bf16", "int8", "int4", "int3", "int2"]
VARIANTS = [
    *(name for name in CODECS if name != "topk-reused"),
    "int8:block=256,stochastic=1",
    "int4:stochastic=1",
    "int3:stochastic=1",
    "topk:ratio=1",
    "topk:ratio=10,value_bits=32",
    "topk-sampled:ratio=10,value_bits=8",
]


@pytest.fixture(autouse=True)
def _one_thread() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def shapes() -> st.SearchStrategy[tuple[int, ...]]:
    return st.lists(st.integers(0, 15), max_size=4).map(tuple)


@st.composite
def tensors(draw: st.DrawFn, dtypes: list[torch.dtype] = FLOATS) -> Tensor:
    """Random values over many magnitudes, of random strides, with zeros among them."""
    shape = draw(shapes())
    generator = torch.Generator().manual_seed(draw(st.integers(0, 2**32)))
    values = torch.randn(shape, generator=generator) * 10 ** torch.empty(shape).uniform_(-3, 3, generator=generator)
    values[torch.rand(shape, generator=generator) < draw(st.sampled_from([0.0, 0.5, 1.0]))] = 0
    tensor = values.to(draw(st.sampled_from(dtypes)))
    if tensor.dim() > 1 and draw(st.booleans()):
        tensor = tensor.transpose(0, -1)
    if tensor.dim() and draw(st.booleans()):
        tensor = tensor[::2]
    return tensor


@given(tensor=tensors(), name=st.sampled_from(VARIANTS), seed=st.integers(0, 2**63))
@settings(deadline=None, max_examples=200)
def test_payload_has_the_stated_size_and_decodes_to_the_shape(tensor: Tensor, name: str, seed: int) -> None:
    codec = compress.codec(name)
    shape = tuple(tensor.shape)
    payload = codec.encode(tensor, seed)
    assert payload.nbytes == len(payload)
    assert len(payload) <= codec.max_payload_bytes(shape, tensor.dtype)
    if (exact := codec.payload_bytes(shape, tensor.dtype)) is not None:
        assert len(payload) == exact
    out = codec.decode(bytes(payload), shape, tensor.dtype)
    assert out.shape == tensor.shape
    assert out.dtype == tensor.dtype
    assert out.is_contiguous()
    assert bytes(codec.encode(tensor, seed)) == bytes(payload)
    assert torch.equal(codec.round_trip(tensor, seed), out)


@given(tensor=tensors())
@settings(deadline=None)
def test_none_keeps_every_bit(tensor: Tensor) -> None:
    assert torch.equal(compress.codec("none").round_trip(tensor), tensor)


@given(tensor=tensors())
@settings(deadline=None)
def test_bf16_is_torchs_cast(tensor: Tensor) -> None:
    expected = tensor if tensor.dtype.itemsize == 2 else tensor.to(torch.bfloat16).to(tensor.dtype)
    assert torch.equal(compress.codec("bf16").round_trip(tensor), expected)


@given(
    tensor=tensors(),
    bits=st.sampled_from([2, 3, 4, 8]),
    block=st.sampled_from([8, 64, 256]),
    stochastic=st.booleans(),
    seed=st.integers(0, 2**63),
)
@settings(deadline=None, max_examples=200)
def test_block_integers_are_within_a_step(tensor: Tensor, bits: int, block: int, stochastic: bool, seed: int) -> None:
    codec = compress.codec(f"int{bits}", block=block, stochastic=stochastic)
    out = codec.round_trip(tensor, seed).to(torch.float64).flatten()
    values = tensor.to(torch.float64).flatten()
    for start in range(0, len(values), block):
        part = values[start : start + block]
        # Rounding the scale up to bfloat16 widens a step by at most 2**-7.
        step = max(part.abs().max().item() / (2 ** (bits - 1) - 1) * (1 + 2**-7), 1.2e-38)
        allowed = step * (1 if stochastic else 0.5) * (1 + 1e-5)
        cast = part.abs() * torch.finfo(tensor.dtype).eps + torch.finfo(tensor.dtype).smallest_normal + step * 1e-6
        assert bool(((out[start : start + block] - part).abs() <= allowed + 2 * cast + step * 2**-7).all())


@given(tensor=tensors([torch.float32]), ratio=st.sampled_from([1, 2, 7.5, 100]), sampled=st.booleans())
@settings(deadline=None)
def test_topk_keeps_the_largest(tensor: Tensor, ratio: float, sampled: bool) -> None:
    codec = compress.codec("topk-sampled" if sampled else "topk", ratio=ratio, value_bits=32)
    values, out = tensor.flatten(), codec.round_trip(tensor).flatten()
    kept = out != 0
    assert torch.equal(out[kept], values[kept])
    wanted = math.ceil(len(values) / ratio)
    assert int(kept.sum()) <= (wanted + max(16, wanted // 4) if sampled else wanted)
    if len(values) and int(kept.sum()) < int((values != 0).sum()):
        assert values[kept].abs().min() >= values[~kept].abs().max()


@pytest.mark.parametrize("distribution", ["normal", "columns", "sparse", "constant", "heavy"])
@pytest.mark.parametrize("ratio", [2, 10, 100, 5000])
def test_topk_of_large_tensors(distribution: str, ratio: float) -> None:
    generator = torch.Generator().manual_seed(3)
    values = torch.randn(512, 512, generator=generator)
    if distribution == "columns":
        values *= torch.randn(512, generator=generator).exp() ** 2
    elif distribution == "sparse":
        values[torch.rand(512, 512, generator=generator) < 0.999] = 0
    elif distribution == "constant":
        values = torch.ones(512, 512)
    elif distribution == "heavy":
        values = values**15
    wanted = math.ceil(values.numel() / ratio)
    exact = compress.codec("topk", ratio=ratio, value_bits=32).round_trip(values).flatten()
    order = values.abs().flatten().sort(descending=True).values
    kept = exact[exact != 0].abs().sort(descending=True).values
    assert torch.equal(kept, order[:wanted][order[:wanted] != 0])
    sampled = compress.codec("topk-sampled", ratio=ratio, value_bits=32).round_trip(values)
    count, possible = int((sampled != 0).sum()), int((values != 0).sum())
    assert min(0.75 * wanted - 16, possible) <= count <= min(1.25 * wanted + 16, possible)


def test_stochastic_rounding_keeps_the_mean_and_depends_on_the_seed_only() -> None:
    values = torch.linspace(-1, 1, 4096)
    codec = compress.codec("int2", stochastic=1)
    mean = torch.stack([codec.round_trip(values, seed) for seed in range(400)]).mean(0)
    assert (mean - values).abs().max() < 0.15
    assert (mean - values).mean().abs() < 2e-3
    assert bytes(codec.encode(values, 1)) == bytes(codec.encode(values, 1))
    assert bytes(codec.encode(values, 1)) != bytes(codec.encode(values, 2))


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize("name", VARIANTS)
def test_values_that_are_not_finite_stay_visible(bad: float, dtype: torch.dtype, name: str) -> None:
    values = torch.linspace(-2, 2, 1000).to(dtype)
    values[517] = bad
    out = compress.codec(name).round_trip(values, 7)
    assert not out[517].isfinite()
    if name in ("none", "bf16") or (name.startswith("topk") and "value_bits=8" not in name):
        assert torch.equal(out[517:518].nan_to_num(1.0, 2.0, 3.0), values[517:518].nan_to_num(1.0, 2.0, 3.0))
        assert int(out.isfinite().sum()) == 999
    elif name.startswith("int"):
        block = compress.parse(name).block  # type: ignore[attr-defined]
        first = 517 // block * block
        assert bool(out[first : first + block].isnan().all())
        assert int(out.isfinite().sum()) == 1000 - block


@pytest.mark.parametrize("name", VARIANTS)
def test_everything_nan(name: str) -> None:
    values = torch.full((300, 200), math.nan)
    out = compress.codec(name).round_trip(values)
    assert bool(out[out != 0].isnan().all())
    assert bool(out.isnan().any())


@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize("name", EXACT_BYTES)
def test_the_largest_values_stay_finite(dtype: torch.dtype, name: str) -> None:
    largest = min(torch.finfo(dtype).max, torch.finfo(torch.float32).max * (1 - 2**-8))
    values = torch.tensor([largest, -largest, 0.0, 1.0], dtype=dtype)
    out = compress.codec(name).round_trip(values)
    assert bool(out.isfinite().all())
    assert out[0] > 0.9 * values[0]


@pytest.mark.parametrize("tiny", [1e-37, 1e-40, 1e-45])
def test_tiny_values_do_not_become_nan(tiny: float) -> None:
    values = torch.full((128,), tiny)
    out = compress.codec("int8").round_trip(values)
    assert bool(((out - values).abs() <= 1.2e-38 + tiny * 2**-7).all())


@pytest.mark.parametrize("dtype", [torch.int64, torch.int32, torch.bool, torch.uint8])
@pytest.mark.parametrize("name", VARIANTS)
def test_integers_travel_as_they_are(dtype: torch.dtype, name: str) -> None:
    values = torch.arange(-50, 50).to(dtype).view(10, 10).t()
    assert torch.equal(compress.codec(name).round_trip(values), values)


@pytest.mark.parametrize("name", VARIANTS)
@pytest.mark.parametrize("shape", [(), (0,), (3, 0, 2), (1,)])
def test_scalars_and_empty_tensors(name: str, shape: tuple[int, ...]) -> None:
    values = torch.ones(shape)
    out = compress.codec(name).round_trip(values)
    assert out.shape == shape
    torch.testing.assert_close(out, values, rtol=0.4 if "stochastic" in name else 2**-7, atol=0)


def test_gradients_and_views_need_no_care_by_the_caller() -> None:
    values = torch.randn(64, 64, requires_grad=True)
    for name in VARIANTS:
        assert not compress.codec(name).round_trip(values.t().expand(2, 64, 64)).requires_grad


def test_wire_sizes_by_hand() -> None:
    assert compress.parse("int8").payload_bytes((1000,), "float32") == 1000 + 2 * 16
    assert compress.parse("int4").payload_bytes((1001,), "bfloat16") == 501 + 2 * 16
    assert compress.parse("int3:block=256").payload_bytes((1024,), "float32") == 384 + 2 * 4
    assert compress.parse("bf16").payload_bytes((10, 10), "float32") == 200
    assert compress.parse("int4").payload_bytes((10,), "int64") == 80
    assert compress.parse("topk").payload_bytes((1000,), "float32") is None
    for name in EXACT_BYTES:
        settings_ = compress.parse(name)
        exact = settings_.payload_bytes((77, 5), "float16")
        assert exact == settings_.max_payload_bytes((77, 5), "float16")
        assert exact == settings_.expected_payload_bytes((77, 5), "float16")


@pytest.mark.parametrize("ratio", [3, 10, 100, 1000, 20000])
@pytest.mark.parametrize("value_bits", [8, 16, 32])
def test_expected_size_is_close_for_spread_values(ratio: float, value_bits: int) -> None:
    values = torch.randn(1 << 20, generator=torch.Generator().manual_seed(0))
    codec = compress.codec("topk", ratio=ratio, value_bits=value_bits)
    expected = codec.expected_payload_bytes((1 << 20,), "float32")
    assert len(codec.encode(values)) == pytest.approx(expected, rel=0.06)
    assert codec.wire_ratio((1 << 20,), "float32") == pytest.approx(4 * 2**20 / expected)


def test_names_and_options() -> None:
    assert compress.parse("int8", {"block": 256, "ratio": 10}) == Blocks(bits=8, block=256)
    assert compress.parse("topk:ratio=7,value_bits=8") == TopK(ratio=7.0, value_bits=8)
    assert compress.codec("int4") is compress.codec("int4")
    assert not compress.codec("none").lossy


@pytest.mark.parametrize(
    ("name", "options", "message"),
    [
        ("zip", {}, "unknown codec 'zip'; known: none"),
        ("int8:ratio=3", {}, "codec int8 has no option 'ratio'; it has: block, stochastic"),
        ("bf16:x=3", {}, "codec bf16 has no option 'x'; it has: none"),
        ("int8", {"colour": 1}, "no codec has an option 'colour'"),
        ("int8:block=12", {}, "multiple of 8"),
        ("int8:block=nan", {}, "whole number"),
        ("int8:block=a", {}, "must be a number"),
        ("int8:stochastic=2", {}, "0 or 1"),
        ("topk:ratio=0.5", {}, "1 or more"),
        ("topk:ratio=inf", {}, "1 or more"),
        ("topk:value_bits=4", {}, "8, 16 or 32"),
    ],
)
def test_bad_names_and_options_are_refused(name: str, options: dict[str, float], message: str) -> None:
    with pytest.raises(PlanError, match=message):
        compress.parse(name, options)


def test_dtypes_that_never_travel_are_refused() -> None:
    with pytest.raises(PlanError, match="complex64"):
        compress.codec("none").encode(torch.zeros(3, dtype=torch.complex64))


def test_seeds_differ_by_every_part() -> None:
    parts = [(0, 1, 0, 0, False), (1, 1, 0, 0, False), (0, 2, 0, 0, False), (0, 1, 1, 0, False), (0, 1, 0, 1, False)]
    seeds = {compress.edge_seed(s, t, m, e, gradient=g) for s, t, m, e, g in [*parts, (0, 1, 0, 0, True)]}
    assert len(seeds) == 6
    assert all(0 <= seed < 2**64 for seed in seeds)


def test_sizes_need_no_torch() -> None:
    program = (
        "import sys, compress; compress.parse('int4').payload_bytes((3,), 'float32'); sys.exit('torch' in sys.modules)"
    )
    assert subprocess.run([sys.executable, "-c", program], check=False).returncode == 0
