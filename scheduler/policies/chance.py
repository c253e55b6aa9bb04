"""Baseline: random cuts at legal positions, devices in random order."""

from __future__ import annotations

from collections.abc import Sequence
from random import Random

from scheduler.estimate import Placed
from scheduler.policies.base import Request
from scheduler.policies.equal import fragment_count, placed, with_room


def random_cuts(request: Request) -> Placed:
    """The same seed gives the same answer."""

    def over(devices: Sequence[int]) -> Placed:
        generator = Random(request.seed)
        if request.cuts is not None:
            cuts = request.cuts
        else:
            legal = [int(position) for position in request.costs.workload.positions]
            cuts = tuple(sorted(generator.sample(legal, fragment_count(request, devices) - 1)))
        order = list(devices)
        generator.shuffle(order)
        return placed(cuts, order)

    return with_room(request, over)
