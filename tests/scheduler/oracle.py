"""The best placement of a small case, by trying all: every choice of cuts, every choice of distinct devices."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from itertools import combinations, permutations

from scheduler.cost import Costs
from scheduler.estimate import Estimator, Placed
from scheduler.simulator import play


def placements(legal: Sequence[int], devices: int) -> Iterator[Placed]:
    for fragments in range(1, min(devices, len(legal) + 1) + 1):
        for cuts in combinations(legal, fragments - 1):
            for hosts in permutations(range(devices), fragments):
                yield Placed(cuts, hosts)


def simulated(costs: Costs, placed: Placed, in_flight: Sequence[int] | None = None) -> float:
    """Simulated step time, with the estimator's micro-batches in flight unless others are given."""
    estimator = Estimator(costs)
    return play(costs, estimator, placed, in_flight or estimator(placed).in_flight).step_seconds


def best(costs: Costs) -> float:
    """The least simulated step time of all placements that fit."""
    estimator = Estimator(costs)
    legal = [int(position) for position in costs.workload.positions]
    fitting = (p for p in placements(legal, len(costs.devices)) if estimator(p).missing_bytes == 0)
    return min(simulated(costs, placed, estimator(placed).in_flight) for placed in fitting)
