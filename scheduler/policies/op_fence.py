"""OP-Fence: fences by Louvain, an order of fences and devices, a dynamic programme over cuts, then local search.

In a small pool a beam search adds placements that come back to a device, which the programme can not make.
"""

from __future__ import annotations

from bisect import bisect_left, bisect_right
from collections.abc import Iterable, Sequence
from dataclasses import replace
from itertools import accumulate

import numpy as np

from scheduler.devices import Device
from scheduler.estimate import Floats, Placed
from scheduler.policies.base import Request
from scheduler.policies.beam import Beam
from scheduler.policies.equal import equal_compute, equal_ops, nearest
from scheduler.policies.fences import fences, orders, transfer_seconds
from scheduler.policies.partition import Positions, Programme, Stage, candidates, with_ends
from scheduler.policies.refine import WAYS_OF_INSERTING, Score, insertions, refine

SMALL_POOL = 16
LARGE_POOL = 128
"""From here on the search is narrowed: fewer orders, bounds and positions."""
MOST_COMPARED = 4096
"""The best by the estimate are simulated up to so many forwards in all."""
SIMULATED_TASKS = 1200
"""The search may simulate about so many forwards; the estimate alone decides about longer pipelines."""
MOST_PLAYS = 24
LEAST_GAIN = 0.003
"""What a further fragment or message must save of the step to be worth having."""
LEAST_GAIN_OF_RETURNING = 0.03
"""What coming back to a device must save: more messages, and more that depends on the prediction being right."""
BEAM_POOL, BEAM_POSITIONS, BEAM_WIDTH, BEAM_ANSWERS = 8, 14, 60, 16
"""The beam search's limits: it is for pools of up to so many devices."""
MOST_RETURNING = 3
"""Of its answers, so many are simulated in full."""
GATHERED = 2
"""Placements on the devices that are of use that are completed with the others, where all have to take part."""
MOST_INSERTIONS = 4000
"""... and so many ways to do so are estimated for each of those placements; of a long model not every cut position is tried."""
MOST_POSITIONS = 400
"""Beyond so many candidate pieces the work is shared out in proportion to speed instead of by dynamic programme."""
MOST_STAGES = 96
"""A pipeline over more devices than this gains nothing: only the best ones of a large pool are considered."""


def op_fence(request: Request) -> Placed:
    """Cuts where few bytes cross slow links, stages in proportion to speed, within memory."""
    pool = _pool(request)
    search = _Search(request, pool)
    starts = search.starts()
    starts = sorted(dict.fromkeys(starts), key=lambda placed: request.estimate(placed).score)
    climbed = dict.fromkeys(search.refined(placed) for placed in (*starts[: search.climbs], *search.gathered()))
    # The baselines take part, so that the answer is never worse than theirs.
    others = [baseline(request) for baseline in (equal_compute, equal_ops)]
    ranked = list(dict.fromkeys((*climbed, *starts[:2], *others)))
    ranked.sort(key=lambda placed: request.estimate(placed).score)
    micro_batches = request.costs.micro_batches
    plays = SIMULATED_TASKS // (micro_batches * len(ranked[0].devices))
    tasks, small = list(accumulate(micro_batches * len(placed.devices) for placed in ranked)), plays >= len(ranked)
    # The estimate knows nothing of waiting for one another; the simulation decides between the best, as far as it is cheap.
    shortlist = [p for p, until in zip(ranked, tasks, strict=True) if until <= MOST_COMPARED] or ranked[:1]
    if small:
        shortlist += [placed for placed in search.returning() if placed not in shortlist]
    best = min(shortlist, key=_wary(request)) if len(shortlist) > 1 else ranked[0]
    if small:
        best = search.climb(best, request.simulated, min(plays, MOST_PLAYS), LEAST_GAIN)
    return _in_order(request, best if request.cuts is not None or request.fragments is not None else _joined(best))


def _wary(request: Request) -> Score:
    """The simulated time, with a surcharge for placements that come back to a device."""

    def score(placed: Placed) -> tuple[float, float]:
        missing, seconds = request.simulated(placed)
        comes_back = len(_joined(placed).devices) > len(set(placed.devices))
        return missing, seconds * (1 + LEAST_GAIN_OF_RETURNING * comes_back)

    return score


def _joined(placed: Placed) -> Placed:
    """Neighbouring fragments on one device are one fragment."""
    kept = [index for index, device in enumerate(placed.devices[1:]) if device != placed.devices[index]]
    return Placed(
        tuple(placed.cuts[index] for index in kept),
        (placed.devices[0], *(placed.devices[index + 1] for index in kept)),
    )


def _in_order(request: Request, placed: Placed) -> Placed:
    """Among devices that can't be told apart, the pipeline visits those first that joined first."""
    if not request.costs.network.uniform:
        return placed
    alike: dict[Device, list[int]] = {}
    for index, device in enumerate(request.costs.devices):
        alike.setdefault(replace(device, name="", region=""), []).append(index)
    twin: dict[int, int] = {}
    for index in dict.fromkeys(placed.devices):
        device = request.costs.devices[index]
        twin[index] = alike[replace(device, name="", region="")].pop(0)
    return Placed(placed.cuts, tuple(twin[index] for index in placed.devices))


def _pool(request: Request) -> list[int]:
    """Indices of the devices to consider: all, or in a large pool the most useful ones."""
    devices = request.costs.devices
    most = request.fragments or (len(request.cuts) + 1 if request.cuts is not None else MOST_STAGES)
    if request.use_all or len(devices) <= max(most, SMALL_POOL):
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
        # The depth in flight decides what fits only where memory is limited and the schedule can vary it.
        limits = any(self.costs.devices[index].memory_bytes is not None for index in pool)
        self._limited = limits and self.costs.schedule == "1f1b"
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
        wanted = request.fragments
        for order in orders(devices, seconds, fences(seconds), most_orders):
            ranked = [self.pool[index] for index in order]
            stages = wanted if wanted is not None and request.cuts is None and wanted < len(ranked) else None
            use_all = request.use_all and stages is None
            if use_all and len(ranked) > pieces:
                ranked = self._fastest(ranked, pieces)
            if pieces > MOST_POSITIONS:
                found.append(self._by_speed(ranked))
                continue
            # One stage for each of exactly as many devices as fragments is worth a look besides fewer devices.
            forced = dict.fromkeys((use_all, use_all or wanted == len(ranked)))
            for by_rank in (True, False) if self._limited else (False,):
                programme = Programme(self.costs, ranked, positions, depth_by_rank=by_rank)
                for bound in programme.bounds(bounds):
                    answers = [programme.solve(bound, use_all=every, stages=stages) for every in forced]
                    found.extend(self._placed(answer) for answer in answers if answer is not None)
        if request.fragments is None and request.cuts is None:
            best = sorted(dict.fromkeys(found), key=lambda placed: request.estimate(placed).score)[:2]
            found.extend(
                back
                for placed in best
                for back in self._returning(placed)
                if not request.use_all or set(back.devices) == set(placed.devices)
            )
        return found or [self._by_memory()]

    def returning(self) -> list[Placed]:
        """Placements that may come back to a device, where the pool is small and everything is the policy's choice."""
        request, costs = self.request, self.costs
        free = request.fragments is None and request.cuts is None
        if not free or not 1 < len(self.pool) <= BEAM_POOL or costs.micro_batches == 1:
            return []
        beam = Beam(costs, self.pool, candidates(costs, BEAM_POSITIONS, request.factors), BEAM_WIDTH)
        found = [self._placed(stages) for stages in beam.best(BEAM_ANSWERS)]
        fitting = [placed for placed in found if not request.use_all or len(set(placed.devices)) == len(self.pool)]
        return sorted(fitting, key=request.glanced)[:MOST_RETURNING]

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

    def gathered(self) -> list[Placed]:
        """Where all devices have to take part: placements on those that are of use, with a piece for each of the others.

        It is put where it hurts least, which need not be next to its fence: at a loss, or a branch that little goes through.
        """
        request = self.request
        if (
            not request.use_all
            or len(self.pool) > SMALL_POOL
            or request.fragments is not None
            or request.cuts is not None
        ):
            return []
        free = _Search(replace(request, use_all=False), self.pool)
        best = sorted(dict.fromkeys(free.starts()), key=lambda placed: request.estimate(placed).score)
        return list(dict.fromkeys(self._completed(placed) for placed in best[:GATHERED]))

    def _completed(self, placed: Placed) -> Placed:
        most = min(len(self.pool), len(self.legal) + 1)
        idle = [device for device in self.pool if device not in placed.devices][: most - len(set(placed.devices))]
        stride = -(-WAYS_OF_INSERTING * len(self.legal) * len(idle) // MOST_INSERTIONS) or 1
        tried = self.legal[::-stride][::-1]  # The last one cuts the loss off.
        for device in idle:
            ways = insertions(placed, tried, device)
            placed = min(ways, key=lambda way: self.request.estimate(way).score, default=placed)
        return placed

    def _proportional(self, ranked: Sequence[int], measure: Floats, shares: Floats) -> Placed:
        """Contiguous stages in the order `ranked`, with a cumulative `measure` split in proportion to the devices' shares."""
        request, count = self.request, len(ranked)
        if request.cuts is not None:
            stages = len(request.cuts) + 1
        else:
            stages = request.fragments or min(count, len(self.legal) + 1)
        rank = [index * min(count, stages) // stages for index in range(stages)]
        hosts = tuple(ranked[index] for index in rank)
        if request.cuts is not None:
            return Placed(request.cuts, hosts)
        parts = shares[rank] / np.bincount(rank)[rank]
        wanted = np.cumsum(parts)[:-1] / parts.sum() * measure[-1]
        return Placed(nearest(self.costs.workload.positions, np.searchsorted(measure, wanted).astype(float)), hosts)

    def _by_speed(self, ranked: Sequence[int]) -> Placed:
        """For hundreds of stages, where the programme's tables would be too large."""
        speeds = np.array([self.costs.devices[index].flops_per_second for index in ranked])
        return self._proportional(ranked, self.costs.times(self.costs.devices[0]).both, speeds)

    def _by_memory(self) -> Placed:
        """Where no stages fit that the programme knows: as a start for the search, and for the error that says what lacks."""
        limits = [self.costs.devices[index].memory_bytes for index in self.pool]
        most = max((limit for limit in limits if limit is not None), default=1)
        room = np.array([float(most if limit is None else limit) for limit in limits])
        held = self.costs.cumulative_state + self.costs.workload.saved
        return self._proportional(self.pool, held, room)

    def _fastest(self, ranked: Sequence[int], count: int) -> list[int]:
        best = set(sorted(ranked, key=lambda index: -self.costs.devices[index].flops_per_second)[:count])
        return [index for index in ranked if index in best]

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

    def climb(self, placed: Placed, score: Score, budget: int, least_gain: float = 1e-9) -> Placed:
        request = self.request
        return refine(
            placed,
            score,
            legal=self.legal,
            devices=self.pool if len(self.pool) <= SMALL_POOL else (),
            budget=budget,
            keep_cuts=request.cuts is not None,
            keep_count=request.fragments is not None,
            use_all=request.use_all,
            least_gain=least_gain,
        )


def _split(stages: list[Stage], legal: Sequence[int], work: Floats) -> list[Stage]:
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
