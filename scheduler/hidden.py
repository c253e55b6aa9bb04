"""The rule of `auto`: on each link the least harmful codec whose transfer hides behind compute, within a budget of harm."""

from __future__ import annotations

from bisect import bisect_left
from collections import defaultdict
from collections.abc import Iterator, Sequence

from dag.workload import Crossings, Workload
from fusion.plan import CodecChoice
from scheduler.devices import Network
from scheduler.harm import MOST_HARM, Measured, ladder
from scheduler.messages import price
from scheduler.pairs import Pair, pairs_of

LADDER = ladder(MOST_HARM)


def hidden(
    workload: Workload,
    crossings: Crossings,
    edges: Sequence[int],
    placement: Sequence[str],
    network: Network,
    rungs: Sequence[Measured],
    busy_seconds: float,
) -> dict[int, CodecChoice]:
    """Edge -> codec, of those of `edges` that need one.

    Every two workers get the mildest of `rungs` for the earliest deadline, from `busy_seconds` on, that keeps the harm of all
    edges together within `MOST_HARM`.
    """
    between: dict[frozenset[str], list[Pair]] = {}
    for pair in pairs_of(crossings, edges, placement):
        between.setdefault(frozenset((pair.source, pair.target)), []).append(pair)
    links = [_Link(workload, crossings, pairs, network, rungs) for pairs in between.values()]

    def harm(deadline: float) -> float:
        return sum(link.harm(deadline) for link in links)

    deadline = busy_seconds
    if harm(deadline) > MOST_HARM:
        # Who gets more time never does more harm, and with enough of it nobody does any.
        later = sorted({each for link in links for each in link.times() if each > busy_seconds})
        deadline = later[bisect_left(later, True, key=lambda each: harm(each) <= MOST_HARM)]
    return {
        edge: choice for link in links if (choice := link.choice(deadline)).forward != "none" for edge in link.edges
    }


class _Link:
    """What goes between two workers, both ways, and how long each codec's messages of a micro-batch take there."""

    def __init__(
        self,
        workload: Workload,
        crossings: Crossings,
        pairs: Sequence[Pair],
        network: Network,
        rungs: Sequence[Measured],
    ) -> None:
        self.edges = [edge for pair in pairs for edge in pair.edges]
        self._workload = workload
        self._crossings = crossings
        self._pairs = pairs
        self._network = network
        self._rungs = rungs
        self._seconds: list[float] = []

    def choice(self, deadline: float) -> CodecChoice:
        """The mildest codec that keeps to the deadline."""
        return self._rungs[self._mildest(deadline)].choice

    def harm(self, deadline: float) -> float:
        """What it costs on all edges."""
        return self._rungs[self._mildest(deadline)].harm * len(self.edges)

    def times(self) -> Iterator[float]:
        """With each codec: of the wire, the encoder or the decoder, whichever takes longest."""
        return (self._time(rung) for rung in range(len(self._rungs)))

    def _mildest(self, deadline: float) -> int:
        """Where none keeps to the deadline, the one that comes nearest."""
        found = next((rung for rung in range(len(self._rungs)) if self._time(rung) <= deadline), None)
        return min(range(len(self._rungs)), key=self._time) if found is None else found

    def _time(self, rung: int) -> float:
        """Priced when it is asked for first."""
        while len(self._seconds) <= rung:
            self._seconds.append(self._price(self._rungs[len(self._seconds)].choice))
        return self._seconds[rung]

    def _price(self, choice: CodecChoice) -> float:
        # Wire, encoder and decoder of a direction work at the same time on different micro-batches: each keeps up for itself.
        busy: defaultdict[tuple[str, str, str], float] = defaultdict(float)
        for pair in self._pairs:
            ways = (
                (choice.forward, (pair.source, pair.target), pair.edges),
                (choice.backward, (pair.target, pair.source), pair.returning(self._crossings)),
            )
            for codec, ends, moving in ways:
                rate = self._network.link(*ends).bytes_per_second
                for edge in moving:
                    value = int(self._crossings.value[edge])
                    size, encoding, decoding = price(self._workload, value, codec, choice.options)
                    for what, seconds in (("wire", size / rate), ("encoder", encoding), ("decoder", decoding)):
                        busy[what, *ends] += seconds
        return max(busy.values(), default=0.0)
