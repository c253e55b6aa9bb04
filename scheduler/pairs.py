"""Which edges of a placement go from one worker to another."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from dag.workload import Crossings


@dataclass(frozen=True, slots=True)
class Pair:
    """The edges that go from one worker to another; their gradients come back."""

    source: str
    target: str
    edges: tuple[int, ...]

    def returning(self, crossings: Crossings) -> tuple[int, ...]:
        """The edges whose gradients come back."""
        return tuple(edge for edge in self.edges if crossings.gradient[edge])


def pairs_of(crossings: Crossings, edges: Sequence[int], placement: Sequence[str]) -> Iterator[Pair]:
    """Pairs of different workers, in order of their first edge."""
    found: dict[tuple[str, str], list[int]] = {}
    for edge in edges:
        ends = (placement[crossings.source[edge]], placement[crossings.target[edge]])
        if ends[0] != ends[1]:
            found.setdefault(ends, []).append(edge)
    for (source, target), mine in found.items():
        yield Pair(source, target, tuple(mine))
