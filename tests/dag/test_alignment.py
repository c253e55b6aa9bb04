"""What two sequences have in common: as much as there is, in order, quickly where little differs."""

from __future__ import annotations

import time
from itertools import pairwise

from hypothesis import given
from hypothesis import strategies as st

from dag.capture.alignment import aligned

ITEMS = st.lists(st.sampled_from("abcd"), max_size=12)


def longest(one: list[str], other: list[str]) -> int:
    lengths = [[0] * (len(other) + 1) for _ in range(len(one) + 1)]
    for row, mine in enumerate(one):
        for column, theirs in enumerate(other):
            best = max(lengths[row][column + 1], lengths[row + 1][column])
            lengths[row + 1][column + 1] = lengths[row][column] + 1 if mine == theirs else best
    return lengths[-1][-1]


@given(ITEMS, ITEMS)
def test_as_much_as_there_is(one: list[str], other: list[str]) -> None:
    found = aligned(one, other)
    assert len(found) == longest(one, other)
    assert all(one[mine] == other[theirs] for mine, theirs in found)
    assert all(a < c and b < d for (a, b), (c, d) in pairwise(found))


def test_what_is_in_one_alone_comes_before_what_both_have() -> None:
    assert aligned("aab", "ab") == [(1, 0), (2, 1)]
    assert aligned("ab", "aab") == [(0, 1), (1, 2)]


def test_a_loop_with_something_more_in_every_round() -> None:
    begun = time.process_time()
    assert len(aligned("abcde" * 1000, "abe" * 1000)) == 3000
    assert not aligned(range(5000), range(5000, 10_000))
    assert time.process_time() - begun < 10
