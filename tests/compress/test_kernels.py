"""The loops in C give the bits of the passes that stand in for them where no compiler was.

What encodes is compared with the passes, whichever of the two it is in this install; with a compiler it has to be the C.
"""

from __future__ import annotations

import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as npst

from compress import blocks, indices, topk
from compress.kernels import KERNELS, MOST_BLOCK, Kernels
from compress.settings import Blocks

FLOAT_BITS = npst.arrays(np.uint32, st.integers(1, 300), elements=st.integers(0, 2**32 - 1))
"""Every float there is: zeros, subnormal numbers, infinities, NaNs with any payload."""


def test_kernels_are_built_where_a_compiler_is() -> None:
    missing = KERNELS is None and shutil.which("cc") is not None
    assert not missing, "make clean, then make develop: compress/kernels.c was not built, pip -v says why"


@pytest.mark.parametrize("stochastic", [False, True])
@pytest.mark.parametrize("bits", [2, 3, 4, 8])
@given(data=FLOAT_BITS, block=st.sampled_from([8, 16, 64, 264, MOST_BLOCK]), seed=st.integers(0, 2**32))
def test_integers_of_any_floats_are_the_same(
    data: np.ndarray, block: int, seed: int, bits: int, stochastic: bool
) -> None:
    settings = Blocks(bits=bits, block=block, stochastic=stochastic)  # type: ignore[arg-type]
    values = torch.from_numpy(data.view(np.float32))
    assert bytes(blocks.encode(settings, values, seed)) == bytes(blocks.in_passes(settings, values, seed))


@pytest.mark.parametrize("bits", [2, 3, 4, 8])
@given(seed=st.integers(0, 2**32), scale=st.integers(-44, 38), elements=st.integers(1, 5000))
def test_integers_of_ordinary_values_are_the_same(seed: int, scale: int, elements: int, bits: int) -> None:
    values = torch.randn(elements, generator=torch.Generator().manual_seed(seed)) * 10.0**scale
    for stochastic in (False, True):
        settings = Blocks(bits=bits, stochastic=stochastic)  # type: ignore[arg-type]
        assert bytes(blocks.encode(settings, values, seed)) == bytes(blocks.in_passes(settings, values, seed))


@given(data=FLOAT_BITS, threshold=st.integers(1, 2**31 - 1), narrow=st.booleans())
def test_the_same_positions_are_at_least_the_threshold(data: np.ndarray, threshold: int, narrow: bool) -> None:
    bits = data.view(np.int16) if narrow else data.view(np.int32)
    threshold = max(threshold >> 16, 1) if narrow else threshold
    assert np.array_equal(topk.find_at_least(bits, threshold), topk.at_least(bits, threshold))


@given(positions=st.sets(st.integers(0, 2**34), min_size=1, max_size=200), most=st.integers(0, 600))
def test_the_same_varints_are_written(positions: set[int], most: int) -> None:
    ascending = np.array(sorted(positions), dtype=np.int64)
    passes, found = indices.write_varints(ascending, most), indices.varints(ascending, most)
    assert (passes is None) == (found is None)
    assert passes is None or np.array_equal(passes, found)


def test_all_and_none_may_be_at_least_the_threshold() -> None:
    for elements in (1, 15, 16, 17, 1000):
        bits = np.arange(1, elements + 1, dtype=np.int32)
        assert np.array_equal(topk.find_at_least(bits, 1), np.arange(elements))
        assert len(topk.find_at_least(bits, elements + 1)) == 0


def test_larger_blocks_are_left_to_the_passes() -> None:
    settings, values = Blocks(bits=8, block=2 * MOST_BLOCK), torch.randn(3 * MOST_BLOCK)
    payload = blocks.encode(settings, values, 0)
    assert torch.allclose(blocks.decode(settings, payload, tuple(values.shape), values.dtype), values, atol=0.05)


def test_encoding_works_without_kernels(monkeypatch: pytest.MonkeyPatch) -> None:
    values = torch.randn(100_000)
    settings = topk.TopK(ratio=100.0, sampled=True, value_bits=8)
    with_kernels = bytes(topk.encode(settings, values, 1))
    monkeypatch.setattr(blocks, "KERNELS", None)
    monkeypatch.setattr(topk, "KERNELS", None)
    monkeypatch.setattr(indices, "KERNELS", None)
    assert bytes(topk.encode(settings, values, 1)) == with_kernels


def test_a_file_that_is_no_library_is_not_loaded(tmp_path: Path) -> None:
    (tmp_path / "broken.so").write_bytes(b"not a library")
    with pytest.raises(OSError, match="broken"):
        Kernels(str(tmp_path / "broken.so"))
