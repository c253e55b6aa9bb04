"""The messages of a placement: how many bytes each takes, and how long encoding and decoding them keeps a thread busy."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from compress.settings import parse
from dag.workload import Crossings, Workload
from fusion.plan import CodecChoice

Floats = NDArray[np.float64]

RATES: dict[str, tuple[float, float]] = {
    "none": (np.inf, np.inf),
    "bf16": (8e9, 6e9),
    "int8": (1.6e9, 3.5e9),
    "int4": (1.2e9, 2.0e9),
    "int3": (0.5e9, 1.0e9),
    "int2": (0.5e9, 1.4e9),
    "topk": (0.9e9, 3.0e9),
    "topk-sampled": (1.2e9, 3.0e9),
    "topk-reused": (4.0e9, 3.0e9),
}
"""Bytes of the tensor per second that one core encodes and decodes: `benchmarks/codecs.py`, 4 MiB tensors, rounded down.
Copying a value that travels as it is is part of `scheduler.estimate.HANDLED_PER_SECOND`."""


@dataclass(frozen=True, eq=False)
class Way:
    """One direction of all edges, by edge."""

    size: Floats
    """Bytes on the wire."""
    encode: Floats
    """Seconds on the sender's encoder thread."""
    decode: Floats
    """Seconds on the receiver's thread that takes messages in."""

    def edges(self) -> list[tuple[float, float, float]]:
        """(size, encode, decode) by edge, as plain numbers."""
        return list(zip(self.size.tolist(), self.encode.tolist(), self.decode.tolist(), strict=True))


@dataclass(frozen=True, eq=False)
class Messages:
    """Activations and parameters forward, gradients back."""

    forward: Way
    backward: Way


def plain(size: Floats) -> Messages:
    """Everything travels as it is."""
    way = Way(size, np.zeros(len(size)), np.zeros(len(size)))
    return Messages(way, way)


def messages(workload: Workload, crossings: Crossings, codecs: Mapping[int, CodecChoice]) -> Messages:
    """What each edge's codec makes of its messages; an edge that is not named travels as it is."""
    forward, backward = (np.zeros((3, len(crossings))) for _ in range(2))
    forward[0] = backward[0] = workload.value_bytes[crossings.value]
    for edge, choice in codecs.items():
        value = int(crossings.value[edge])
        forward[:, edge] = price(workload, value, choice.forward, choice.options)
        backward[:, edge] = price(workload, value, choice.backward, choice.options)
    return Messages(Way(*forward), Way(*backward))


def price(workload: Workload, value: int, codec: str, options: Mapping[str, float]) -> tuple[float, float, float]:
    """(expected bytes, seconds to encode, seconds to decode) of one value, or of its gradient."""
    meta, raw = workload.metas[value], float(workload.value_bytes[value])
    if meta is None or not meta.is_floating:
        return raw, 0.0, 0.0
    encode, decode = RATES[codec.partition(":")[0]]
    return float(parse(codec, options).expected_payload_bytes(meta.shape, meta.dtype)), raw / encode, raw / decode
