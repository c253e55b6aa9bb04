"""What a plan's edges send, one message after the other, and how many bytes each takes as its codec makes it."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from compress.settings import parse
from dag.cut import Edge, Partition
from fusion.plan import CodecChoice, Plan

_PLAIN = CodecChoice()


@dataclass(frozen=True, slots=True)
class Sent:
    """The values of one edge, or their gradients."""

    edge: Edge
    gradient: bool
    codec: str
    wire_bytes: int
    """Of one message, as far as its codec can tell before it sees the values."""

    @property
    def once_a_step(self) -> bool:
        """A parameter that is lent travels once a step, everything else for every micro-batch."""
        return self.edge.kind == "parameter" and not self.gradient


def sent(partition: Partition, plan: Plan) -> Iterator[Sent]:
    """Every edge's values, and their gradients where some come back."""
    for edge in partition.edges:
        choice = plan.codecs.get(edge.index, _PLAIN)
        for gradient, codec in ((False, choice.forward), (True, choice.backward)):
            if edge.gradient or not gradient:
                size = parse(codec, choice.options).expected_payload_bytes(edge.meta.shape, edge.meta.dtype)
                yield Sent(edge, gradient, codec, size)
