"""Baselines that don't look at the network: the same number of ops, or the same compute time, for every device.

Both place fragments on the devices in the order in which these joined.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from scheduler.estimate import Placed
from scheduler.policies.base import Request


def equal_ops(request: Request) -> Placed:
    """As many ops for each fragment as possible."""
    size = request.costs.workload.size
    if request.cuts is not None:
        return Placed(request.cuts, spread(len(request.cuts) + 1, len(request.costs.devices)))
    count = fragment_count(request)
    cuts = nearest(request.costs.workload.positions, np.arange(1, count) * size / count)
    return Placed(cuts, spread(count, len(request.costs.devices)))


def equal_compute(request: Request) -> Placed:
    """As much time for each fragment as possible: FLOPs in proportion to its device's speed."""
    costs = request.costs
    if request.cuts is not None:
        return Placed(request.cuts, spread(len(request.cuts) + 1, len(costs.devices)))
    count = fragment_count(request)
    devices = spread(count, len(costs.devices))
    sharing = np.bincount(devices, minlength=len(costs.devices))
    speeds = np.array([costs.devices[index].flops_per_second / sharing[index] for index in devices])
    work = costs.times(costs.devices[0]).both
    wanted = np.cumsum(speeds)[:-1] / speeds.sum() * work[-1]
    return Placed(nearest(costs.workload.positions, np.searchsorted(work, wanted).astype(float)), devices)


def fragment_count(request: Request) -> int:
    """Fragments asked for, else one for each device as far as there are legal pieces."""
    return request.fragments or min(len(request.costs.devices), len(request.costs.workload.cut_points) + 1)


def spread(fragments: int, devices: int) -> tuple[int, ...]:
    """Contiguous runs of fragments over the devices in order, as even as possible."""
    used = min(fragments, devices)
    return tuple(index * used // fragments for index in range(fragments))


def nearest(legal: NDArray[np.int64], wanted: NDArray[np.float64]) -> tuple[int, ...]:
    """Legal positions, ascending and distinct, each near the wanted one. `len(wanted) <= len(legal)`."""
    chosen: list[int] = []
    for number, position in enumerate(wanted):
        first = chosen[-1] + 1 if chosen else 0
        last = len(legal) - (len(wanted) - number)
        best = int(np.abs(legal[first : last + 1] - position).argmin()) + first
        chosen.append(best)
    return tuple(int(legal[index]) for index in chosen)
