"""Integers of 2, 3, 4 or 8 bits in blocks that share a scale.

Payload: the bfloat16 scales of all blocks, then the integers, packed without padding. A scale is the block's largest
magnitude over the largest integer, rounded up, so nothing saturates: the error is at most half a scale (a whole one with
stochastic rounding). A block that holds a NaN or an infinity decodes to NaN throughout, so that trouble stays visible.
"""

from __future__ import annotations

import torch
from torch import Tensor

from compress.buffers import Payload, borrow, bytes_of, flatten
from compress.rounding import random_int16
from compress.settings import Blocks

_SMALLEST_SCALE = torch.finfo(torch.float32).tiny
_CHUNK = 1 << 17
"""Values that are worked on at a time, so that the passes over them stay in the processor's cache."""


def encode(settings: Blocks, tensor: Tensor, seed: int) -> memoryview:
    """The payload of a floating tensor that is not empty."""
    flat = flatten(tensor).to(torch.float32)
    elements = flat.numel()
    blocks = settings.blocks(elements)
    noise = torch.from_numpy(random_int16(elements, seed)) if settings.stochastic else None
    out = torch.empty(2 * blocks + -(-elements * settings.bits // 8), dtype=torch.uint8)
    packed = out[2 * blocks :]
    # At an odd address int16 would not do; there are two bytes for each block, so the packed part starts at an even one.
    scales = out[: 2 * blocks].view(torch.int16)
    step = max(_CHUNK // settings.block, 1) * settings.block
    for start in range(0, elements, step):
        chunk = flat[start : start + step]
        first = start // settings.block
        last = first + settings.blocks(chunk.numel())
        integers = _quantize(
            settings, chunk, scales[first:last], None if noise is None else noise[start : start + step]
        )
        begin = start * settings.bits // 8
        length = -(-chunk.numel() * settings.bits // 8)
        packed[begin : begin + length] = _pack(integers, settings.bits)[:length]
    return bytes_of(out)


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
        values = integers.view(-1, settings.block) * scales[first:last, None]
        if clamp:
            values.clamp_(-limit, limit)
        chunk.copy_(values.view(-1)[: chunk.numel()])
    return out


def _quantize(settings: Blocks, chunk: Tensor, scales: Tensor, noise: Tensor | None) -> Tensor:
    """Writes the scales' bits; returns the integers (int8), padded to whole blocks."""
    padding = -chunk.numel() % settings.block
    if padding:
        chunk = torch.nn.functional.pad(chunk, (0, padding))
        noise = None if noise is None else torch.nn.functional.pad(noise, (0, padding))
    values = chunk.view(-1, settings.block)
    largest = values.abs().amax(1)
    finite = largest.isfinite()
    scale = torch.where(finite, (largest / settings.levels).clamp_(min=_SMALLEST_SCALE), torch.nan)
    # Round up to bfloat16: add all ones below its last bit, then cut. NaN needs no rounding (0x7fc00000 stays NaN).
    bits = (scale.view(torch.int32) + 0xFFFF) >> 16
    scales.copy_(bits)
    scale = (bits << 16).view(torch.float32)
    if not finite.all():
        values = torch.where(finite[:, None], values, 0.0)
        scale = torch.where(finite, scale, 1.0)
    scaled = values * (1.0 / scale)[:, None]
    if noise is None:
        return scaled.round_().to(torch.int8).view(-1)
    scaled.add_(noise.view(-1, settings.block), alpha=2.0**-16).add_(0.5).floor_()
    return scaled.clamp_(-settings.levels, settings.levels).to(torch.int8).view(-1)


def _pack(integers: Tensor, bits: int) -> Tensor:
    """int8 in -levels..levels -> bytes; the number of integers is a multiple of 8.

    Below 8 bits a biased value is moved next to its neighbour within a wider word, pair by pair.
    """
    if bits == 8:
        return integers.view(torch.uint8)
    biased = integers.add_(1 << (bits - 1))
    if bits == 4:
        pairs = biased.view(torch.int16)
        return (pairs | (pairs >> 4)).to(torch.uint8)
    if bits == 2:
        quads = biased.view(torch.int32)
        quads = quads | (quads >> 6)
        return (quads | (quads >> 12)).to(torch.uint8)
    octets = biased.view(torch.int64)
    octets = (octets | (octets >> 5)) & 0x003F003F003F003F
    octets = (octets | (octets >> 10)) & 0x00000FFF00000FFF
    octets = (octets | (octets >> 20)).to(torch.int32)
    return octets.view(torch.uint8).view(-1, 4)[:, :3].reshape(-1)


def _unpack(packed: Tensor, settings: Blocks, blocks: int) -> Tensor:
    """Bytes -> int8 or float integers, `blocks` whole blocks of them."""
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
