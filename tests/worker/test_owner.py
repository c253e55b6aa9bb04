"""When a worker gives its machine back to the owner, and when it comes again."""

from __future__ import annotations

from worker.machine.owner import BUSY_SECONDS, QUIET_SECONDS, Owner, Reading


class Machine:
    """Two cores; the worker keeps one of them busy while it is there."""

    def __init__(self) -> None:
        self.owner = Owner(2)
        self.time = self.busy = self.own = 0.0
        self.owner.take(Reading(0, 0, 0))

    def pass_by(self, seconds: int, others: float) -> list[float]:
        """`others` cores are taken by other programs; returns the times at which the worker went or came."""
        changes = []
        for _ in range(seconds):
            mine = 0.0 if self.owner.away else 1.0
            self.time += 1
            self.own += mine
            self.busy += mine + others
            if self.owner.take(Reading(self.time, self.busy, self.own)):
                changes.append(self.time)
        return changes


def test_its_own_work_is_no_reason_to_go():
    machine = Machine()
    assert machine.pass_by(300, 0.3) == []
    assert not machine.owner.away


def test_it_goes_when_others_stay_busy_and_comes_when_they_have_been_quiet_for_long():
    machine = Machine()
    assert machine.pass_by(60, 1.5) == [BUSY_SECONDS]
    assert machine.owner.away
    assert machine.owner.others == 0.75
    assert machine.pass_by(120, 0.1) == [60 + QUIET_SECONDS]
    assert not machine.owner.away


def test_short_bursts_and_short_pauses_change_nothing():
    machine = Machine()
    for _ in range(20):
        assert machine.pass_by(8, 2.0) == []
        assert machine.pass_by(2, 0.0) == []
    machine.pass_by(20, 2.0)
    assert machine.owner.away
    for _ in range(5):
        assert machine.pass_by(50, 0.0) == []
        assert machine.pass_by(5, 2.0) == []


def test_a_load_between_the_two_bounds_keeps_things_as_they_are():
    machine = Machine()
    assert machine.pass_by(200, 0.9) == []
    machine.pass_by(20, 2.0)
    assert machine.owner.away
    assert machine.pass_by(200, 0.9) == []


def test_a_clock_that_stands_still_is_passed_over():
    owner = Owner(1)
    assert not owner.take(Reading(5, 1, 0))
    assert not owner.take(Reading(5, 9, 0))
    assert owner.others == 0.0
