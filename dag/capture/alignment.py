"""What two traces have in common, in order: a longest common subsequence, in time that grows with what differs."""

from __future__ import annotations

from collections.abc import Hashable, Sequence
from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class _Run:
    """Equal items: where they begin in both, how many there are, and the next run."""

    mine: int
    theirs: int
    length: int
    next: _Run | None


def aligned(one: Sequence[Hashable], other: Sequence[Hashable]) -> list[tuple[int, int]]:
    """Positions of equal items, ascending in both, as many as there can be (Myers 1986).

    Where there is a choice, what is in one of the two alone stands before what both have.
    """
    numbers = {item: number for number, item in enumerate(set(one) & set(other))}
    mine, theirs = (
        [(place, numbers[item]) for place, item in enumerate(items) if item in numbers] for items in (one, other)
    )
    run = _longest([number for _, number in mine], [number for _, number in theirs])
    found = []
    while run is not None:
        found += [(mine[run.mine + step][0], theirs[run.theirs + step][0]) for step in range(run.length)]
        run = run.next
    return found


def _longest(mine: Sequence[int], theirs: Sequence[int]) -> _Run | None:
    """From the ends to the beginnings, with one more difference in each round."""
    surplus = len(mine) - len(theirs)
    nowhere: tuple[int, _Run | None] = (len(mine) + 2, None)
    # By how many more items are left of `mine` than of `theirs`: the fewest that can be left of `mine`, and the runs behind them.
    left = {surplus + 1: (len(mine) + 1, nowhere[1])}
    for differences in range(len(mine) + len(theirs) + 1):
        for more in range(surplus - differences, surplus + differences + 1, 2):
            without_mine, without_theirs = left.get(more + 1, nowhere), left.get(more - 1, nowhere)
            if without_mine[0] <= without_theirs[0]:
                end, run = without_mine[0] - 1, without_mine[1]
            else:
                end, run = without_theirs
            begin = end
            while begin > max(0, more) and mine[begin - 1] == theirs[begin - more - 1]:
                begin -= 1
            if begin < end:
                run = _Run(begin, begin - more, end - begin, run)
            if begin <= 0 and begin <= more:
                return run
            left[more] = begin, run
    raise AssertionError
