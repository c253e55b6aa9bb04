"""Integers of 2, 3, 4 or 8 bits in blocks that share a scale.

Payload: the bfloat16 scales of all blocks, then the integers, packed without padding. A scale is the block's largest
magnitude over the largest integer, rounded up, so nothing saturates: the error is at most half a scale (a whole one with
stochastic rounding). A block that holds a NaN or an infinity decodes to NaN throughout, so that trouble stays visible.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from compress.buffers import Payload, borrow, bytes_of, flatten
from compress.kernels import KERNELS, MOST_BLOCK, Kernels
from compress.rounding import random_int16
from compress.settings import Blocks

_SMALLEST_SCALE = torch.finfo(torch.float32).tiny
_INFINITY, _NAN = 0x7F800000, 0x7FC00000
"""As the bits of a float32."""
_LAST_BITS = 1.5 * 2**23
_CHUNK = 1 << 17
"""Values that are worked on at a time: few enough for the processor's cache, enough that starting each pass costs little."""


def encode(settings: Blocks, tensor: Tensor, seed: int) -> memoryview:
    """The payload of a floating tensor that is not empty."""
    flat = flatten(tensor).to(torch.float32)
    if KERNELS is not None and settings.block <= MOST_BLOCK:
        return _in_one_pass(KERNELS, settings, flat.numpy(), seed)
    return in_passes(settings, flat, seed)


def _in_one_pass(kernels: Kernels, settings: Blocks, values: NDArray[np.float32], seed: int) -> memoryview:
    elements, blocks = len(values), settings.blocks(len(values))
    noise = random_int16(blocks * settings.block, seed) if settings.stochastic else None
    out = np.empty(2 * blocks + blocks * settings.block * settings.bits // 8, dtype=np.uint8)
    scales = out[: 2 * blocks].view(np.int16)
    kernels.encode_blocks(values, settings.block, settings.bits, noise, scales, out[2 * blocks :])
    return out.data[: 2 * blocks + -(-elements * settings.bits // 8)]


def in_passes(settings: Blocks, flat: Tensor, seed: int) -> memoryview:
    """The same payload of contiguous float32 values by torch's and numpy's operations, each of which passes over them."""
    elements, bits = flat.numel(), settings.bits
    blocks = settings.blocks(elements)
    padded = (
        torch.nn.functional.pad(flat, (0, blocks * settings.block - elements)) if elements % settings.block else flat
    )
    rows = min(max(_CHUNK // settings.block, 1), blocks)
    # All views at once: taking them one by one costs as much as the arithmetic.
    parts = torch.split(padded.view(blocks, settings.block), rows)
    scratch = torch.empty(rows, settings.block)

    largest = torch.empty(blocks)
    for part, most in zip(parts, torch.split(largest, rows), strict=True):
        torch.amax(torch.abs(part, out=scratch[: len(part)]), 1, out=most)
    stored, inverse = _scales(largest, settings.levels)

    out = torch.empty(2 * blocks + blocks * settings.block * bits // 8, dtype=torch.uint8)
    out[: 2 * blocks].view(torch.int16).copy_(stored)
    packed = torch.split(out[2 * blocks :], rows * settings.block * bits // 8)
    noise = torch.from_numpy(random_int16(padded.numel(), seed)).view(blocks, -1) if settings.stochastic else None
    integers = torch.empty(scratch.shape, dtype=torch.int8)
    # Adding this leaves a float's last bits holding the nearest integer, biased so that it is positive where it is packed.
    nearest = _LAST_BITS + (1 << (bits - 1) if bits < 8 else 0)
    first = 0
    for part, factor, room in zip(parts, torch.split(inverse[:, None], rows), packed, strict=True):
        if len(part) < rows:
            scratch, integers = scratch[: len(part)], integers[: len(part)]
        torch.mul(part, factor, out=scratch)
        if noise is not None:
            scratch.add_(noise[first : first + rows], alpha=2.0**-16).clamp_(-settings.levels, settings.levels)
            first += rows
        # A NaN becomes some integer here; its block's scale is NaN, so what it becomes does not matter.
        found = scratch.add_(nearest).view(torch.int32)
        if bits == 8:
            room.view(torch.int8).view_as(found).copy_(found)
        else:
            _pack(integers.copy_(found), room, bits)
    return bytes_of(out[: 2 * blocks + -(-elements * bits // 8)])


def decode(settings: Blocks, payload: Payload, shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
    """The tensor again; the caller has checked the payload's size."""
    out = torch.empty(shape, dtype=dtype)
    flat = out.view(-1)
    elements = flat.numel()
    blocks = settings.blocks(elements)
    scales = borrow(payload, "bfloat16", blocks).to(torch.float32)
    limit = torch.finfo(dtype).max
    # A scale is rounded up, so the largest value of a block may come out beyond the dtype's range.
    clamp = bool(scales.abs().nan_to_num(0.0).max() > 0.99 * limit / settings.levels)
    packed = borrow(payload, "uint8", -(-elements * settings.bits // 8), 2 * blocks)
    step = max(_CHUNK // settings.block, 1) * settings.block
    for start in range(0, elements, step):
        chunk = flat[start : start + step]
        first = start // settings.block
        last = first + settings.blocks(chunk.numel())
        begin = start * settings.bits // 8
        integers = _unpack(packed[begin : begin + -(-chunk.numel() * settings.bits // 8)], settings, last - first)
        direct = dtype == torch.float32 and chunk.numel() % settings.block == 0
        values = chunk.view(-1, settings.block) if direct else torch.empty(last - first, settings.block)
        values.copy_(integers.view(-1, settings.block)).mul_(scales[first:last, None])
        if clamp:
            values.clamp_(-limit, limit)
        if not direct:
            chunk.copy_(values.view(-1)[: chunk.numel()])
    return out


def _scales(largest: Tensor, levels: int) -> tuple[Tensor, Tensor]:
    """From the blocks' largest magnitudes: the scales as bfloat16 bits (int32), and what to multiply values by (float32).

    Scales are rounded up; for a block with a value that is not finite they are NaN and 0. Writes over `largest`.
    """
    bits = largest.div_(levels).clamp_(min=_SMALLEST_SCALE).view(torch.int32).bitwise_and_(0x7FFFFFFF)
    odd = bits >= _INFINITY
    # Add all ones below bfloat16's last bit, then cut. There are many NaNs; this one needs no rounding.
    bits.masked_fill_(odd, _NAN).add_(0xFFFF).bitwise_right_shift_(16)
    return bits, (bits << 16).view(torch.float32).reciprocal_().masked_fill_(odd, 0.0)


def _pack(biased: Tensor, out: Tensor, bits: int) -> None:
    """int8 from 1 to 2**bits - 1 -> bytes; their number is a multiple of 8.

    A value is moved next to its neighbour within a wider word, pair by pair. numpy starts these short passes faster.
    """
    values, target = biased.numpy().reshape(-1), out.numpy()
    if bits == 4:
        pairs = values.view(np.uint16)
        np.copyto(target, pairs | (pairs >> 4), casting="unsafe")
    elif bits == 2:
        quads: NDArray[Any] = values.view(np.uint32)
        quads = quads | (quads >> 6)
        np.copyto(target, quads | (quads >> 12), casting="unsafe")
    else:
        octets: NDArray[Any] = values.view(np.uint64)
        octets = (octets | (octets >> 5)) & 0x003F003F003F003F
        octets = (octets | (octets >> 10)) & 0x00000FFF00000FFF
        words = (octets | (octets >> 20)).astype("<u4")
        target.reshape(-1, 3)[:] = words.view(np.uint8).reshape(-1, 4)[:, :3]


def _unpack(packed: Tensor, settings: Blocks, blocks: int) -> Tensor:
    """Bytes -> int8, `blocks` whole blocks of them."""
    bits, count = settings.bits, blocks * settings.block
    padding = count * bits // 8 - packed.numel()
    if padding:
        packed = torch.nn.functional.pad(packed, (0, padding))
    if bits == 8:
        return packed.view(torch.int8)
    if bits == 4:
        pairs = packed.to(torch.int16)
        biased = ((pairs | (pairs << 4)) & 0x0F0F).view(torch.int8)
    elif bits == 2:
        quads = packed.to(torch.int32)
        quads = quads | (quads << 12)
        biased = ((quads | (quads << 6)) & 0x03030303).view(torch.int8)
    else:
        words = torch.nn.functional.pad(packed.view(-1, 3), (0, 1)).view(-1).view(torch.int32).to(torch.int64)
        words = (words | (words << 20)) & 0x00000FFF00000FFF
        words = (words | (words << 10)) & 0x003F003F003F003F
        biased = ((words | (words << 5)) & 0x0707070707070707).view(torch.int8)
    return biased.sub_(1 << (bits - 1))
