"""Groups of so many devices that may do a job's step the fastest, where a job asks for fewer than there are.

A group is grown from each device by what a step would take with it: its share of the work, and the messages over the best
link to those that are in already. This is a guess that costs little; who wants to know plans for the best of them.
"""

from __future__ import annotations

from itertools import combinations, zip_longest
from math import comb, inf

import numpy as np

from scheduler.cost import Costs, Floats
from scheduler.policies.fences import transfer_seconds

Group = tuple[int, ...]
"""Indices of devices, ascending."""
MOST_GROUPS, FEWEST_GROUPS, DEVICES_IN_ALL = 8, 2, 48
"""To plan for many devices takes long: as many groups as have so many devices in all, within these bounds."""
MESSAGES = (1.0, 0.25)
"""Of the bytes that cross as they are: a codec may leave little of them, and then speed counts for more."""
MOST_GROWN = 20_000_000
"""Seeds times devices times steps of growing: of a large pool not every device is a seed."""


def groups(costs: Costs, count: int) -> list[Group]:
    """Promising groups of `count` devices: those that joined first, then the others, the best by the guess first."""
    devices = len(costs.devices)
    if count >= devices:
        return [tuple(range(devices))]
    most = max(FEWEST_GROUPS, min(MOST_GROUPS, DEVICES_IN_ALL // count))
    if comb(devices, count) <= most:
        return list(combinations(range(devices), count))
    points = costs.workload.cut_points
    crossing = float(np.quantile([p.forward_bytes + p.backward_bytes for p in points], 0.25)) / 2 if points else 0.0
    guesses = [_Guess(costs, count, crossing * share) for share in MESSAGES]
    # In turn, as nobody knows yet what the codec will leave of the messages.
    turns = zip_longest(*(guess.best(most) for guess in guesses))
    found = dict.fromkeys(group for turn in turns for group in turn if group is not None)
    first = tuple(range(count))
    return [first, *(group for group in found if group != first)][:most]


def roomiest(costs: Costs, count: int) -> Group:
    """The devices with the most memory."""

    def room(index: int) -> float:
        limit = costs.devices[index].memory_bytes
        return inf if limit is None else float(limit)

    return tuple(sorted(sorted(range(len(costs.devices)), key=lambda index: -room(index))[:count]))


class _Guess:
    """Groups by a guess at the step time, when so many bytes cross a link for each micro-batch and direction."""

    def __init__(self, costs: Costs, count: int, crossing: float) -> None:
        devices, micro_batches = costs.devices, costs.micro_batches
        self._devices, self._count = devices, count
        self._speeds = np.array([device.flops_per_second for device in devices])
        alone = costs.step_seconds(devices[0], 0, costs.workload.size)
        # With the filling of the pipeline.
        self._work = alone * float(self._speeds[0]) * (micro_batches + count - 1) / micro_batches
        self._trips = transfer_seconds(devices, costs.network, crossing)
        self._loads = micro_batches * (self._trips - transfer_seconds(devices, costs.network, 0.0)) / 2

    def best(self, most: int) -> list[Group]:
        """The best groups, of those that can't be told apart only the one that joined first."""
        found: dict[tuple[object, ...], Group] = {}
        for seconds, group in sorted(set(self._grown())):
            found.setdefault((seconds, *self._looks(group)), group)
            if len(found) >= most:
                break
        return list(found.values())

    def _looks(self, group: Group) -> tuple[object, ...]:
        hosts = sorted((self._devices[i].flops_per_second, self._devices[i].memory_bytes or 0) for i in group)
        return tuple(hosts), np.sort(self._trips[np.ix_(group, group)], axis=None).round(9).tobytes()

    def _grown(self) -> list[tuple[float, Group]]:
        """From each seed, with the guess."""
        total, count = len(self._devices), self._count
        stride = -(-total * total * count // MOST_GROWN)
        seeds = np.arange(0, total, stride)
        rows = np.arange(len(seeds))
        members = [seeds]
        taken = np.zeros((len(seeds), total), dtype=bool)
        taken[rows, seeds] = True
        near, load = self._trips[seeds], self._loads[seeds]
        speed, trips, busiest = self._speeds[seeds], np.zeros(len(seeds)), np.zeros(len(seeds))
        seconds = np.full(len(seeds), self._work) / speed
        for size in range(1, count):
            # As if the rest were like those chosen so far; or links would count for nothing at first.
            computing = self._work / ((speed[:, None] + self._speeds) * count / (size + 1))
            waiting = (trips[:, None] + near) * (count - 1) / size
            guess: Floats = np.maximum(computing, np.maximum(busiest[:, None], load)) + waiting
            chosen = np.where(taken, inf, guess).argmin(axis=1)
            seconds = guess[rows, chosen]
            speed, trips = speed + self._speeds[chosen], trips + near[rows, chosen]
            busiest = np.maximum(busiest, load[rows, chosen])
            taken[rows, chosen] = True
            closer = self._trips[chosen] < near
            near, load = np.where(closer, self._trips[chosen], near), np.where(closer, self._loads[chosen], load)
            members.append(chosen)
        found = np.sort(np.stack(members, axis=1), axis=1)
        return [(_rounded(time), tuple(map(int, group))) for time, group in zip(seconds, found, strict=True)]


def _rounded(seconds: float) -> float:
    return float(f"{seconds:.9g}")
