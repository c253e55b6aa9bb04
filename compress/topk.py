"""Keeps the largest values and their positions.

Payload: number kept (uint32), index encoding (uint8), positions (`compress.indices`), values in order of position.
Magnitudes are compared as integers (a float's bits without its sign), which puts NaN above infinity above the rest:
values that are not finite are kept first, so that trouble stays visible.
"""

from __future__ import annotations

import math
from functools import lru_cache

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from compress import blocks, indices
from compress.buffers import Payload, borrow, bytes_of, flatten
from compress.kernels import KERNELS
from compress.places import Places
from compress.settings import MAX_TOPK_ELEMENTS, TOPK_PREFIX, TOPK_PREFIX_BYTES, Blocks, TopK, dtype_name
from fusion.errors import FrameError, PlanError

_SAMPLE = 1 << 14
_SMALL = 1 << 15
"""Tensors up to this size are sorted out exactly, without a sample."""
_PIECE = 1 << 16
_POSITIVE = 0x7FFFFFFF
"""Every bit of a float32 but its sign."""
_VALUES = Blocks(bits=8)


def encode(settings: TopK, tensor: Tensor, seed: int, places: Places | None = None) -> memoryview:
    """The payload of a floating tensor that is not empty; with `places`, the values there instead of the largest ones."""
    flat = flatten(tensor)
    elements = flat.numel()
    if elements > MAX_TOPK_ELEMENTS:
        raise PlanError(f"codec topk takes tensors of up to {MAX_TOPK_ELEMENTS} elements, not {elements}")
    if places is None:
        positions = select(settings, flat)
        encoding, index_bytes = indices.encode(positions.numpy(), elements)
        prefix = TOPK_PREFIX.pack(len(positions), encoding)
    elif places.elements != elements:
        raise PlanError(f"places in a tensor of {places.elements} elements for one of {elements}")
    else:
        positions = torch.from_numpy(places.positions())
        prefix, index_bytes = places.head, np.empty(0, np.uint8)
    values = _encode_values(settings, _taken(flat, positions), seed)
    out = np.empty(len(prefix) + len(index_bytes) + len(values), dtype=np.uint8)
    out[: len(prefix)] = np.frombuffer(prefix, dtype=np.uint8)
    out[len(prefix) : len(prefix) + len(index_bytes)] = index_bytes
    out[len(prefix) + len(index_bytes) :] = np.frombuffer(values, dtype=np.uint8)
    return out.data


def decode(settings: TopK, payload: Payload, shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
    """The tensor again, zeros where nothing was kept. Raises `FrameError`; allocates the tensor only after all checks."""
    places = places_of(settings, payload, shape, dtype)
    return _filled(settings, payload, len(places.head), places, shape, dtype)


def decode_values(
    settings: TopK, payload: Payload, places: Places, shape: tuple[int, ...], dtype: torch.dtype
) -> Tensor:
    """The tensor again from the values alone. Raises `FrameError` when they are not as many as the places."""
    if places.elements != math.prod(shape):
        raise FrameError(f"values for places in a tensor of {places.elements} elements, not {list(shape)}")
    expected = settings.value_bytes(places.count, dtype.itemsize)
    if len(payload) != expected:
        raise FrameError(f"{len(payload)} bytes of values, {expected} expected for {places.count} places")
    return _filled(settings, payload, 0, places, shape, dtype)


def places_of(settings: TopK, payload: Payload, shape: tuple[int, ...], dtype: torch.dtype) -> Places:
    """Which places a payload kept. Raises `FrameError` when its sizes can't be right."""
    elements = math.prod(shape)
    if len(payload) < TOPK_PREFIX_BYTES:
        raise FrameError(f"top-k payload of {len(payload)} bytes has no room for its prefix")
    if elements > MAX_TOPK_ELEMENTS:
        raise FrameError(f"top-k payload for a tensor of {elements} elements")
    count, _ = TOPK_PREFIX.unpack_from(payload)
    if count > settings.most_kept(elements):
        raise FrameError(
            f"top-k payload keeps {count} of {elements} values, at most {settings.most_kept(elements)} allowed"
        )
    value_bytes = settings.value_bytes(count, dtype.itemsize)
    values_at = len(payload) - value_bytes
    if values_at < TOPK_PREFIX_BYTES:
        raise FrameError(f"top-k payload of {len(payload)} bytes can't hold {count} values")
    return Places(bytes(memoryview(payload)[:values_at]), elements)


def _filled(
    settings: TopK, payload: Payload, offset: int, places: Places, shape: tuple[int, ...], dtype: torch.dtype
) -> Tensor:
    positions = torch.from_numpy(places.positions())
    values = _decode_values(settings, payload, offset, places.count, dtype)
    out = torch.zeros(shape, dtype=dtype)
    out.view(-1)[positions] = values
    return out


def select(settings: TopK, flat: Tensor) -> Tensor:
    """Positions (int64, ascending) of the values to keep."""
    if flat.dtype == torch.float64:
        flat = flat.to(torch.float32)
    elements = flat.numel()
    wanted = settings.keep(elements)
    if wanted == elements:
        return torch.arange(elements)
    if elements <= _SMALL:
        return _largest(_magnitudes(flat), wanted)
    sample = _magnitudes(_taken(flat, _sample_positions(elements))).numpy()
    share = wanted / elements * _SAMPLE
    # An exact selection looks for its values among candidates that surely hold them: six standard deviations more.
    rank = max(round(share) if settings.sampled else math.ceil(share + 6 * math.sqrt(share) + 6), 1)
    if rank >= _SAMPLE:
        return _largest(_magnitudes(flat), wanted)
    # Zeros are never worth sending; where the threshold would be zero, everything else is kept.
    threshold = max(int(np.partition(sample, _SAMPLE - rank)[_SAMPLE - rank]), 1)
    candidates = _at_least(flat, threshold)
    if settings.sampled:
        enough = wanted - wanted // 4 if threshold > 1 else 0
        if enough <= len(candidates) <= settings.most_kept(elements):
            return candidates
    if len(candidates) < wanted and threshold > 1:
        return _largest(_magnitudes(flat), wanted)
    if len(candidates) <= wanted:
        return candidates
    return candidates[_largest(_magnitudes(_taken(flat, candidates)), wanted)]


def _taken(flat: Tensor, positions: Tensor) -> Tensor:
    """The values there; numpy gathers several times faster than torch, but knows no bfloat16."""
    if flat.dtype == torch.bfloat16:
        return flat[positions]
    return torch.from_numpy(flat.numpy()[positions.numpy()])


def _magnitudes(flat: Tensor) -> Tensor:
    if flat.dtype == torch.float32:
        return flat.view(torch.int32) & _POSITIVE
    return flat.view(torch.int16) & (_POSITIVE >> 16)


def _largest(magnitudes: Tensor, wanted: int) -> Tensor:
    return magnitudes.topk(wanted, sorted=False).indices.sort().values


def _at_least(flat: Tensor, threshold: int) -> Tensor:
    """Positions of the magnitudes from `threshold` on."""
    bits = flat.view(torch.int32 if flat.dtype == torch.float32 else torch.int16).numpy()
    return torch.from_numpy(find_at_least(bits, threshold))


def find_at_least(bits: NDArray[np.int32] | NDArray[np.int16], threshold: int) -> NDArray[np.int64]:
    """Positions of the floats, given as their bits, whose bits without the sign are at least `threshold` (over 0)."""
    return at_least(bits, threshold) if KERNELS is None else KERNELS.at_least(bits, threshold)


def at_least(bits: NDArray[np.int32] | NDArray[np.int16], threshold: int) -> NDArray[np.int64]:
    """As `find_at_least` by numpy's operations, a piece at a time so that the passes stay in the cache."""
    positive = _POSITIVE if bits.itemsize == 4 else _POSITIVE >> 16
    size = min(_PIECE, len(bits))
    magnitudes, large = np.empty(size, dtype=bits.dtype), np.empty(size, dtype=np.bool_)
    found = []
    for start in range(0, len(bits), size):
        piece = bits[start : start + size]
        magnitude = np.bitwise_and(piece, positive, out=magnitudes[: len(piece)])
        positions = np.flatnonzero(np.greater_equal(magnitude, threshold, out=large[: len(piece)]))
        found.append(np.add(positions, start, out=positions))
    return np.concatenate(found)


@lru_cache(maxsize=16)
def _sample_positions(elements: int) -> Tensor:
    """One random position in each of `_SAMPLE` equal stretches: a fixed stride would follow the tensor's columns."""
    offsets = np.random.Generator(np.random.SFC64(0)).random(_SAMPLE)
    positions = ((np.arange(_SAMPLE) + offsets) * (elements / _SAMPLE)).astype(np.int64)
    return torch.from_numpy(positions.clip(0, elements - 1))


def _encode_values(settings: TopK, values: Tensor, seed: int) -> memoryview:
    if settings.value_bits == 8:
        return blocks.encode(_VALUES, values, seed) if len(values) else memoryview(b"")
    if settings.value_bits == 16 and values.dtype.itemsize > 2:
        values = values.to(torch.bfloat16)
    elif values.dtype.itemsize > 4:
        values = values.to(torch.float32)
    return bytes_of(values)


def _decode_values(settings: TopK, payload: Payload, offset: int, count: int, dtype: torch.dtype) -> Tensor:
    if settings.value_bits == 8:
        return (
            blocks.decode(_VALUES, memoryview(payload)[offset:], (count,), dtype)
            if count
            else torch.empty(0, dtype=dtype)
        )
    if settings.value_bits == 16 and dtype.itemsize > 2:
        stored = "bfloat16"
    elif dtype.itemsize > 4:
        stored = "float32"
    else:
        stored = dtype_name(dtype)
    return borrow(payload, stored, count, offset).to(dtype)
