"""A newcomer that does not get ready is left alone for a while, by itself, and tried again. Sans I/O."""

from __future__ import annotations

from recovery_cases import TIMING, Play

from coordinator.life import events as ev
from coordinator.life.run import Run
from fusion.messages import Backup, Connected, Failure, Heartbeat, Ready


def training(**settings: int) -> Play:
    """A job on a, b and c."""
    play = Play("abc", backup_every=100_000, steps=1_000_000, **settings)
    play.train(1, 20)
    return play


def asks(play: Play) -> list[ev.MakePlan]:
    asked = [each for each in play.out if isinstance(each, ev.MakePlan)]
    play.out = [each for each in play.out if not isinstance(each, ev.MakePlan)]
    return asked


def taken_in(play: Play, name: str) -> None:
    """The scheduler is asked with this worker, and gives it fragment 1; the others connect to it."""
    for _ in range(100):
        for asked in asks(play):
            placement = ("a", name, "c") if name in asked.workers else play.plan.placement
            play.answer(asked, placement, seconds=0.5, current=1.0)
        if play.run.move is not None:
            break
        play.train(play.run.highest + 1, play.run.highest + 1)
    assert play.run.move is not None
    for host in "abc":
        play.say(host, Connected(job="job", peers=[name]))


def nothing_to_gain(play: Play) -> set[str]:
    """The scheduler finds nothing better; returns with whom it was asked."""
    asked = asks(play)
    if asked:
        play.answer(asked[-1], play.plan.placement, seconds=1.0, current=1.0)
    return {name for each in asked for name in each.workers}


def considered(play: Play, seconds: float) -> set[str]:
    """With whom the scheduler is asked in so many seconds of training."""
    found: set[str] = set()
    for _ in range(int(seconds)):
        play.train(play.run.highest + 1, play.run.highest + 1, seconds=1.0)
        found |= nothing_to_gain(play)
    return found


def waited_for(play: Play) -> float:
    """Seconds until the move that is under way is given up."""
    begin = play.now
    while play.run.move is not None:
        play.tick(1.0)
    return play.now - begin


def too_slow() -> Play:
    """d has joined and was not ready in time."""
    play = training()
    play.join("d")
    taken_in(play, "d")
    assert 59 <= waited_for(play) <= 62
    assert any("d did not get ready; worker d is left alone for 1m00s" in story for story in play.stories())
    assert play.member("d").state == "idle"
    return play


def test_others_who_join_are_considered_at_once() -> None:
    play = too_slow()
    assert considered(play, 10) == set("abc")
    play.join("e")
    taken_in(play, "e")
    play.say("e", Ready(job="job", epoch=0))
    assert next(iter(play.sent(Backup).values())).hold


def test_who_joined_while_a_newcomer_was_waited_for_is_considered_after_it() -> None:
    play = training()
    play.join("d")
    taken_in(play, "d")
    play.tick(30)
    play.join("e")
    waited_for(play)
    assert considered(play, 10) == set("abce")


def test_the_pause_and_the_patience_double_and_nothing_is_asked_meanwhile() -> None:
    play = too_slow()
    for times in range(1, 4):
        pause, patience = 60 * 2 ** (times - 1), 60 * 2**times
        assert "d" not in considered(play, pause - 2)
        taken_in(play, "d")
        assert patience - 1 <= waited_for(play) <= patience + 2
    assert play.run.setbacks["d"].times == 4


def test_who_gets_ready_at_last_starts_afresh() -> None:
    play = too_slow()
    considered(play, 58)
    taken_in(play, "d")
    play.tick(100)
    play.say("d", Ready(job="job", epoch=0))
    order = next(iter(play.sent(Backup).values()))
    play.pause_all(order)
    play.hold_all(order)
    assert play.plan.placement == ("a", "d", "c")
    assert play.run.setbacks == {}


def test_one_that_is_ready_too_late_is_tried_again_at_once() -> None:
    play = too_slow()
    play.tick(2)
    play.say("d", Ready(job="job", epoch=0))
    taken_in(play, "d")
    assert 119 <= waited_for(play) <= 122


def test_one_that_others_can_not_reach_is_not_tried_again_because_it_is_ready() -> None:
    play = training()
    play.join("d")
    play.train(21, 21)
    play.answer(play.asked_plan(), ("a", "d", "c"), seconds=0.5, current=1.0)
    play.say("d", Ready(job="job", epoch=0))
    waited_for(play)
    play.say("d", Ready(job="job", epoch=0))
    assert "d" not in considered(play, 55)
    assert "d" in considered(play, 10)


def test_a_loss_is_a_reason_to_consider_all() -> None:
    play = too_slow()
    nothing_to_gain(play)
    play.lose("b")
    play.all_adopted()
    assert set(play.asked_plan().workers) == set("acd")


def test_where_not_all_are_wanted_others_come_first() -> None:
    play = too_slow()
    play.job.spec = play.job.spec.model_copy(update={"plan": play.job.spec.plan.model_copy(update={"workers": 3})})
    nothing_to_gain(play)
    play.join("e")
    play.lose("b")
    play.all_adopted()
    assert set(play.asked_plan().workers) == set("ace")


def test_another_process_of_that_name_is_another_worker() -> None:
    play = too_slow()
    play.join("d")
    taken_in(play, "d")
    assert 59 <= waited_for(play) <= 62
    assert play.run.setbacks["d"].times == 1


def test_one_that_fails_is_left_alone_and_the_others_are_not() -> None:
    play = training()
    play.join("d")
    play.join("e")
    taken_in(play, "d")
    play.say("d", Failure(job="job", epoch=0, message="out of memory"))
    assert considered(play, 10) == set("abce")


def test_a_download_that_comes_in_is_waited_for() -> None:
    play = training()
    play.join("d")
    taken_in(play, "d")
    for megabytes in range(1, 11):
        downloaded(play, megabytes, seconds=50)
    assert play.run.move is not None
    downloaded(play, 10, seconds=9)
    assert play.run.move is not None
    downloaded(play, 10, seconds=3)
    assert play.run.move is None


def downloaded(play: Play, megabytes: int, seconds: float) -> None:
    """d holds so much for so long."""
    for _ in range(int(2 * seconds)):
        play.now += 0.5
        for member in play.lifecycle.pool.live():
            used = megabytes * 2**20 if member.name == "d" else 0
            play.say(member.name, Heartbeat(incarnation=member.incarnation, memory_used_bytes=used))
        play.post(ev.ClockTicked(play.now))


def test_a_download_that_goes_on_for_ever_is_not() -> None:
    play = training()
    play.join("d")
    taken_in(play, "d")
    begin, used = play.now, 0
    while play.run.move is not None:
        used += 1
        downloaded(play, used, seconds=1)
    assert 1799 <= play.now - begin <= 1802


def test_who_joins_does_not_wait_long_for_one_that_is_tried_again() -> None:
    play = too_slow()
    considered(play, 58)
    taken_in(play, "d")
    play.tick(30)
    play.join("e")
    assert 29 <= waited_for(play) <= 32
    assert considered(play, 10) == set("abce")


def test_who_leaves_does_not_wait_for_a_newcomer_until_its_own_patience_is_over() -> None:
    play = training()
    play.join("d")
    taken_in(play, "d")
    play.leave("b")
    assert waited_for(play) <= TIMING.drain_patience / 2 + 1
    play.answer(play.asked_plan(), ("a", "a", "c"))
    order = next(iter(play.sent(Backup).values()))
    assert order.hold
    assert play.job.restarts == 0


def test_it_is_remembered_over_a_restart_of_the_coordinator_and_old_records_load() -> None:
    play = too_slow()
    play.restart_coordinator()
    assert "d" not in considered(play, 50)
    assert "d" in considered(play, 12)
    old = {"epoch": 0, "start": 0, "common_step": 0, "abandoned": 2}
    assert Run.model_validate(old).setbacks == {}


def test_a_clock_that_was_set_back_keeps_no_newcomer_out_for_longer() -> None:
    play = training()
    play.join("d")
    taken_in(play, "d")
    waited_for(play)
    play.now -= 3600.0
    play.restart_coordinator()
    assert "d" not in considered(play, 55.0)
    assert "d" in considered(play, 20.0)
