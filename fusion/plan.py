"""The plan: which fragments there are, which worker hosts each, and how tensors travel between them.

A plan is data. The scheduler makes it, the coordinator records and sends it, workers and the simulator follow it.
"""

from __future__ import annotations

import hashlib
from typing import Any, Literal, Self

import msgpack
from pydantic import BaseModel, ConfigDict, Field, model_validator

ScheduleName = Literal["gpipe", "1f1b"]


class CodecChoice(BaseModel):
    """The codec of one edge: activations forward, gradients back. `options` are the codec's own, e.g. `ratio`."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    forward: str = "none"
    backward: str = "none"
    options: dict[str, float] = Field(default_factory=dict)
    error_feedback: bool = False
    """What a codec loses of one micro-batch is added to the next one's value before that is encoded."""


class Plan(BaseModel):
    """Fragments, placement, codecs and micro-batches in flight.

    `cuts` are positions in `OpDag.body` (see `dag.cut`); fragment `i` is `body[cuts[i-1]:cuts[i]]`. `placement[i]` is the
    name of the worker that hosts fragment `i`. `in_flight[i]` is how many forwards fragment `i` may be ahead of its
    backwards (1F1B warm-up; GPipe uses the number of micro-batches). `weights_behind[i]` is for how many micro-batches at a
    time it may owe the gradients of weights: 0 for whole backwards, 1 where they follow at once what is sent; empty: 0 for all.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    epoch: int = 0
    policy: str
    schedule: ScheduleName = "1f1b"
    cuts: tuple[int, ...]
    placement: tuple[str, ...]
    in_flight: tuple[int, ...]
    weights_behind: tuple[int, ...] = ()
    codecs: dict[int, CodecChoice] = Field(default_factory=dict)
    """Edge index -> codec; an edge that is not named travels as it is."""
    predicted_step_seconds: float | None = None

    @model_validator(mode="after")
    def _consistent(self) -> Self:
        if not len(self.placement) == len(self.in_flight) == len(self.cuts) + 1:
            raise ValueError("a plan needs one placement and one in_flight per fragment")
        if len(self.weights_behind) not in (0, len(self.placement)):
            raise ValueError("a plan's weights_behind has one entry per fragment, or none")
        return self

    @property
    def id(self) -> str:
        """Content hash of everything that decides the bits: fragments and codecs, not placement or epoch."""
        content: dict[str, Any] = {
            "cuts": list(self.cuts),
            "codecs": {str(edge): choice.model_dump() for edge, choice in sorted(self.codecs.items())},
        }
        return hashlib.sha256(msgpack.packb(content)).hexdigest()[:16]

    @property
    def workers(self) -> tuple[str, ...]:
        """The workers that host at least one fragment, in order of their first fragment."""
        return tuple(dict.fromkeys(self.placement))

    def fragments_of(self, worker: str) -> tuple[int, ...]:
        return tuple(index for index, name in enumerate(self.placement) if name == worker)
