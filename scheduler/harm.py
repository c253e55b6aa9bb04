"""How much a codec on a boundary hurts training: our own measurement, which `auto` ranks codecs by.

Measured on a GPT of 4 layers, width 128, byte vocabulary, sequence 128, batch 32, AdamW, 300 steps on tiny Shakespeare,
one boundary after block 2, codec on activations / on their gradients, no error feedback, one seed; the loss is the mean
of the last 20 steps, 2.434 without a codec. The same 4-bit / 3-bit pair on three boundaries: 2.445. A table from one
model is a ranking, not a promise for another.
"""

from __future__ import annotations

from dataclasses import dataclass

from fusion.plan import CodecChoice

DENSE_LOSS = 2.434


@dataclass(frozen=True, slots=True)
class Measured:
    """One row: codec forward and back, the loss reached with it, and options."""

    forward: str
    backward: str
    loss: float
    options: tuple[tuple[str, float], ...] = ()

    @property
    def harm(self) -> float:
        """Loss added, relative to the loss without a codec."""
        return self.loss / DENSE_LOSS - 1

    @property
    def choice(self) -> CodecChoice:
        return CodecChoice(forward=self.forward, backward=self.backward, options=dict(self.options))


MEASURED: tuple[Measured, ...] = (
    Measured("none", "none", 2.434),
    Measured("int8", "int8", 2.434),
    Measured("int4", "int4", 2.438),
    Measured("int4", "int3:stochastic=1", 2.438),
    Measured("int4", "int2:stochastic=1", 2.442),
    Measured("int3", "int3", 2.476),
    Measured("int2", "int4", 2.527),
    Measured("topk", "topk", 3.161, (("ratio", 10.0),)),
)
"""From the least harmful on; among equals the one with more bytes first."""


def ladder(most_harm: float) -> tuple[Measured, ...]:
    """The codecs that `auto` may use, mildest first: those that cost at most `most_harm` of the loss."""
    return tuple(row for row in MEASURED if row.harm <= most_harm)
