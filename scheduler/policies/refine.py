"""Local search: shift a cut, move, swap, split or join fragments, while the estimate improves."""

from __future__ import annotations

from bisect import bisect_left, bisect_right
from collections.abc import Callable, Iterator, Sequence
from itertools import pairwise

from scheduler.estimate import Placed

Score = Callable[[Placed], tuple[float, float]]
WAYS_OF_INSERTING = 3
"""At each position: `insertions`."""


def refine(
    start: Placed,
    score: Score,
    *,
    legal: Sequence[int],
    devices: Sequence[int],
    budget: int,
    keep_cuts: bool = False,
    keep_count: bool = False,
    use_all: bool = False,
    least_gain: float = 1e-9,
) -> Placed:
    """Climb from `start` to a placement that no single move improves, or until `budget` placements were scored.

    `keep_cuts`: only the placement may change. `keep_count`: the number of fragments stays. `use_all`: a device that has
    a fragment keeps at least one. `least_gain`: share of the time that a move must save.
    """
    best, best_score = start, score(start)
    needed = len(set(start.devices)) if use_all else 0
    left = budget
    improved = True
    while improved and left > 0:
        improved = False
        for candidate in _neighbours(best, legal, devices, keep_cuts, keep_count):
            if len(set(candidate.devices)) < needed:
                continue
            left -= 1
            found = score(candidate)
            if found[0] < best_score[0] or (found[0] == best_score[0] and found[1] < best_score[1] * (1 - least_gain)):
                best, best_score, improved = candidate, found, True
                break
            if left <= 0:
                break
    return best


def _neighbours(
    placed: Placed, legal: Sequence[int], devices: Sequence[int], keep_cuts: bool, keep_count: bool
) -> Iterator[Placed]:
    cuts, hosts = placed.cuts, placed.devices
    if not keep_cuts:
        yield from _shifts(placed, legal)
    for index in range(len(hosts)):
        for device in devices:
            if device != hosts[index]:
                yield Placed(cuts, (*hosts[:index], device, *hosts[index + 1 :]))
    for first in range(len(hosts)):
        for second in range(first + 1, len(hosts)):
            if hosts[first] != hosts[second]:
                swapped = list(hosts)
                swapped[first], swapped[second] = swapped[second], swapped[first]
                yield Placed(cuts, tuple(swapped))
    if keep_cuts or keep_count:
        return
    for index in range(len(cuts)):
        for host in {hosts[index], hosts[index + 1]}:
            yield Placed(cuts[:index] + cuts[index + 1 :], (*hosts[:index], host, *hosts[index + 2 :]))
    yield from _splits(placed, legal, devices)


def _shifts(placed: Placed, legal: Sequence[int]) -> Iterator[Placed]:
    cuts = placed.cuts
    for number, position in enumerate(cuts):
        low = bisect_right(legal, cuts[number - 1]) if number else 0
        high = bisect_left(legal, cuts[number + 1]) if number + 1 < len(cuts) else len(legal)
        here = bisect_left(legal, position)
        step = 1
        while here - step >= low or here + step < high:
            for there in (here - step, here + step):
                if low <= there < high:
                    yield Placed((*cuts[:number], legal[there], *cuts[number + 1 :]), placed.devices)
            step = step + 1 if step < 3 else step * 2


def _splits(placed: Placed, legal: Sequence[int], devices: Sequence[int]) -> Iterator[Placed]:
    """Cut a fragment at a quarter, half or three quarters and give one part to another device."""
    cuts, hosts = placed.cuts, placed.devices
    bounds = (0, *cuts, legal[-1] + 1 if legal else 1)
    for index in range(len(hosts)):
        low, high = bisect_right(legal, bounds[index]), bisect_left(legal, bounds[index + 1])
        inside = high - low
        for there in sorted({low + inside * quarter // 4 for quarter in range(4)} | {high - 1}):
            if not low <= there < high:
                continue
            split = (*cuts[:index], legal[there], *cuts[index:])
            for device in devices:
                if device != hosts[index]:
                    yield Placed(split, (*hosts[: index + 1], device, *hosts[index + 1 :]))
                    yield Placed(split, (*hosts[:index], device, *hosts[index:]))


def insertions(placed: Placed, legal: Sequence[int], device: int) -> Iterator[Placed]:
    """Give the beginning or the end of a fragment to `device`, wherever it may be cut, or the least piece within it."""
    cuts, hosts = placed.cuts, placed.devices
    bounds = (0, *cuts, legal[-1] + 1 if legal else 1)
    for index in range(len(hosts)):
        inside = legal[bisect_right(legal, bounds[index]) : bisect_left(legal, bounds[index + 1])]
        before, after = hosts[: index + 1], hosts[index:]
        for there in inside:
            split = (*cuts[:index], there, *cuts[index:])
            yield Placed(split, (*hosts[:index], device, *after))
            yield Placed(split, (*before, device, *hosts[index + 1 :]))
        for there, next_one in pairwise(inside):
            yield Placed((*cuts[:index], there, next_one, *cuts[index:]), (*before, device, *after))
