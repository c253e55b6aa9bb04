"""Baseline: random cuts at legal positions, devices in random order."""

from __future__ import annotations

from random import Random

from scheduler.estimate import Placed
from scheduler.policies.base import Request
from scheduler.policies.equal import fragment_count, spread


def random_cuts(request: Request) -> Placed:
    """The same seed gives the same answer."""
    generator = Random(request.seed)
    if request.cuts is not None:
        cuts = request.cuts
    else:
        legal = [int(position) for position in request.costs.workload.positions]
        cuts = tuple(sorted(generator.sample(legal, fragment_count(request) - 1)))
    order = list(range(len(request.costs.devices)))
    generator.shuffle(order)
    return Placed(cuts, tuple(order[index] for index in spread(len(cuts) + 1, len(order))))
