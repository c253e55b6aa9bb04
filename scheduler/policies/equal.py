"""Baselines that don't look at the network: the same number of ops, or the same compute time, for every device.

Both place fragments on the devices in the order in which these joined, and leave out those that have no room for theirs.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from math import inf

import numpy as np
from numpy.typing import NDArray

from scheduler.estimate import Placed
from scheduler.policies.base import Request

LEFT_OUT_AT_ONCE = 8
"""Of so many devices that lack room, one is left out at a time: a large pool would be tried once for each of them."""


def equal_ops(request: Request) -> Placed:
    """As many ops for each fragment as possible."""
    size = request.costs.workload.size

    def over(devices: Sequence[int]) -> Placed:
        if request.cuts is not None:
            return placed(request.cuts, devices)
        count = fragment_count(request, devices)
        return placed(nearest(request.costs.workload.positions, np.arange(1, count) * size / count), devices)

    return with_room(request, over)


def equal_compute(request: Request) -> Placed:
    """As much time for each fragment as possible: FLOPs in proportion to its device's speed."""
    costs = request.costs

    def over(devices: Sequence[int]) -> Placed:
        if request.cuts is not None:
            return placed(request.cuts, devices)
        count = fragment_count(request, devices)
        hosts = spread(count, len(devices))
        sharing = np.bincount(hosts, minlength=len(devices))
        speeds = np.array([costs.devices[devices[index]].flops_per_second / sharing[index] for index in hosts])
        work = costs.times(costs.devices[devices[0]]).both
        wanted = np.cumsum(speeds)[:-1] / speeds.sum() * work[-1]
        return placed(nearest(costs.workload.positions, np.searchsorted(work, wanted).astype(float)), devices)

    return with_room(request, over)


def with_room(request: Request, over: Callable[[Sequence[int]], Placed]) -> Placed:
    """What `over` gives for all devices, in their order; where it doesn't fit, for those that are left without the ones that
    lack room, the smallest first.

    Where nothing fits, the answer that lacks the fewest bytes. `use_all` leaves nobody out.
    """
    devices = list(range(len(request.costs.devices)))
    best = over(devices)
    tried, least = best, request.estimate(best).missing_bytes
    while least > 0 and not request.use_all:
        memory = request.estimate(tried).memory
        limits = {device: request.costs.devices[device].memory_bytes or inf for device in memory}
        short = sorted((device for device in memory if memory[device] > limits[device]), key=limits.__getitem__)
        out = set(short[: -(-len(short) // LEFT_OUT_AT_ONCE)])
        devices = [device for device in devices if device not in out]
        if not devices:
            break
        tried = over(devices)
        missing = request.estimate(tried).missing_bytes
        if missing < least:
            best, least = tried, missing
    return best


def placed(cuts: tuple[int, ...], devices: Sequence[int]) -> Placed:
    """Fragments with these cuts, in runs over `devices`."""
    return Placed(cuts, tuple(devices[index] for index in spread(len(cuts) + 1, len(devices))))


def fragment_count(request: Request, devices: Sequence[int]) -> int:
    """Fragments asked for, else one for each of `devices` as far as there are legal pieces."""
    return request.fragments or min(len(devices), len(request.costs.workload.cut_points) + 1)


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
