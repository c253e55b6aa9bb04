"""Dynamic programme over cut positions: the cheapest way through the devices in a given order, under a bottleneck bound.

For a bound T on what any device or link is busy per micro-batch, it finds the contiguous stages with the shortest path
(compute and transfers, there and back); devices may be left out. Trying several T finds the trade between the path and
the bottleneck that minimises T_path + (M - 1) * T.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from scheduler.cost import Costs

Floats = NDArray[np.float64]
Ints = NDArray[np.int64]
MOST_KEPT = 128
"""Stage tables are kept between bounds for pools of up to so many devices."""
WINDOW = 48
"""In a large pool a stage's predecessor is one of so many devices before it."""


@dataclass(frozen=True, eq=False)
class Positions:
    """Candidate stage borders in the body, from 0 to its size, with the bytes that cross each."""

    at: Ints
    forward: Floats
    backward: Floats


@dataclass(frozen=True, slots=True)
class Stage:
    """A contiguous run `body[first:last]` on one device (its index in the pool)."""

    device: int
    first: int
    last: int


def candidates(costs: Costs, most: int, factors: tuple[float, float]) -> Positions:
    """At most about `most` legal positions: where there are more, the cheapest crossing of each slice of equal work.

    `factors` scale the bytes for a codec forward and back.
    """
    points = costs.workload.cut_points
    at = costs.workload.positions
    forward = np.array([point.forward_bytes for point in points], dtype=np.float64) * factors[0]
    backward = np.array([point.backward_bytes for point in points], dtype=np.float64) * factors[1]
    if len(at) > most:
        work = costs.times(costs.devices[0]).both
        scale = work if work[-1] > 0 else np.arange(len(work), dtype=np.float64)
        slot = np.minimum((scale[at] / scale[-1] * most).astype(np.int64), most - 1)
        centre = np.abs(scale[at] / scale[-1] * most - slot - 0.5)
        order = np.lexsort((centre, forward + backward, slot))
        kept = np.sort(order[np.unique(slot[order], return_index=True)[1]])
        at, forward, backward = at[kept], forward[kept], backward[kept]
    return with_ends(costs, at, forward, backward)


def with_ends(costs: Costs, at: Ints, forward: Floats, backward: Floats) -> Positions:
    """Put the body's start and end around the positions."""
    return Positions(
        np.concatenate(([0], at, [costs.workload.size])).astype(np.int64),
        np.concatenate(([0.0], forward, [0.0])),
        np.concatenate(([0.0], backward, [0.0])),
    )


class Programme:
    """The dynamic programme for one order of the devices."""

    def __init__(self, costs: Costs, order: Sequence[int], positions: Positions, *, depth_by_rank: bool) -> None:
        self._costs = costs
        self._order = tuple(order)
        self._positions = positions
        self._devices = [costs.devices[index] for index in order]
        self._depth_by_rank = depth_by_rank
        self._stages: dict[int, Floats] = {}

    def bounds(self, count: int) -> list[float]:
        """Bottleneck bounds worth trying, ascending, the last one infinite."""
        totals = np.array([self._costs.times(device).both[-1] for device in self._devices])
        if totals.min() <= 0:
            return [float("inf")]
        least = 1 / float((1 / totals).sum())
        return [*(float(bound) for bound in np.geomspace(least, float(totals.min()), count)), float("inf")]

    def solve(self, bound: float, *, use_all: bool = False, stages: int | None = None) -> list[Stage] | None:
        """The stages of the shortest path under `bound`, or None. `stages`: exactly so many; `use_all`: every device."""
        levels = stages or 1
        counted = stages is not None
        count, width = len(self._order), len(self._positions.at)
        cost = np.full((count, levels, width), np.inf)
        came = np.full((count, levels, width), -1, dtype=np.int64)
        begun = np.full((count, levels, width), 0, dtype=np.int64)
        for rank in range(count):
            entry = np.full((levels, width), np.inf)
            if rank == 0 or not use_all:
                entry[0, 0] = 0.0
            source = np.full((levels, width), -1, dtype=np.int64)
            earliest = rank - 1 if use_all else max(0, rank - WINDOW)
            if rank:
                hops = self._hops(range(max(earliest, 0), rank), rank, bound)
                through = cost[max(earliest, 0) : rank] + hops[:, None, :]
                nearest = through.argmin(axis=0)
                value = np.take_along_axis(through, nearest[None], axis=0)[0]
                nearest += max(earliest, 0)
                if counted:
                    value, nearest = np.roll(value, 1, axis=0), np.roll(nearest, 1, axis=0)
                    value[0] = np.inf
                better = value < entry
                entry = np.where(better, value, entry)
                source = np.where(better, nearest, source)
            stage = self._stage_seconds(rank)
            stage = np.where(stage <= bound, stage, np.inf)
            for level in range(levels):
                total = entry[level][:, None] + stage
                begun[rank, level] = total.argmin(axis=0)
                cost[rank, level] = total[begun[rank, level], np.arange(width)]
                came[rank, level] = source[level][begun[rank, level]]
        ends = cost[:, levels - 1, width - 1]
        last = count - 1 if use_all else int(ends.argmin())
        if not np.isfinite(ends[last]):
            return None
        return self._trace(last, levels - 1, counted, came, begun)

    def _trace(self, rank: int, level: int, counted: bool, came: Ints, begun: Ints) -> list[Stage]:
        found, end, at = [], len(self._positions.at) - 1, self._positions.at
        while rank >= 0:
            start = int(begun[rank, level, end])
            found.append(Stage(self._order[rank], int(at[start]), int(at[end])))
            rank, end, level = int(came[rank, level, end]), start, level - counted
        return found[::-1]

    def _hops(self, sources: range, target: int, bound: float) -> Floats:
        """Seconds there and back at each position from each source; infinite where a link would be busier than `bound`."""
        network, name = self._costs.network, self._devices[target].name
        out = [network.link(self._devices[source].name, name) for source in sources]
        back = [network.link(name, self._devices[source].name) for source in sources]
        delay = np.array([first.seconds + second.seconds for first, second in zip(out, back, strict=True)])
        busy_out = self._positions.forward[None] / np.array([link.bytes_per_second for link in out])[:, None]
        busy_back = self._positions.backward[None] / np.array([link.bytes_per_second for link in back])[:, None]
        seconds: Floats = delay[:, None] + busy_out + busy_back
        seconds[np.maximum(busy_out, busy_back) > bound] = np.inf
        return seconds

    def _stage_seconds(self, rank: int) -> Floats:
        """Seconds of the stage between each two positions on a device; infinite where empty or too large for its memory."""
        found = self._stages.get(rank)
        if found is not None:
            return found
        device, at = self._devices[rank], self._positions.at
        both = self._costs.times(device).both[at]
        seconds: Floats = both[None, :] - both[:, None] + 2 * device.seconds_per_task
        seconds[at[None, :] <= at[:, None]] = np.inf
        if device.memory_bytes is not None:
            seconds[self._memory(rank) > device.memory_bytes] = np.inf
        if len(self._order) <= MOST_KEPT:
            self._stages[rank] = seconds
        return seconds

    def _memory(self, rank: int) -> Floats:
        costs, at = self._costs, self._positions.at
        work = costs.workload
        depth = costs.micro_batches
        if costs.schedule == "1f1b":
            depth = min(depth, len(self._order) - rank) if self._depth_by_rank else 1
        state = costs.cumulative_state[at]
        saved = work.saved[at]
        span = saved[None, :] - saved[:, None]
        kept = depth * (self._positions.forward[:, None] + (0 if costs.recompute else span))
        memory: Floats = state[None, :] - state[:, None] + kept + (span if costs.recompute else 0)
        return memory
