"""How much a codec on a boundary hurts training: our own measurement, which `auto` ranks codecs by.

Measured on GPTs of 4 layers, width 128, sequence 128, 300 steps with AdamW, one seed, no error feedback, against the same
without a codec: the mean loss of the last 20 steps, or that of samples held out if it is worse; from scratch, or from a dense
checkpoint if that is worse (`benchmarks/codec_harm.py`, one and three tensors). For 4 and 3 bits also *one* tensor with another batch
and text, and *six*, three boundaries within blocks, where two tensors cross each (home devices in `benchmarks/slow_network.py --losses`).

What several tensors cost together is not always what one costs so many times, and two runs from scratch differ by a few tenths of a
percent, with top-k by more. Where several figures are known, the greatest harm per tensor counts. What trains well from scratch may
still spoil a model that has learnt: top-k of 8 bits with gradients at its places, 12 to 21 times fewer bytes, costs now this, now that from
scratch and 1% to 5% a tensor from a checkpoint, so `auto` does not choose it. Stochastic rounding of gradients costs less than a bit saves: 4 bits
both ways are dearer than 4 and 3 stochastic ones, so they have no row. A table from one kind of model is a ranking, not a promise for another.
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


def _places(ratio: int, one: float, three: float) -> Measured:
    """Top-k of 8 bits, gradients at the same places; what was added by one tensor and by three."""
    options = f"ratio={ratio},value_bits=8"
    return Measured(f"topk:{options}", f"topk-reused:{options}", ((1, one), (3, three)))


MEASURED: tuple[Measured, ...] = (
    Measured("none", "none", ((1, 0.0),)),
    Measured("int8", "int8", ((1, 0.0), (3, 0.0))),
    Measured("int8", "int4:stochastic=1", ((1, 0.0024), (3, 0.0012))),
    Measured("int4", "int3:stochastic=1", ((1, 0.0060), (3, 0.0180), (6, 0.0137))),
    Measured("int3", "int3", ((1, 0.0173),)),
    Measured("int4", "int2:stochastic=1", ((1, 0.0185), (3, 0.0464))),
    _places(6, 0.0293, 0.0443),
    _places(4, 0.0330, 0.0276),
    Measured("int2", "int4", ((1, 0.0382),)),
    _places(8, 0.0485, 0.0602),
    Measured("topk", "topk", ((1, 0.2987),), (("ratio", 10.0),)),
)
"""From the least harmful on; among equals the one with more bytes first."""


def ladder(most_harm: float) -> tuple[Measured, ...]:
    """The codecs that `auto` may use on a tensor, mildest first: those that cost at most `most_harm` of the loss."""
    return tuple(row for row in MEASURED if row.harm <= most_harm)
