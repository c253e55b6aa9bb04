"""How much a codec on a boundary hurts training: our own measurement, which `auto` ranks codecs by.

Measured on a GPT of 4 layers, width 128, byte vocabulary, sequence 128, batch 32, AdamW, 300 steps on tiny Shakespeare,
one boundary after block 2, codec on activations / on their gradients, no error feedback, one seed; the loss is the mean
of the last 20 steps, 2.434 without a codec. The same 4-bit / 3-bit pair on three boundaries: 2.445.

What several boundaries cost together is not always what one costs so many times: `benchmarks/codec_harm.py` trains such a GPT
with batch 16 on three. Where both are known, the greater harm per boundary counts. 4 bits both ways cost more there (1.3%)
than 4 bits forward and 3 stochastic ones back (0.2%), which take fewer bytes: so they have no row. A table from one model is a
ranking, not a promise for another.
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
    on_three: float = 0.0
    """Loss added by three boundaries, relative to the loss without a codec, where that was measured."""

    @property
    def harm(self) -> float:
        """Loss added by a boundary, relative to the loss without a codec."""
        return max(self.loss / DENSE_LOSS - 1, self.on_three / 3)

    @property
    def choice(self) -> CodecChoice:
        return CodecChoice(forward=self.forward, backward=self.backward, options=dict(self.options))


MEASURED: tuple[Measured, ...] = (
    Measured("none", "none", 2.434),
    Measured("int8", "int8", 2.434),
    Measured("int4", "int3:stochastic=1", 2.438, on_three=0.002),
    Measured("int4", "int2:stochastic=1", 2.442, on_three=0.025),
    Measured("int3", "int3", 2.476),
    Measured("int2", "int4", 2.527),
    Measured("topk", "topk", 3.161, (("ratio", 10.0),)),
)
"""From the least harmful on; among equals the one with more bytes first."""


def ladder(most_harm: float) -> tuple[Measured, ...]:
    """The codecs that `auto` may use on a boundary, mildest first: those that cost at most `most_harm` of the loss."""
    return tuple(row for row in MEASURED if row.harm <= most_harm)
