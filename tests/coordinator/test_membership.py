"""Who counts as lost: silence of a worker, and never the time in which the coordinator itself did not listen. Sans I/O."""

from __future__ import annotations

import pytest
from recovery_cases import Play

from coordinator.life import events as ev


def ticks(play: Play, count: int, every: float) -> None:
    """The coordinator's clock ticks and nobody says anything."""
    for _ in range(count):
        play.now += every
        play.post(ev.ClockTicked(play.now))


def test_a_coordinator_that_was_not_listening_holds_it_against_nobody() -> None:
    play = Play("ab")
    play.tick()
    for seconds in (4.9, 5.1, 3600.0):
        ticks(play, 1, seconds)
        assert all(member.live for member in play.lifecycle.pool)
        play.tick()
    assert play.job.restarts == 0


@pytest.mark.parametrize("every", [0.1, 0.5, 0.8, 2.0])
def test_a_coordinator_that_is_always_late_notices_silence_all_the_same(every: float) -> None:
    play = Play("ab")
    ticks(play, int(5.0 / min(every, 0.5)) + 1, every)
    assert not any(member.live for member in play.lifecycle.pool)
