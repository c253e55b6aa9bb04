"""The best placement of a small chain of ops: every choice of cuts and devices, also those that come back to a device.

`enumerated` plays them all. `search` leaves out what can't win: it extends partial placements in the order of a lower bound
on their step time, and stops when the bound reaches the best time that was played. It shares nothing with OP-Fence but the
simulator and the choice of micro-batches in flight.
"""

from __future__ import annotations

import heapq
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import combinations, count, pairwise, product
from typing import TypeVar

from scheduler.cost import Costs
from scheduler.devices import Device, Link
from scheduler.estimate import Estimator, Placed
from scheduler.planner import tuned
from scheduler.simulator import play

T = TypeVar("T")
PRECISION = 0.005
"""`search` may miss the optimum by this share of it."""


def placements(legal: Sequence[int], devices: int) -> Iterator[Placed]:
    """All placements in which neighbouring fragments are on different devices."""
    for fragments in range(1, len(legal) + 2):
        for cuts in combinations(legal, fragments - 1):
            for hosts in product(range(devices), repeat=fragments):
                if all(first != second for first, second in pairwise(hosts)):
                    yield Placed(cuts, hosts)


def simulated(costs: Costs, placed: Placed, in_flight: Sequence[int] | None = None) -> float:
    """Simulated step time, with the estimator's micro-batches in flight unless others are given."""
    estimator = Estimator(costs)
    return play(costs, estimator, placed, in_flight or estimator(placed).in_flight).step_seconds


def enumerated(costs: Costs) -> float:
    """The least simulated step time of all placements."""
    estimator = Estimator(costs)
    legal = [int(position) for position in costs.workload.positions]
    found = placements(legal, len(costs.devices))
    return min(tuned(costs, estimator, placed, estimator(placed))[1] for placed in found)


@dataclass(frozen=True, order=True)
class _Partial:
    bound: float
    turn: int
    """Makes the order total."""
    placed: Placed
    position: int
    path: float
    """Of one micro-batch: through what is placed, there and back."""
    heads: tuple[float | None, ...]
    """By device: `path` before its first fragment."""
    ahead: tuple[float, ...]
    back: tuple[float, ...]
    link: float
    """The largest transfer time of a message, without the delay."""


@dataclass(frozen=True)
class Answer:
    """`seconds` is the best time found; no placement is faster than `bound`, unless by less than `PRECISION`."""

    seconds: float
    bound: float
    nodes: int

    @property
    def complete(self) -> bool:
        return self.bound >= self.seconds


def search(costs: Costs, known: float, most_nodes: int = 1_000_000) -> Answer:
    """The least step time of a chain without memory limits; `known` is the time of some placement."""
    chain = _Chain(costs)
    estimator, turn, best, nodes = Estimator(costs), count(), known, 0
    nothing = (0.0,) * len(costs.devices)
    heap = [_Partial(0.0, next(turn), Placed((), ()), 0, 0.0, (None,) * len(costs.devices), nothing, nothing, 0.0)]
    while heap:
        partial = heapq.heappop(heap)
        if partial.bound >= best * (1 - PRECISION):
            break
        nodes += 1
        if nodes > most_nodes:
            return Answer(best, partial.bound, nodes)
        if partial.position == costs.workload.size:
            best = min(best, tuned(costs, estimator, partial.placed, estimator(partial.placed))[1])
            continue
        for extended in chain.extended(partial, turn):
            if extended.bound < best * (1 - PRECISION):
                heapq.heappush(heap, extended)
    return Answer(best, best, nodes)


class _Chain:
    """Prices partial placements of one chain."""

    def __init__(self, costs: Costs) -> None:
        work = costs.workload
        assert all(len(costs.workload.crossings([point])) == 1 for point in work.positions), "not a chain"
        self._costs = costs
        self._ends = [int(position) for position in work.positions] + [work.size]
        self._bytes = {point.position: (point.forward_bytes, point.backward_bytes) for point in work.cut_points}
        self._times = [costs.times(device) for device in costs.devices]
        self._rest = [
            min(float(times.both[-1] - times.both[position]) for times in self._times)
            for position in range(work.size + 1)
        ]
        self._flops = [
            float(flops) for flops in work.flops[-1] + work.backward_flops[-1] - work.flops - work.backward_flops
        ]

    def extended(self, partial: _Partial, turn: Iterator[int]) -> Iterator[_Partial]:
        """One more fragment, on every device and up to every position."""
        begin, hosts = partial.position, partial.placed.devices
        for index, device in enumerate(self._costs.devices):
            path, link = partial.path, partial.link
            if hosts:
                if hosts[-1] == index:
                    continue
                there, here = self._links(self._costs.devices[hosts[-1]], device)
                out, back = self._bytes[begin]
                path += there.transfer(out) + here.transfer(back)
                link = max(link, out / there.bytes_per_second, back / here.bytes_per_second)
            head = partial.heads[index]
            heads = _with(partial.heads, index, path if head is None else head)
            for end in self._ends:
                if end <= begin:
                    continue
                times = self._times[index]
                forward = float(times.forward[end] - times.forward[begin])
                backward = float(times.backward[end] - times.backward[begin])
                ahead = _with(partial.ahead, index, partial.ahead[index] + forward)
                behind = _with(partial.back, index, partial.back[index] + backward)
                cuts = (*partial.placed.cuts, begin) if hosts else ()
                whole = path + forward + backward
                bound = max(partial.bound, self._bound(end, whole, heads, ahead, behind, link))
                yield _Partial(bound, next(turn), Placed(cuts, (*hosts, index)), end, whole, heads, ahead, behind, link)

    def _links(self, first: Device, second: Device) -> tuple[Link, Link]:
        network = self._costs.network
        return network.link(first.name, second.name), network.link(second.name, first.name)

    def _bound(
        self,
        end: int,
        path: float,
        heads: Sequence[float | None],
        ahead: Sequence[float],
        back: Sequence[float],
        link: float,
    ) -> float:
        """No placement that begins like this is faster.

        A step holds the way of its first micro-batch there and back, and something that keeps one device or link busy for
        each of the others; a device works M times through its share once it is reached; and all share the rest.
        """
        times = self._costs.micro_batches
        one, other = max(*ahead, link), max(*back, link)
        found = (
            path + self._rest[end] + (times - 1) * (one + other if self._costs.schedule == "gpipe" else max(one, other))
        )
        free = [
            ((path if head is None else head) + times * (first + second), device.flops_per_second)
            for head, first, second, device in zip(heads, ahead, back, self._costs.devices, strict=True)
        ]
        found = max([found, *(at for (at, _), head in zip(free, heads, strict=True) if head is not None)])
        speed = done = 0.0
        level = float("inf")
        for at, rate in sorted(free):
            speed, done = speed + rate, done + rate * at
            level = min(level, (times * self._flops[end] + done) / speed)
        return max(found, level)


def _with(values: tuple[T, ...], index: int, value: T) -> tuple[T, ...]:
    return (*values[:index], value, *values[index + 1 :])
