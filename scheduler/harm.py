"""How much a codec on a boundary hurts training: our own measurement, which `auto` ranks codecs by.

Measured on GPTs of 4 layers, width 128, sequence 128, 300 steps with AdamW from scratch, one seed, no error feedback, against the same
without a codec: the mean loss of the last 20 steps, or that of samples held out if it is worse. *One* tensor: byte vocabulary, batch 32,
tiny Shakespeare, the boundary after block 2. *Three*: batch 16, in `benchmarks/codec_harm.py`. *Six*: batch 32, three boundaries within
blocks, where two tensors cross each (home devices in `benchmarks/slow_network.py --losses`).

What several tensors cost together is not always what one costs so many times, and two runs differ by a few tenths of a percent. Where
several figures are known, the greatest harm per tensor counts. 4 bits both ways cost more on three (1.6%) than 4 bits forward
and 3 stochastic ones back (0.8%), which take fewer bytes: so they have no row. Top-k is harmless only where gradients come back at the
places that the activation kept, which is the gradient of what was sent. A table from one kind of model is a ranking, not a promise
for another.
"""

from __future__ import annotations

from dataclasses import dataclass

from fusion.plan import CodecChoice

MOST_HARM = 0.01
"""`auto` and `adaint` use codecs that together cost at most this share of the loss, if what our measurement says of one
tensor adds up over all that are compressed."""


@dataclass(frozen=True, slots=True)
class Measured:
    """One row: codec forward and back, what it cost, and options."""

    forward: str
    backward: str
    added: tuple[tuple[int, float], ...]
    """Pairs of (number of tensors that were compressed, loss that was added, relative to that without a codec)."""
    options: tuple[tuple[str, float], ...] = ()

    @property
    def harm(self) -> float:
        """Loss added by each tensor that is compressed, relative to the loss without a codec."""
        return max(added / tensors for tensors, added in self.added)

    @property
    def choice(self) -> CodecChoice:
        return CodecChoice(forward=self.forward, backward=self.backward, options=dict(self.options))


def _places(ratio: int, added: float) -> Measured:
    """Top-k of 8 bits, gradients at the same places; `added` on three tensors."""
    return Measured(f"topk:ratio={ratio},value_bits=8", f"topk-reused:ratio={ratio},value_bits=8", ((3, added),))


MEASURED: tuple[Measured, ...] = (
    Measured("none", "none", ((1, 0.0),)),
    Measured("int8", "int8", ((1, 0.0), (3, 0.0))),
    Measured("int4", "int3:stochastic=1", ((1, 0.0016), (3, 0.0081), (6, 0.0137))),
    _places(4, 0.0159),
    _places(6, 0.0171),
    _places(8, 0.0345),
    Measured("int4", "int2:stochastic=1", ((1, 0.0033), (3, 0.0383))),
    Measured("int3", "int3", ((1, 0.0173),)),
    Measured("int2", "int4", ((1, 0.0382),)),
    Measured("topk", "topk", ((1, 0.2987),), (("ratio", 10.0),)),
)
"""From the least harmful on; among equals the one with more bytes first."""


def ladder(most_harm: float) -> tuple[Measured, ...]:
    """The codecs that `auto` may use on a tensor, mildest first: those that cost at most `most_harm` of the loss."""
    return tuple(row for row in MEASURED if row.harm <= most_harm)
