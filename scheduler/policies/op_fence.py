"""OP-Fence: fences by Louvain, an order of fences and devices, a dynamic programme over cuts, then local search."""

from __future__ import annotations

from bisect import bisect_left, bisect_right
from collections.abc import Iterable, Sequence

import numpy as np

from scheduler.devices import Device
from scheduler.estimate import Placed
from scheduler.policies.base import Request
from scheduler.policies.fences import fences, orders, transfer_seconds
from scheduler.policies.partition import Positions, Programme, Stage, candidates, with_ends
from scheduler.policies.refine import Score, refine

SMALL_POOL = 16
LARGE_POOL = 128
"""From here on the search is narrowed: fewer orders, bounds and positions."""
SIMULATED_TASKS = 1200
"""The search may simulate about so many forwards; the estimate alone decides about longer pipelines."""
MOST_PLAYS = 40
MOST_STAGES = 96
"""A pipeline over more devices than this gains nothing: only the best ones of a large pool are considered."""


def op_fence(request: Request) -> Placed:
    """Cuts where few bytes cross slow links, stages in proportion to speed, within memory."""
    pool = _pool(request)
    search = _Search(request, pool)
    starts = search.starts()
    starts = sorted(dict.fromkeys(starts), key=lambda placed: request.estimate(placed).score)
    climbed = dict.fromkeys(search.refined(placed) for placed in starts[: search.climbs])
    ranked = sorted((*climbed, *starts[:2]), key=lambda placed: request.estimate(placed).score)
    plays = SIMULATED_TASKS // (request.costs.micro_batches * len(ranked[0].devices))
    if plays < len(ranked):
        return ranked[0]
    best = min(dict.fromkeys(ranked), key=request.simulated)
    return search.climb(best, request.simulated, min(plays, MOST_PLAYS))


def _pool(request: Request) -> list[int]:
    """Indices of the devices to consider: all, or in a large pool the most useful ones."""
    devices = request.costs.devices
    most = request.fragments or (len(request.cuts) + 1 if request.cuts is not None else MOST_STAGES)
    most = max(most, MOST_STAGES)
    if request.use_all or len(devices) <= most:
        return list(range(len(devices)))
    # A fence is worth its devices' speed; take whole fences, the strongest first, and of the last one the fastest.
    seconds = transfer_seconds(devices, request.costs.network, _typical_bytes(request))
    groups = fences(seconds)
    groups.sort(key=lambda group: -sum(devices[index].flops_per_second for index in group))
    ranked = [index for group in groups for index in sorted(group, key=lambda i: -devices[i].flops_per_second)]
    return sorted(ranked[:most])


def _typical_bytes(request: Request) -> float:
    """A cheap crossing: the lower quartile over legal cuts."""
    points = request.costs.workload.cut_points
    return float(np.quantile([point.forward_bytes for point in points], 0.25)) if points else 0.0


class _Search:
    """One request's search over orders, bounds and positions."""

    def __init__(self, request: Request, pool: Sequence[int]) -> None:
        self.request = request
        self.pool = list(pool)
        self.costs = request.costs
        self.legal = [int(position) for position in self.costs.workload.positions]
        count = len(self.pool)
        self.climbs = 3 if count <= SMALL_POOL else 1
        self.budget = 400 if count <= SMALL_POOL else (200 if count <= LARGE_POOL else 40)

    def starts(self) -> Iterable[Placed]:
        """Placements to climb from: the programme's answers for every order and bound."""
        request, count = self.request, len(self.pool)
        devices: list[Device] = [self.costs.devices[index] for index in self.pool]
        seconds = transfer_seconds(devices, self.costs.network, _typical_bytes(request))
        most_orders, bounds = (12, 12) if count <= SMALL_POOL else (4, 8)
        if count > LARGE_POOL:
            most_orders, bounds = 1, 4
        found: list[Placed] = []
        positions = self._positions()
        pieces = len(positions.at) - 1
        wanted = request.fragments or (pieces if request.cuts is not None else None)
        for order in orders(devices, seconds, fences(seconds), most_orders):
            ranked = [self.pool[index] for index in order]
            use_all = request.use_all and len(ranked) <= pieces
            stages = None
            if wanted is not None and request.cuts is None and not use_all and wanted < len(ranked):
                stages = wanted
            if request.use_all and not use_all:
                ranked, use_all = self._fastest(ranked, pieces), True
            for by_rank in (True, False):
                programme = Programme(self.costs, ranked, positions, depth_by_rank=by_rank)
                for bound in programme.bounds(bounds):
                    answer = programme.solve(bound, use_all=use_all, stages=stages)
                    if answer is not None:
                        found.append(self._placed(answer))
                if self.costs.schedule == "gpipe":
                    break
        if request.fragments is None and request.cuts is None:
            best = sorted(dict.fromkeys(found), key=lambda placed: request.estimate(placed).score)[:2]
            found.extend(back for placed in best for back in self._returning(placed))
        return found or [self._fallback()]

    def _positions(self) -> Positions:
        factors = self.request.factors
        if self.request.cuts is not None:
            chosen = {point.position: point for point in self.costs.workload.cut_points}
            points = [chosen[position] for position in self.request.cuts]
            return with_ends(
                self.costs,
                np.array(self.request.cuts, dtype=np.int64),
                np.array([point.forward_bytes * factors[0] for point in points], dtype=np.float64),
                np.array([point.backward_bytes * factors[1] for point in points], dtype=np.float64),
            )
        most = 96 if len(self.pool) <= SMALL_POOL else 128
        most = max(most, 2 * (self.request.fragments or 0), 2 * len(self.pool) if self.request.use_all else 0)
        return candidates(self.costs, most, factors)

    def _fastest(self, ranked: Sequence[int], count: int) -> list[int]:
        best = set(sorted(ranked, key=lambda index: -self.costs.devices[index].flops_per_second)[:count])
        return [index for index in ranked if index in best]

    def _fallback(self) -> Placed:
        """No contiguous stages fit in memory: the roomiest devices, as a start for the search and for the error."""
        wanted = self.request.fragments or min(len(self.pool), len(self.legal) + 1)
        size = self.costs.workload.size
        if self.request.cuts is not None:
            runs = len(self.request.cuts) + 1
            used = min(runs, len(self.pool))
            return Placed(self.request.cuts, tuple(self.pool[index * used // runs] for index in range(runs)))
        used = min(wanted, len(self.pool))
        stages = [Stage(self.pool[0], 0, size)]
        for index in range(1, used):
            stages = _split(stages, self.legal, self.costs.times(self.costs.devices[0]).both)
            stages = [Stage(self.pool[min(i, index)], stage.first, stage.last) for i, stage in enumerate(stages)]
        return self._placed(stages)

    def _placed(self, stages: list[Stage]) -> Placed:
        """Cut the stages further where cuts are given or more fragments than stages are wanted."""
        request = self.request
        if request.cuts is not None:
            starts = (0, *request.cuts)
            return Placed(
                request.cuts,
                tuple(next(s.device for s in stages if s.first <= start < s.last) for start in starts),
            )
        while request.fragments is not None and len(stages) < request.fragments:
            stages = _split(stages, self.legal, self.costs.times(self.costs.devices[0]).both)
        return Placed(tuple(stage.first for stage in stages[1:]), tuple(stage.device for stage in stages))

    def _returning(self, placed: Placed) -> Iterable[Placed]:
        """For tied parameters: come back to the home's worker for the last use, instead of shipping the parameter."""
        bounds = (0, *placed.cuts, self.costs.workload.size)
        for _, users in self.costs.workload.shared_parameters:
            home = placed.devices[bisect_right(bounds, min(users)) - 1]
            last = bisect_right(bounds, max(users)) - 1
            if placed.devices[last] == home:
                continue
            near = bisect_right(self.legal, max(users))
            for position in self.legal[max(0, near - 4) : near]:
                keep = bisect_left(placed.cuts, position)
                yield Placed((*placed.cuts[:keep], position), (*placed.devices[: keep + 1], home))

    def refined(self, placed: Placed) -> Placed:
        return self.climb(placed, lambda candidate: self.request.estimate(candidate).score, self.budget)

    def climb(self, placed: Placed, score: Score, budget: int) -> Placed:
        request = self.request
        return refine(
            placed,
            score,
            legal=self.legal,
            devices=len(self.costs.devices) if len(self.pool) <= SMALL_POOL else 0,
            budget=budget,
            keep_cuts=request.cuts is not None,
            keep_count=request.fragments is not None,
            use_all=request.use_all,
        )


def _split(stages: list[Stage], legal: Sequence[int], work: np.ndarray) -> list[Stage]:
    """Cut the stage with the most work that has a legal position inside, near the middle of its work."""
    best: tuple[float, int, int] | None = None
    for index, stage in enumerate(stages):
        low, high = bisect_right(legal, stage.first), bisect_left(legal, stage.last)
        if low < high and (best is None or work[stage.last] - work[stage.first] > best[0]):
            middle = (work[stage.first] + work[stage.last]) / 2
            position = min(legal[low:high], key=lambda at: abs(work[at] - middle))
            best = (float(work[stage.last] - work[stage.first]), index, position)
    if best is None:
        return stages
    _, index, position = best
    stage = stages[index]
    parts = [Stage(stage.device, stage.first, position), Stage(stage.device, position, stage.last)]
    return [*stages[:index], *parts, *stages[index + 1 :]]
