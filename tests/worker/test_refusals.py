"""How often a value may be refused before the job ends."""

from __future__ import annotations

import pytest

from fusion.errors import PlanError
from fusion.wire import FrameKind
from worker.protocol.refusals import MOST, Refusals
from worker.protocol.replay_log import Key

KEY: Key = (FrameKind.GRADIENT, 4, 7, 1)
OTHER: Key = (FrameKind.GRADIENT, 4, 7, 2)


def test_the_last_refusal_says_what_from_whom_and_why() -> None:
    refusals = Refusals()
    for _ in range(MOST - 1):
        refusals.note(KEY, "oslo-1", "too long", [("oslo-1", KEY)])
    with pytest.raises(
        PlanError, match=r"oslo-1 has sent gradient 4 of step 7, micro-batch 1, 3 times .*too long.*drain oslo-1"
    ):
        refusals.note(KEY, "oslo-1", "too long", [("oslo-1", KEY)])


def test_what_nobody_waits_for_counts_for_nothing_and_takes_no_memory() -> None:
    refusals = Refusals()
    for micro_batch in range(1000):
        refusals.note((FrameKind.GRADIENT, 4, 7, micro_batch), "oslo-1", "too long", [])
    assert not refusals._counts


def test_what_came_after_all_begins_anew() -> None:
    refusals = Refusals()
    for _ in range(MOST - 1):
        refusals.note(KEY, "oslo-1", "too long", [("oslo-1", KEY)])
    refusals.note(OTHER, "oslo-1", "too long", [("oslo-1", OTHER)])
    refusals.note(KEY, "oslo-1", "too long", [("oslo-1", KEY)])
    assert refusals._counts == {KEY: 1}
