"""What playing a plan brings to light."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal


@dataclass(frozen=True, slots=True)
class Span:
    """Something that kept a worker or a link busy from `start` to `end` (seconds)."""

    resource: str
    """A worker's name, `a → b` for a link, or a worker's name followed by `encoder` or `decoder`."""
    kind: Literal[
        "forward",
        "backward",
        "weights",
        "update",
        "activation",
        "gradient",
        "parameter",
        "norms",
        "encode",
        "decode",
    ]
    fragment: int
    """The fragment that runs; for a message, the one that receives it."""
    step: int
    micro_batch: int
    start: float
    end: float
    size: float = 0.0
    """Bytes of a message."""


@dataclass(frozen=True)
class Simulation:
    """What a plan does in steady state."""

    step_seconds: float
    bubble: float
    """Share of the time in which the plan's workers compute nothing."""
    bytes_per_link: dict[tuple[str, str], float]
    """Wire bytes of one step by directed pair of workers."""
    memory_per_worker: dict[str, float]
    busy_per_worker: dict[str, float]
    """Seconds of compute in one step."""
    spans: tuple[Span, ...] = field(repr=False)

    @property
    def bytes_per_step(self) -> float:
        return sum(self.bytes_per_link.values())
