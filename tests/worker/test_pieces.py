"""Which pieces of a snapshot are asked for, and when."""

from __future__ import annotations

from itertools import pairwise

import pytest

from worker.protocol.pieces import LARGEST, PATIENCE, Pieces, piece_bytes

BYTES = 10 * LARGEST


class Link:
    """Carries one piece after the other, each `seconds` after the one before it, from when it was asked for on."""

    def __init__(self, pieces: Pieces, seconds: float) -> None:
        self.pieces = pieces
        self.seconds = seconds
        self.now = 0.0
        self.asked: list[int] = []
        self._arrivals: list[tuple[float, int]] = []

    def ask(self, numbers: list[int]) -> None:
        for number in numbers:
            begin = max(self.now, self._arrivals[-1][0] if self._arrivals else 0.0)
            self._arrivals.append((begin + self.seconds, number))
        self.asked += numbers

    def play(self, poke_every: float = 1.0) -> float:
        """Until all have come; returns when."""
        poke_at = poke_every
        while not self.pieces.complete:
            self.ask(self.pieces.due(self.now))
            wait = self.pieces.wait(self.now)
            following = [poke_at, *(at for at, _ in self._arrivals[:1]), *([] if wait is None else [self.now + wait])]
            self.now = min(following)
            if self._arrivals and self._arrivals[0][0] <= self.now:
                _, number = self._arrivals.pop(0)
                if self.pieces.lacks(number):
                    self.pieces.came(number, self.now)
            if poke_at <= self.now:
                poke_at += poke_every
                self.ask(self.pieces.overdue(self.now))
        return self.now


def test_pieces_cover_the_snapshot() -> None:
    for size in (1, LARGEST, LARGEST + 1, BYTES - 1):
        pieces = Pieces(size, 0.0, 0.0)
        spans = [pieces.span(number) for number in range(1, pieces.count + 1)]
        assert spans[0][0] == 0
        assert spans[-1][1] == size
        assert all(before[1] == after[0] for before, after in pairwise(spans))


def test_as_fast_as_it_goes_two_are_under_way_until_the_link_shows_that_it_is_fast() -> None:
    pieces = Pieces(BYTES, 0.0, 0.0)
    assert pieces.due(0.0) == [1, 2]
    assert pieces.due(0.0) == []
    assert pieces.wait(0.0) is None
    pieces.came(1, 0.01)
    assert pieces.due(0.01) == [3, 4]
    pieces.came(2, 1.0)
    assert pieces.due(1.0) == []  # Two are on their way, and the link is not that fast.


@pytest.mark.parametrize(("seconds", "link"), [(4.0, 0.001), (4.0, 0.05), (20.0, 0.1)])
def test_a_spread_snapshot_takes_the_time_that_it_is_given(seconds: float, link: float) -> None:
    pieces = Pieces(BYTES, seconds, 0.0)
    took = Link(pieces, link).play()
    assert 0.9 * seconds < took <= seconds + link


def test_where_the_link_is_slower_than_the_spread_no_burst_makes_up_for_it() -> None:
    pieces = Pieces(BYTES, 4.0, 0.0)
    link = Link(pieces, 0.5)
    assert link.play() == pytest.approx(0.5 * pieces.count)
    assert link.asked == list(range(1, pieces.count + 1))


@pytest.mark.parametrize("seconds", [0.0, 10.0])
@pytest.mark.parametrize("link", [0.1, 2.5, 30.0])
def test_slow_is_not_lost(seconds: float, link: float) -> None:
    # Of a link on which a piece takes longer than our patience, few are asked for twice: only until that is known.
    pieces = Pieces(BYTES, seconds, 0.0)
    played = Link(pieces, link)
    played.play()
    assert len(played.asked) <= pieces.count + (0 if link < PATIENCE else 8)


def test_what_is_lost_is_asked_for_again_ever_more_rarely() -> None:
    pieces = Pieces(BYTES, 0.0, 0.0)
    assert pieces.due(0.0) == [1, 2]
    pieces.came(1, 0.5)
    pieces.due(0.5)
    times = [now / 10 for now in range(400) if pieces.overdue(now / 10) == [2, 3]]
    assert times == [2.5, 6.5, 14.5, 30.5]
    pieces.came(2, 40.0)
    pieces.came(2, 40.0)  # twice: it had only been slow
    assert not pieces.lacks(2)


def test_pieces_of_a_spread_snapshot_are_small_but_not_tiny() -> None:
    assert piece_bytes(2**30, 0.0) == LARGEST
    assert piece_bytes(3_000_000, 4.8) == 65536
    assert piece_bytes(3_000_000, 2.4) == 125_000
    assert piece_bytes(3_000_000, 0.3) == LARGEST
    assert piece_bytes(3_000, 4.8) == 65536
