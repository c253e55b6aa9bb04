"""Beam search over partial placements: it may come back to a device, which the dynamic programme can not.

Under 1F1B a fast device that takes a piece near the start and another near the end is often busy where it would wait. A
partial placement is ranked by a bound on the step time of all that it can become, the largest of:

    the way of one micro-batch through what is placed and the rest, plus M - 1 times the busiest device or link;
    for each device, the way to it plus M times its work;
    the time at which the devices, each from when it is reached and free, have shared the rest among them.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, fields

import numpy as np
from numpy.typing import NDArray

from scheduler.cost import Costs
from scheduler.policies.partition import Positions, Stage

Floats = NDArray[np.float64]
Ints = NDArray[np.int64]
ALIKE = 4
"""Of the placements through the same devices in the same order, so many are answered."""


@dataclass(slots=True)
class _Partials:
    """Partial placements that end at the same position; the first axis of each array counts them."""

    bound: Floats
    path: Floats
    """Seconds of one micro-batch through what is placed, there and back."""
    link: Floats
    """Seconds for which one micro-batch keeps the busiest link busy, one way."""
    reached: Floats
    """By device: `path` before its first stage; infinite without one."""
    ahead: Floats
    """By device: seconds of its stages forward."""
    back: Floats
    device: Ints
    """Of the last stage."""
    start: Ints
    """Where the last stage begins,"""
    parent: Ints
    """... and which of the partial placements that end there it extends."""

    def picked(self, rows: Ints) -> _Partials:
        return _Partials(*(getattr(self, column.name)[rows] for column in fields(self)))


class Beam:
    """The search for one request on the devices `pool` (indices)."""

    def __init__(self, costs: Costs, pool: Sequence[int], positions: Positions, width: int) -> None:
        self._costs, self._pool, self._positions, self._width = costs, pool, positions, width
        devices = [costs.devices[index] for index in pool]
        at = positions.at
        self._forward = np.array([costs.times(device).forward[at] for device in devices])
        self._backward = np.array([costs.times(device).backward[at] for device in devices])
        self._task = np.array([device.seconds_per_task for device in devices])
        both = self._forward + self._backward
        self._rest = (both[:, -1:] - both).min(axis=0)
        work = (costs.workload.flops + costs.workload.backward_flops)[at]
        self._left = work[-1] - work
        self._speed = np.array([device.flops_per_second for device in devices])
        links = [[costs.network.link(a.name, b.name) for b in devices] for a in devices]
        self._delay = np.array([[link.seconds for link in row] for row in links])
        self._pace = np.array([[1 / link.bytes_per_second for link in row] for row in links])

    def best(self, count: int) -> list[list[Stage]]:
        """The most promising placements of the whole body, the best first, at most `ALIKE` through the same devices."""
        levels = self._levels()
        ways: Counter[tuple[int, ...]] = Counter()
        found = []
        for row in range(len(levels[-1].bound)):
            stages = self._trace(levels, row)
            way = tuple(stage.device for stage in stages)
            ways[way] += 1
            if ways[way] <= ALIKE:
                found.append(stages)
            if len(found) == count:
                break
        return found

    def _levels(self) -> list[_Partials]:
        """For every position the partial placements that end there, the best first."""
        count, ends = len(self._pool), len(self._positions.at)
        zero, none = np.zeros((1, count)), np.full(1, -1)
        levels = [_Partials(np.zeros(1), np.zeros(1), np.zeros(1), zero + np.inf, zero, zero, none, none, none)]
        waiting: list[list[_Partials]] = [[] for _ in range(ends)]
        for start in range(ends - 1):
            for offset, extended in enumerate(self._extended(levels[start], start)):
                waiting[start + 1 + offset].append(extended)
            arrived = waiting[start + 1]
            merged = _Partials(
                *(np.concatenate([getattr(part, column.name) for part in arrived]) for column in fields(_Partials))
            )
            levels.append(merged.picked(np.argsort(merged.bound, kind="stable")[: self._width]))
        return levels

    def _extended(self, partials: _Partials, start: int) -> list[_Partials]:
        """One more stage from `start` on, on every other device, for each later position in turn."""
        rows, count = len(partials.bound), len(self._pool)
        last, device = partials.device[:, None], np.arange(count)[None]
        there = self._positions.forward[start] * self._pace[last, device]
        here = self._positions.backward[start] * self._pace[device, last]
        entry = partials.path[:, None] + there + here + (self._delay[last, device] + self._delay[device, last])
        link = np.maximum(partials.link[:, None], np.maximum(there, here))
        if start == 0:
            entry, link = np.zeros((rows, count)), np.zeros((rows, count))
        row, chosen = np.nonzero(last != device)
        entry, link = entry[row, chosen], link[row, chosen]
        reached = partials.reached[row]
        one = np.arange(len(row))
        reached[one, chosen] = np.minimum(reached[one, chosen], entry)
        found = []
        for end in range(start + 1, len(self._positions.at)):
            forward = (self._forward[:, end] - self._forward[:, start] + self._task)[chosen]
            backward = (self._backward[:, end] - self._backward[:, start] + self._task)[chosen]
            ahead, back = partials.ahead[row], partials.back[row]
            ahead[one, chosen] += forward
            back[one, chosen] += backward
            path = entry + forward + backward
            bound = self._bounds(end, path, link, reached, ahead, back)
            found.append(
                _Partials(bound, path, link, reached, ahead, back, chosen, np.full(len(row), start), row).picked(
                    np.argsort(bound, kind="stable")[: self._width]
                )
            )
        return found

    def _bounds(self, end: int, path: Floats, link: Floats, reached: Floats, ahead: Floats, back: Floats) -> Floats:
        times = self._costs.micro_batches
        one, other = np.maximum(ahead.max(axis=1), link), np.maximum(back.max(axis=1), link)
        busiest = one + other if self._costs.schedule == "gpipe" else np.maximum(one, other)
        used = np.isfinite(reached)
        free = np.where(used, reached, path[:, None]) + times * (ahead + back)
        # What is left fills up the devices like water over steps of unequal height. Over the k lowest steps alone it would
        # stand too high where a higher step should take part, or where one stands out of it: the least level is the right one.
        order = np.argsort(free, axis=1)
        speed = self._speed[order]
        filled = times * self._left[end] + np.cumsum(speed * np.take_along_axis(free, order, axis=1), axis=1)
        level = (filled / np.cumsum(speed, axis=1)).min(axis=1)
        way = path + self._rest[end] + (times - 1) * busiest
        return np.asarray(np.maximum(np.maximum(way, level), np.where(used, free, 0.0).max(axis=1)))

    def _trace(self, levels: Sequence[_Partials], row: int) -> list[Stage]:
        end, at, found = len(levels) - 1, self._positions.at, []
        while end > 0:
            level = levels[end]
            start = int(level.start[row])
            found.append(Stage(self._pool[level.device[row]], int(at[start]), int(at[end])))
            end, row = start, int(level.parent[row])
        return found[::-1]
