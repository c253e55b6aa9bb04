"""Positions of the kept values as bytes: a bitmap, 16 bits within blocks, or delta varints, whichever is smallest.

All functions take and give ascending positions without repeats. Decoding checks everything: `FrameError` says what is wrong.
"""

from __future__ import annotations

from enum import IntEnum

import numpy as np
from numpy.typing import NDArray

from compress.kernels import KERNELS
from compress.settings import BITMAP_BLOCK
from fusion.errors import FrameError

Positions = NDArray[np.int64]
Bytes = NDArray[np.uint8]

_VARINT_BYTES = 5
"""Enough for gaps below 2**35."""


class IndexEncoding(IntEnum):
    """How positions are written; the number is on the wire."""

    BITMAP = 0
    """One bit for each element, lowest bit first."""
    BLOCKED = 1
    """For each block of 65,536 elements the number kept (uint16), then each position within its block (uint16)."""
    VARINT = 2
    """The gap to the position before (the first: to -1), less one, as LEB128."""


def encode(positions: Positions, elements: int) -> tuple[IndexEncoding, Bytes]:
    """The smallest encoding of `positions`, all below `elements`."""
    bitmap_bytes = -(-elements // 8)
    blocks = -(-elements // BITMAP_BLOCK)
    blocked_bytes = 2 * blocks + 2 * len(positions)
    best = min(bitmap_bytes, blocked_bytes)
    if len(positions) < best:  # a varint takes at least one byte
        written = varints(positions, best - 1)
        if written is not None:
            return IndexEncoding.VARINT, written
    if blocked_bytes < bitmap_bytes:
        counts = np.bincount(positions >> 16, minlength=blocks)
        if counts.max(initial=0) < BITMAP_BLOCK:  # else its count does not fit
            words = np.concatenate([counts.astype("<u2"), positions.astype("<u2")])
            return IndexEncoding.BLOCKED, words.view(np.uint8)
    mask = np.zeros(elements, dtype=np.bool_)
    mask[positions] = True
    return IndexEncoding.BITMAP, np.packbits(mask, bitorder="little")


def decode(encoding: int, data: Bytes, count: int, elements: int) -> Positions:
    """The `count` positions again. Raises `FrameError` unless they ascend within 0..elements-1."""
    if encoding == IndexEncoding.BITMAP:
        positions = _read_bitmap(data, elements)
    elif encoding == IndexEncoding.BLOCKED:
        positions = _read_blocked(data, count, elements)
    elif encoding == IndexEncoding.VARINT:
        positions = _read_varints(data, count, elements)
    else:
        raise FrameError(f"unknown index encoding {encoding}")
    if len(positions) != count:
        raise FrameError(f"{len(positions)} positions where {count} were announced")
    if count and positions[-1] >= elements:
        raise FrameError(f"position {positions[-1]} is outside a tensor of {elements} elements")
    return positions


def _read_bitmap(data: Bytes, elements: int) -> Positions:
    if len(data) != -(-elements // 8):
        raise FrameError(f"bitmap of {len(data)} bytes for {elements} elements")
    bits = np.unpackbits(data, bitorder="little").view(np.bool_)
    return np.flatnonzero(bits)


def _read_blocked(data: Bytes, count: int, elements: int) -> Positions:
    blocks = -(-elements // BITMAP_BLOCK)
    if len(data) != 2 * blocks + 2 * count:
        raise FrameError(f"{len(data)} bytes of blocked positions, {2 * blocks + 2 * count} expected")
    words = data.copy().view("<u2").astype(np.int64)
    counts, within = words[:blocks], words[blocks:]
    if int(counts.sum()) != count:
        raise FrameError("block counts do not add up to the number of positions")
    positions = within + np.repeat(np.arange(blocks, dtype=np.int64) << 16, counts)
    if np.any(np.diff(positions) <= 0):
        raise FrameError("positions do not ascend")
    return positions


def varints(positions: Positions, most: int) -> Bytes | None:
    """The gaps between the positions; None when they take more than `most` bytes."""
    return write_varints(positions, most) if KERNELS is None else KERNELS.write_varints(positions, most)


def write_varints(positions: Positions, most: int) -> Bytes | None:
    """As `Kernels.write_varints` by numpy's operations."""
    gaps = np.diff(positions, prepend=-1)
    gaps -= 1
    sizes = _varint_sizes(gaps)
    return _write_varints(gaps, sizes) if (len(gaps) if sizes is None else int(sizes.sum())) <= most else None


def _varint_sizes(gaps: Positions) -> NDArray[np.int64] | None:
    """Bytes that each gap takes; None when every gap fits into one."""
    if len(gaps) == 0 or int(gaps.max()) < 1 << 7:
        return None
    sizes = np.ones(len(gaps), dtype=np.int64)
    for size in range(1, _VARINT_BYTES):
        longer = gaps >= 1 << (7 * size)
        if not longer.any():
            break
        sizes += longer
    return sizes


def _write_varints(gaps: Positions, sizes: NDArray[np.int64] | None) -> Bytes:
    if sizes is None:
        return gaps.astype(np.uint8)
    ends = np.cumsum(sizes)
    starts = ends - sizes
    out = np.empty(int(ends[-1]), dtype=np.uint8)
    # First bytes at once, then the few that need a second, a third, ...
    out[starts] = (gaps & 0x7F) | ((sizes > 1).astype(np.int64) << 7)
    rest = np.flatnonzero(sizes > 1)
    for place in range(1, _VARINT_BYTES):
        if len(rest) == 0:
            break
        more = sizes[rest] > place + 1
        out[starts[rest] + place] = ((gaps[rest] >> (7 * place)) & 0x7F) | (more.astype(np.int64) << 7)
        rest = rest[more]
    return out


def _read_varints(data: Bytes, count: int, elements: int) -> Positions:
    if not count <= len(data) <= count * _VARINT_BYTES:
        raise FrameError(f"{len(data)} bytes can't hold {count} varints")
    if count == 0:
        return np.empty(0, dtype=np.int64)
    if len(data) == count:
        if data.max() >= 0x80:
            raise FrameError("a varint is cut off")
        gaps = data.astype(np.int64)
    else:
        ends = np.flatnonzero(data < 0x80)
        if len(ends) != count or ends[-1] != len(data) - 1:
            raise FrameError(f"{len(ends)} varints where {count} were announced")
        starts = np.empty_like(ends)
        starts[0] = 0
        starts[1:] = ends[:-1] + 1
        sizes = ends - starts + 1
        if int(sizes.max()) > _VARINT_BYTES:
            raise FrameError("a varint is too long")
        gaps = (data[starts] & 0x7F).astype(np.int64)
        for place in range(1, int(sizes.max())):
            rest = np.flatnonzero(sizes > place)
            gaps[rest] += (data[starts[rest] + place] & 0x7F).astype(np.int64) << (7 * place)
    # Each gap is below 2**35 and there are fewer than 2**31 of them, so their sum can't overflow once each is in range.
    if int(gaps.max()) >= elements:
        raise FrameError("a gap reaches outside the tensor")
    gaps += 1
    return np.cumsum(gaps) - 1
