"""Fragments move in good order: a worker leaves, joins or slows down, and no step is run again."""

from __future__ import annotations

import pytest
from coordinator_cases import ref_of
from recovery_cases import TIMING, Play

from coordinator.life import events as ev
from fusion.messages import (
    Adopt,
    Adopted,
    Backup,
    BackupFailed,
    CaughtUp,
    CheckpointPart,
    Commit,
    Connect,
    Connected,
    Failure,
    Paused,
    Ready,
    Shutdown,
    Stop,
)


def asks(play: Play) -> list[ev.MakePlan]:
    return [each for each in play.out if isinstance(each, ev.MakePlan)]


def ordered_hold(play: Play) -> Backup:
    """The order to hold; a round that was under way comes to its end before."""
    order = next(iter(play.sent(Backup).values()))
    if not order.hold:
        play.train(play.run.highest + 1, order.step)
        play.hold_all(order)
        order = next(iter(play.sent(Backup).values()))
    assert order.hold
    return order


def held(play: Play) -> Backup:
    """Bring a hold round to its end; returns its order."""
    order = ordered_hold(play)
    play.pause_all(order)
    play.hold_all(order)
    return order


# A worker leaves --------------------------------------------------------------------------------------------------


def test_a_leaving_worker_hands_its_fragments_over_first() -> None:
    play = Play("abc", backup_every=500)
    play.train(1, 4)
    play.leave("b")
    asked = play.asked_plan()
    assert asked.workers == ("a", "c")
    play.answer(asked, ("a", "a", "c"))
    order = play.sent(Backup)["c"]
    assert (order.step, order.hold, order.backups) == (6, True, {0: "c", 1: "a", 2: "a"})
    play.pause_all(order)
    assert not play.sent(Adopt)
    play.hold_all(order, but=[1])
    assert not play.sent(Adopt)
    play.hold_all(order)
    orders = play.sent(Adopt)
    assert set(orders) == {"a", "b", "c"}
    assert (orders["a"].step, orders["a"].plan.placement, orders["a"].plan.epoch) == (6, ("a", "a", "c"), 1)
    assert orders["a"].plan.weights_behind == (0, 1, 2), "as it was planned for this placement"
    assert not play.sent(Commit)
    assert "fragment 1 -> a at step 6 (worker b leaves)" in play.stories()
    assert not play.sent(Shutdown)
    for name in orders:
        play.say(name, Adopted(job="job", epoch=1))
    play.say("a", CaughtUp(job="job", epoch=1, fragments=[1], steps=1, seconds=0.1))
    assert not any("replayed" in story for story in play.stories())
    assert (play.job.recoveries, play.job.restarts, play.run.common_step) == (0, 0, 6)
    # Until there is a newer snapshot, b holds that of what it gave away.
    assert play.run.holders[1] == "b"
    assert not play.sent(Shutdown)
    common = play.backed_up(7)
    assert set(play.sent(Stop)) == set(play.sent(Shutdown)) == {"b"}
    assert (play.member("b").state, list(play.job.hosts)) == ("left", ["a", "c"])
    assert play.metrics() == list(range(1, common + 2))


def test_a_new_host_that_dies_before_the_next_snapshot_gives_the_fragment_back() -> None:
    play = Play("abc", backup_every=500)
    play.train(1, 4)
    joined(play, seconds=0.5, current=1.0)
    play.say("d", Ready(job="job", epoch=0))
    play.connect_all()
    order = held(play)
    play.all_adopted()
    assert play.plan.placement == ("a", "d", "c")
    play.train(order.step + 1, order.step + 1)
    play.lose("d")
    assert play.sent(Adopt)["b"].step == order.step
    assert (play.plan.placement, play.job.restarts) == (("a", "b", "c"), 0)


def test_a_worker_that_has_handed_everything_over_leaves_without_a_step_back_near_the_end() -> None:
    last = 40
    play = Play("abc", backup_every=500, steps=last)
    play.train(1, last - 6)
    play.leave("b")
    play.answer(play.asked_plan(), ("a", "a", "c"))
    held(play)
    play.all_adopted()
    play.train(play.run.common_step + 1, last - 1)
    play.tick(100)
    assert (play.job.state, play.job.restarts) == ("running", 0)
    assert play.member("b").state == "left"


def test_who_can_t_build_what_it_is_to_take_over_keeps_no_fragments_from_moving() -> None:
    """Nothing that moves goes there."""
    play = Play("abc", backup_every=500)
    play.train(1, 4)
    play.leave("b")
    play.answer(play.asked_plan(), ("a", "a", "c"))
    order = ordered_hold(play)
    assert play.run.backups[2] == "a"
    play.say("a", BackupFailed(job="job", epoch=0, step=0, fragment=2, cause="memory"))
    assert play.run.round is not None
    play.pause_all(order)
    play.hold_all(order)
    assert play.plan.placement == ("a", "a", "c")
    play.all_adopted()
    assert 2 not in play.run.backups, "there is nobody else"


def test_who_can_t_build_what_it_is_to_take_over_keeps_no_newcomer_out() -> None:
    play = Play("abc", backup_every=500)
    play.train(1, 4)
    joined(play, seconds=0.5, current=1.0)
    where = play.run.backups[0]
    play.say(where, BackupFailed(job="job", epoch=0, step=0, fragment=0, cause="memory"))
    assert play.run.move is not None
    assert play.run.backups[0] != where
    play.say("d", Ready(job="job", epoch=0))
    play.connect_all()
    held(play)
    assert play.plan.placement == ("a", "d", "c")


def test_everybody_must_have_stopped() -> None:
    play = Play("ab", backup_every=500)
    play.train(1, 4)
    play.leave("b")
    play.answer(play.asked_plan(), ("a", "a"))
    order = play.sent(Backup)["a"]
    play.train(5, order.step)
    play.hold_all(order)
    play.say("a", Paused(job="job", epoch=0, step=order.step))
    assert not play.sent(Adopt)
    play.say("b", Paused(job="job", epoch=0, step=order.step))
    assert play.sent(Adopt)["a"].plan.placement == ("a", "a")


def test_a_checkpoint_that_the_leaving_worker_uploads_is_waited_for() -> None:
    play = Play("ab", backup_every=500, every=6)
    play.train(1, 4)
    play.leave("b")
    play.answer(play.asked_plan(), ("a", "a"))
    order = held(play)
    assert order.step == 6
    play.say("a", CheckpointPart(job="job", epoch=0, step=6, fragment=0, blob=ref_of(b"0")))
    play.all_adopted()
    assert not play.sent(Shutdown)
    play.say("b", CheckpointPart(job="job", epoch=0, step=6, fragment=1, blob=ref_of(b"1")))
    assert set(play.sent(Shutdown)) == {"b"}
    assert play.job.writing == [6]


def test_a_loss_during_the_hold_ends_it() -> None:
    play = Play("abc")
    play.backed_up()
    play.leave("b")
    play.answer(play.asked_plan(), ("a", "a", "c"))
    order = ordered_hold(play)
    step = play.run.common_step
    play.pause_all(order)
    play.lose("c")
    adopt = play.all_adopted()
    assert (adopt.step, adopt.plan.placement) == (step, ("a", "b", "a"))
    play.hold_all(order)
    assert play.run.common_step == step
    assert play.asked_plan().workers == ("a",)  # The leaving worker is not forgotten.


def test_an_order_to_hold_that_came_too_late_ends_the_hold() -> None:
    play = Play("ab", backup_every=500)
    play.train(1, 4)
    play.leave("b")
    play.answer(play.asked_plan(), ("a", "a"))
    order = play.sent(Backup)["a"]
    play.say("a", BackupFailed(job="job", epoch=0, step=order.step, fragment=0, cause="passed"))
    adopt = play.all_adopted()
    assert (adopt.plan.placement, adopt.plan.epoch, adopt.step) == (("a", "b"), 1, 0)
    again = play.sent(Backup)["a"]
    assert (again.hold, again.step) == (True, 4 + 4)


def test_a_worker_that_leaves_alone_goes_at_the_next_checkpoint() -> None:
    play = Play("a", every=10)
    play.train(1, 5)
    play.leave("a")
    assert play.state() == "running"
    assert any("goes on without it at its next checkpoint" in story for story in play.stories())
    play.train(6, 10)
    play.say("a", CheckpointPart(job="job", epoch=0, step=10, fragment=0, blob=ref_of(b"0")))
    play.post(ev.CheckpointWritten(play.now, "job", 10, 1))
    assert (play.state(), play.member("a").state) == ("queued", "left")


def test_a_worker_that_leaves_alone_and_has_no_checkpoint_in_sight_goes_now() -> None:
    play = Play("a", steps=10_000)
    play.train(1, 5)
    play.leave("a")
    assert (play.state(), play.member("a").state) == ("queued", "left")


def test_a_move_that_the_scheduler_refuses_becomes_a_checkpoint() -> None:
    play = Play("ab", every=10, backup_every=500)
    play.train(1, 5)
    play.leave("b")
    asked = play.asked_plan()
    play.post(ev.PlanRefused(play.now, "job", asked.attempt, "fragment 1 needs 2 GiB"))
    play.tick()
    stories = play.stories()
    assert "the fragments of job job can't move: fragment 1 needs 2 GiB" in stories
    assert "worker b can't hand its fragments over; job job goes on without it at its next checkpoint" in stories
    assert not asks(play)
    play.train(6, 10)
    play.post(ev.CheckpointWritten(play.now, "job", 10, 1))
    assert play.member("b").state == "left"


def test_patience_with_a_move_ends() -> None:
    play = Play("ab", backup_every=500)
    play.train(1, 5)
    play.leave("b")
    play.tick(TIMING.drain_patience + 1)
    assert (play.job.restarts, play.job.recoveries, play.member("b").state) == (0, 1, "left")


def test_an_idle_worker_takes_the_place_of_the_only_one() -> None:
    play = Play("ab", hosts=1)
    play.train(1, 2)
    play.tick()
    play.answer(play.asked_plan(), ("a",))
    play.leave("a")
    asked = play.asked_plan()
    assert asked.workers == ("b",)
    play.answer(asked, ("b",))
    play.connect_all()
    order = held(play)
    assert order.backups == {0: "b"}
    play.all_adopted()
    assert (play.plan.placement, play.member("a").state, play.job.restarts) == (("b",), "left", 0)


# A worker joins ---------------------------------------------------------------------------------------------------


def joined(play: Play, *, seconds: float, current: float) -> None:
    """d joins the running job's pool and the scheduler would give it fragment 1."""
    play.join("d")
    play.train(play.run.highest + 1, play.run.highest + 1)
    asked = play.asked_plan()
    assert asked.workers == ("a", "b", "c", "d")
    assert asked.price
    play.answer(asked, ("a", "d", "c"), seconds=seconds, current=current)


def test_a_worker_that_joins_takes_work_at_a_step_boundary() -> None:
    play = Play("abc", backup_every=500)
    play.train(1, 4)
    play.out.clear()
    joined(play, seconds=0.5, current=1.0)
    prepare = next(each for each in play.out if isinstance(each, ev.PrepareWorkers))
    assert prepare.joining
    assert prepare.hosts == (play.member("d").incarnation,)
    assert (prepare.epoch, prepare.plan.placement) == (0, ("a", "b", "c"))
    connect = play.sent(Connect, clear=False)
    assert set(connect) == {"a", "b", "c"}
    assert [peer.worker for peer in connect["a"].peers] == ["d"]
    assert not play.sent(Backup)
    play.say("d", Ready(job="job", epoch=0))
    play.train(6, 7)
    assert not play.sent(Backup)
    play.connect_all()
    order = held(play)
    assert order.backups[1] == "d"
    adopt = play.all_adopted()
    assert {peer.worker for peer in adopt.peers} == {"a", "b", "c", "d"}
    assert play.plan.placement == ("a", "d", "c")
    assert f"fragment 1 -> d at step {order.step} (worker d joined)" in play.stories()
    assert play.member("b").state == "busy"
    play.backed_up(order.step + 1)
    assert play.member("b").state == "idle"
    assert set(play.sent(Stop)) == {"b"}


def slow_newcomer(play: Play) -> Backup:
    """A worker joins whose fragment's snapshot takes half a minute; returns the order for it."""
    play.train(1, 4)
    play.run.cost = 30.0
    joined(play, seconds=0.5, current=1.0)
    play.connect_all()
    order = play.sent(Backup)["a"]
    if 1 not in order.backups or order.backups[1] != "d":
        play.train(play.run.highest + 1, order.step + 1)
        play.hold_all(order)
        order = play.sent(Backup)["a"]
    assert order.backups[1] == "d"
    return order


def test_nobody_stops_for_snapshots_that_take_long() -> None:
    play = Play("abc", backup_every=500)
    order = slow_newcomer(play)
    assert (order.hold, order.log_own) == (False, True)
    play.train(play.run.highest + 1, order.step + 20)
    assert not play.sent(Adopt)
    play.hold_all(order)
    assert play.plan.placement == ("a", "d", "c")
    assert f"fragment 1 -> d at step {order.step} (worker d joined)" in play.stories()
    assert play.run.switch is not None
    assert (play.run.switch.behind, play.run.switch.until) == ([1], order.step + 20)
    adopt = play.all_adopted(steps=20)
    assert adopt.step == order.step
    assert "d replayed 20 steps in 500 ms" in play.stories()
    assert (play.job.recoveries, play.job.restarts) == (0, 0)
    # Until there is a newer snapshot, its former host holds that of step `order.step`.
    assert play.run.holders[1] == "b"
    play.train(order.step + 21, order.step + 30)
    assert play.metrics() == list(range(1, order.step + 31))


def test_a_job_that_ends_meanwhile_moves_nothing() -> None:
    play = Play("abc", backup_every=500, steps=60)
    order = slow_newcomer(play)
    play.train(play.run.highest + 1, 55)
    play.hold_all(order)
    assert any("the job is about to end" in story for story in play.stories())
    assert not play.sent(Adopt)
    assert (play.member("d").state, play.run.move, play.run.round) == ("idle", None, None)
    assert play.run.common_step < order.step


def test_a_newcomer_that_leaves_while_everybody_waits_for_it_is_not_waited_for() -> None:
    play = Play("abc", backup_every=500)
    play.train(1, 4)
    joined(play, seconds=0.5, current=1.0)
    play.connect_all()
    order = ordered_hold(play)
    play.pause_all(order)
    play.leave("d")
    assert play.member("d").state == "left"
    assert play.all_adopted().plan.placement == ("a", "b", "c")
    play.train(order.step + 1, order.step + 3)
    assert play.metrics()[-1] == order.step + 3


def test_who_can_not_hand_over_in_time_leaves_its_fragments_to_those_that_hold_their_snapshots() -> None:
    play = Play("abc", backup_every=500)
    play.train(1, 4)
    play.run.cost = 100.0
    play.leave("b")
    assert play.member("b").state == "left"
    assert "worker b leaves (SIGTERM); its fragments would take 1m40s to move, so others adopt them" in play.stories()
    assert play.plan.placement == ("a", "c", "c")
    assert (play.job.recoveries, play.job.restarts) == (1, 0)
    assert not any(" was lost" in story for story in play.stories())


def test_a_move_that_gains_little_is_not_made() -> None:
    play = Play("abc", backup_every=500)
    play.train(1, 4)
    joined(play, seconds=0.95, current=1.0)
    assert not play.sent(Connect)
    assert play.member("d").state == "idle"


def test_no_move_near_the_end() -> None:
    play = Play("abc", backup_every=500, steps=13)
    play.train(1, 4)
    play.join("d")
    play.train(5, 6)
    assert not asks(play)


def test_moves_have_pauses_between_them() -> None:
    play = Play("abc", backup_every=500)
    play.train(1, 4)
    joined(play, seconds=0.5, current=1.0)
    play.connect_all()
    held(play)
    play.all_adopted()
    order = play.sent(Backup)["a"]
    play.train(order.step - 1, order.step)
    play.hold_all(order)
    play.join("e")
    play.train(order.step + 1, order.step + 15)
    assert not asks(play)
    play.tick(TIMING.move_pause)
    assert asks(play)


@pytest.mark.parametrize(("from_origin", "checkpoint"), [(True, None), (False, 0)])
def test_a_newcomer_builds_from_where_the_run_began(from_origin: bool, checkpoint: int | None) -> None:
    """A later checkpoint may be deleted before the newcomer gets a fragment."""
    play = Play("abc", backup_every=500)
    play.train(1, 4)
    play.run.from_origin, play.job.checkpoint = from_origin, 3
    play.out.clear()
    joined(play, seconds=0.5, current=1.0)
    prepare = next(each for each in play.out if isinstance(each, ev.PrepareWorkers))
    assert prepare.checkpoint == checkpoint


def test_a_newcomer_that_fails_is_let_go() -> None:
    play = Play("abc", backup_every=500)
    play.train(1, 4)
    joined(play, seconds=0.5, current=1.0)
    play.say("d", Failure(job="job", epoch=0, message="out of memory"))
    assert play.state() == "running"
    assert play.run.move is None
    assert set(play.sent(Stop)) == {"d"}
    assert (play.member("d").state, list(play.job.hosts)) == ("idle", ["a", "b", "c"])
    assert any("worker d: out of memory" in story for story in play.stories())


def test_a_newcomer_that_dies_changes_nothing() -> None:
    play = Play("abc", backup_every=500)
    play.train(1, 4)
    joined(play, seconds=0.5, current=1.0)
    play.vanish("d")
    assert play.run.move is None
    assert play.plan.placement == ("a", "b", "c")
    assert (play.job.recoveries, play.job.restarts) == (0, 0)


def test_a_host_that_can_t_reach_the_newcomer_is_not_waited_for_for_ever() -> None:
    play = Play("abc", backup_every=500)
    play.train(1, 4)
    joined(play, seconds=0.5, current=1.0)
    play.say("d", Ready(job="job", epoch=0))
    play.say("a", Connected(job="job", peers=["d"]))
    play.tick(61)
    assert play.run.move is None
    assert any("b, c did not get ready" in story for story in play.stories())


def test_waiting_jobs_come_before_running_ones() -> None:
    play = Play("abc", backup_every=500)
    play.train(1, 4)
    other = play.job.model_copy(update={"id": "other", "number": 2, "state": "queued", "reason": "x", "plan": None})
    other.spec = other.spec.model_copy(update={"plan": other.spec.plan.model_copy(update={"workers": 2})})
    other.forget_run()
    play.post(ev.JobSubmitted(play.now, other))
    play.join("d")
    play.train(5, 6)
    assert not asks(play)


# A worker slows down ----------------------------------------------------------------------------------------------


def test_a_worker_that_has_become_slow_hands_work_on() -> None:
    play = Play("ab", fragments=4, backup_every=500)
    play.seconds = {"a": 0.01, "b": 0.01}
    play.train(1, 20)
    assert not asks(play)
    play.seconds = {"a": 0.01, "b": 0.025}
    play.train(21, 30)
    asked = play.asked_plan()
    assert round(asked.slower["b"], 3) == 2.5
    assert asked.slower["a"] == 1.0
    play.answer(asked, ("a", "a", "a", "b"), seconds=0.5, current=1.0)
    held(play)
    play.all_adopted()
    assert "fragment 2 -> a at step 32 (worker b has become slower)" in play.stories()


def test_a_job_that_asked_for_so_many_workers_keeps_them() -> None:
    play = Play("ab", fragments=4, backup_every=500)
    play.job.spec = play.job.spec.model_copy(update={"plan": play.job.spec.plan.model_copy(update={"workers": 2})})
    play.seconds = {"a": 0.01, "b": 0.01}
    play.train(1, 20)
    play.seconds = {"a": 0.01, "b": 0.05}
    play.train(21, 30)
    play.answer(play.asked_plan(), ("a", "a", "a", "a"), seconds=0.5, current=1.0)
    assert play.run.move is None


def test_where_all_have_become_slower_nobody_is_the_slow_one() -> None:
    play = Play("abc", fragments=6, backup_every=500)
    play.seconds = dict.fromkeys("abc", 0.01)
    play.train(1, 20)
    play.seconds = {"a": 0.025, "b": 0.028, "c": 0.024}
    play.train(21, 35)
    assert not asks(play)


def test_after_an_adoption_the_scheduler_is_asked() -> None:
    play = Play("abc", fragments=6, backup_every=500)
    play.train(1, 20)
    play.lose("b")
    play.all_adopted()
    assert play.asked_plan().workers == ("a", "c")


# A coordinator that was restarted ---------------------------------------------------------------------------------


def test_a_restarted_coordinator_ends_a_hold_and_moves_again() -> None:
    play = Play("ab", backup_every=500)
    play.train(1, 4)
    play.leave("b")
    play.answer(play.asked_plan(), ("a", "a"))
    order = play.sent(Backup)["a"]
    play.pause_all(order)
    play.restart_coordinator()
    play.hold_all(order)
    adopt = play.all_adopted()
    assert (adopt.plan.placement, adopt.plan.epoch, adopt.step) == (("a", "b"), 1, 0)
    play.tick()
    play.answer(play.asked_plan(), ("a", "a"))
    held(play)
    play.all_adopted()
    assert (play.plan.placement, play.member("b").state) == (("a", "a"), "left")


def test_a_restarted_coordinator_lets_newcomers_go() -> None:
    play = Play("abc", backup_every=500)
    play.train(1, 4)
    joined(play, seconds=0.5, current=1.0)
    play.restart_coordinator()
    assert set(play.sent(Stop)) == {"d"}
    assert play.member("d").state == "idle"
