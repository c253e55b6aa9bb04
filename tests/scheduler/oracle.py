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

import numpy as np

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
    return min(tuned(costs, estimator, placed, estimator(placed))[-1] for placed in found)


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
    weights: tuple[float, ...]
    """By device: seconds of gradients of weights that can wait, which are in `back` too, but not in `path`."""
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
    none = (0.0,) * len(costs.devices)
    heap = [_Partial(0.0, next(turn), Placed((), ()), 0, 0.0, (None,) * len(costs.devices), none, none, none, 0.0)]
    while heap:
        partial = heapq.heappop(heap)
        if partial.bound >= best * (1 - PRECISION):
            break
        nodes += 1
        if nodes > most_nodes:
            return Answer(best, partial.bound, nodes)
        if partial.position == costs.workload.size:
            best = min(best, tuned(costs, estimator, partial.placed, estimator(partial.placed))[-1])
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
            min(
                float(prompt[-1] - prompt[position]) for prompt in (times.both - times.weights for times in self._times)
            )
            for position in range(work.size + 1)
        ]
        both = work.flops + work.backward_flops
        waiting = np.concatenate(([0.0], np.cumsum(np.diff(work.backward_flops) * work.weights_share)))
        self._flops = (both[-1] - both).tolist()
        self._prompt_flops = (both[-1] - waiting[-1] - both + waiting).tolist()

    def extended(self, partial: _Partial, turn: Iterator[int]) -> Iterator[_Partial]:
        """One more fragment, on every device and up to every position."""
        begin, hosts = partial.position, partial.placed.devices
        for index, device in enumerate(self._costs.devices):
            path, link = partial.path, partial.link
            if hosts:
                if hosts[-1] == index:
                    continue
                there, here = self._links(self._costs.devices[hosts[-1]], device)
                out, returned = self._bytes[begin]
                path += there.transfer(out) + here.transfer(returned)
                link = max(link, out / there.bytes_per_second, returned / here.bytes_per_second)
            head = partial.heads[index]
            heads = _with(partial.heads, index, path if head is None else head)
            for end in self._ends:
                if end <= begin:
                    continue
                times = self._times[index]
                forward = float(times.forward[end] - times.forward[begin])
                backward = float(times.backward[end] - times.backward[begin])
                ahead = _with(partial.ahead, index, partial.ahead[index] + forward)
                back = _with(partial.back, index, partial.back[index] + backward)
                waiting = float(times.weights[end] - times.weights[begin]) if hosts else 0.0
                weights = _with(partial.weights, index, partial.weights[index] + waiting)
                cuts = (*partial.placed.cuts, begin) if hosts else ()
                whole = path + forward + backward - waiting
                bound = max(partial.bound, self._bound(end, whole, heads, ahead, back, weights, link))
                placed = Placed(cuts, (*hosts, index))
                yield _Partial(bound, next(turn), placed, end, whole, heads, ahead, back, weights, link)

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
        weights: Sequence[float],
        link: float,
    ) -> float:
        """No placement that begins like this is faster.

        A step holds the way of its first micro-batch there and back, and something that keeps one device or link busy for
        each of the others; a device works M times through its share once it is reached; and all share the rest. Gradients of
        weights that wait are in none of these, but they keep their device from beginning the next step.
        """
        times = self._costs.micro_batches
        prompt = [first - second for first, second in zip(back, weights, strict=True)]
        one, other = max(*ahead, link), max(*prompt, link)
        found = (
            path + self._rest[end] + (times - 1) * (one + other if self._costs.schedule == "gpipe" else max(one, other))
        )
        rates = [device.flops_per_second for device in self._costs.devices]
        working = [times * (first + second) for first, second in zip(ahead, back, strict=True)]
        answering = [
            (path if head is None else head) + times * (first + second)
            for head, first, second in zip(heads, ahead, prompt, strict=True)
        ]
        found = max([found, *working, *(at for at, head in zip(answering, heads, strict=True) if head is not None)])
        return max(
            found,
            _level(working, rates, times * self._flops[end]),
            _level(answering, rates, times * self._prompt_flops[end]),
        )


def _level(free: Sequence[float], rates: Sequence[float], flops: float) -> float:
    """When `flops` are done by devices of these rates that are free from then on."""
    speed = done = 0.0
    level = float("inf")
    for at, rate in sorted(zip(free, rates, strict=True)):
        speed, done = speed + rate, done + rate * at
        level = min(level, (flops + done) / speed)
    return level


def _with(values: tuple[T, ...], index: int, value: T) -> tuple[T, ...]:
    return (*values[:index], value, *values[index + 1 :])
