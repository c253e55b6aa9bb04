"""Codecs: tensors to payloads and back.

Shape and dtype travel in the message's header, so a payload holds nothing but what its codec needs. Encoding is a function of
the tensor and the seed; decoding checks the payload's size before it takes memory, and raises `FrameError` for anything that
no encoder writes.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import lru_cache

import torch
from torch import Tensor

from compress import blocks, topk
from compress.buffers import Payload, bytes_of, tensor_of
from compress.places import Places
from compress.settings import Bf16, Blocks, Settings, TopK, TopKReused, dtype_name, parse, raw_bytes
from dag.graph import FLOATING
from fusion.errors import FrameError, PlanError


@dataclass(frozen=True, slots=True)
class Codec:
    """One codec with its options; holds no state, so one object may serve every edge and thread."""

    settings: Settings

    @property
    def lossy(self) -> bool:
        return self.settings.lossy

    @property
    def needs_places(self) -> bool:
        """Whether it sends values at places that a payload of the other direction kept."""
        return isinstance(self.settings, TopKReused)

    def encode(self, tensor: Tensor, seed: int = 0, places: Places | None = None) -> memoryview:
        """The payload of `tensor`, which may be empty, of any strides and on any device.

        `seed` matters to stochastic rounding only (`compress.edge_seed`). The payload may share the tensor's memory:
        don't write to the tensor until the payload is sent. A codec that `needs_places` gives a whole payload all the same; what
        comes after `places.head` is for a receiver who has them.
        """
        settings = self.settings
        if dtype_name(tensor.dtype) in FLOATING and tensor.numel():
            if isinstance(settings, Blocks):
                return blocks.encode(settings, tensor, seed)
            if isinstance(settings, TopK):
                if self.needs_places and places is None:
                    raise PlanError(f"codec {settings.name} needs the places that the activation's payload kept")
                return topk.encode(settings, tensor, seed, places if self.needs_places else None)
            if isinstance(settings, Bf16) and tensor.dtype.itemsize > 2:
                return bytes_of(tensor.detach().to(torch.bfloat16))
        return bytes_of(tensor)

    def decode(
        self, payload: Payload, shape: tuple[int, ...], dtype: torch.dtype | str, places: Places | None = None
    ) -> Tensor:
        """A fresh, contiguous CPU tensor. Raises `FrameError`. With `places`, the payload is the values there, no more.

        `shape` and `dtype` must have been checked against the plan: a short top-k payload rightly fills a large tensor.
        """
        try:
            name = dtype_name(dtype)
        except PlanError as error:
            raise FrameError(str(error)) from None
        exact = self.payload_bytes(shape, name)
        if exact is not None and len(payload) != exact:
            raise FrameError(f"payload of {len(payload)} bytes, {exact} expected for {name}{list(shape)}")
        if exact is None and len(payload) > self.max_payload_bytes(shape, name):
            raise FrameError(f"payload of {len(payload)} bytes is larger than any for {name}{list(shape)}")
        torch_dtype: torch.dtype = getattr(torch, name)
        if name in FLOATING and math.prod(shape) > 0:
            if isinstance(self.settings, Blocks):
                return blocks.decode(self.settings, payload, shape, torch_dtype)
            if isinstance(self.settings, TopK):
                if places is not None:
                    return topk.decode_values(self.settings, payload, places, shape, torch_dtype)
                return topk.decode(self.settings, payload, shape, torch_dtype)
            if isinstance(self.settings, Bf16) and torch_dtype.itemsize > 2:
                return tensor_of(payload, shape, "bfloat16").to(torch_dtype)
        return tensor_of(payload, shape, name)

    def places(self, payload: Payload, shape: tuple[int, ...], dtype: torch.dtype | str) -> Places | None:
        """Which places a payload that `decode` takes has kept; None where it has all. Raises `FrameError`."""
        if not isinstance(self.settings, TopK) or self.payload_bytes(shape, dtype) is not None:
            return None
        return topk.places_of(self.settings, payload, shape, getattr(torch, dtype_name(dtype)))

    def round_trip(self, tensor: Tensor, seed: int = 0) -> Tensor:
        """What the other end would get: for an edge whose two ends live in one process."""
        return self.decode(self.encode(tensor, seed), tuple(tensor.shape), tensor.dtype)

    def payload_bytes(self, shape: tuple[int, ...], dtype: torch.dtype | str) -> int | None:
        """Exact payload size, or None where it depends on the values (top-k)."""
        return self.settings.payload_bytes(shape, dtype)

    def max_payload_bytes(self, shape: tuple[int, ...], dtype: torch.dtype | str) -> int:
        """No valid payload is larger."""
        return self.settings.max_payload_bytes(shape, dtype)

    def expected_payload_bytes(self, shape: tuple[int, ...], dtype: torch.dtype | str) -> int:
        """The size to plan with."""
        return self.settings.expected_payload_bytes(shape, dtype)

    def wire_ratio(self, shape: tuple[int, ...], dtype: torch.dtype | str) -> float:
        """How many times fewer bytes travel than the tensor has, all included."""
        return raw_bytes(shape, dtype) / max(self.expected_payload_bytes(shape, dtype), 1)


@lru_cache(maxsize=256)
def _cached(name: str, options: tuple[tuple[str, float], ...]) -> Codec:
    return Codec(parse(name, dict(options)))


def codec(name: str, **options: float) -> Codec:
    """The codec called `name`: one of `compress.CODECS`.

    Options may stand in the name (`topk:ratio=100,value_bits=8`) or follow as keywords, of which the codec takes those it
    has: `block` and `stochastic` (integers), `ratio` and `value_bits` (top-k). Raises `PlanError`.
    """
    return _cached(name, tuple(options.items()))
