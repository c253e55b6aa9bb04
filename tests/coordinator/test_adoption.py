"""A worker is lost: who takes its fragments over, from where, and what everybody hears of it."""

from __future__ import annotations

import pytest
from recovery_cases import Play

from coordinator.life import events as ev
from fusion.messages import Adopt, Adopted, Backup, CantAdopt, CaughtUp, Finished, PeerLost, Shutdown, Stop


def test_the_holder_adopts_and_nobody_else_goes_back() -> None:
    play = Play("abc")
    step = play.backed_up()
    play.lose("b")
    orders = play.sent(Adopt)
    assert set(orders) == {"a", "c"}
    adopt = orders["a"]
    assert (adopt.plan.placement, adopt.plan.epoch, adopt.step) == (("a", "c", "c"), 1, step)
    assert {peer.worker for peer in adopt.peers} == {"a", "c"}
    assert adopt.backups == {0: "c", 1: "a", 2: "a"}
    assert not play.sent(Stop)
    assert play.state() == "running"
    assert (play.job.recoveries, play.job.restarts) == (1, 0)
    assert [summary.worker for summary in play.job.fragments] == ["a", "c", "c"]
    stories = play.stories()
    assert "worker b lost at step 6 (no heartbeat for 5.0 s)" in stories
    assert f"c adopts fragment 1 from snapshot of step {step}" in stories


def test_adopters_keep_their_memory_for_what_they_have_to_hold() -> None:
    play = Play("abc")
    play.backed_up()
    assert play.plan.weights_behind == (0, 1, 2)
    play.lose("b")
    adopt = play.all_adopted()
    assert (adopt.plan.placement, adopt.plan.weights_behind) == (("a", "c", "c"), (0, 0, 0))


def test_what_is_told_after_the_replay() -> None:
    play = Play("abc")
    play.backed_up()
    play.lose("b")
    play.all_adopted(steps=2)
    assert "c replayed 2 steps in 500 ms" in play.stories()
    play.say("c", CaughtUp(job="job", epoch=1, fragments=[1], steps=2, seconds=0.5))  # Said again.
    assert play.stories().count("c replayed 2 steps in 500 ms") == 1


def test_steps_count_when_every_fragment_has_been_reported_once() -> None:
    play = Play("abc")
    play.backed_up()
    play.report("a", 7)
    play.report("c", 7)
    play.lose("b")
    adopt = play.all_adopted()
    assert play.job.step == 6
    play.report_fragments("c", 6, [1])
    assert play.job.step == 6
    play.report_fragments("c", 7, [1])
    assert play.job.step == 7
    play.train(8, 9)
    assert play.metrics() == list(range(1, 10))
    assert adopt.plan.epoch == play.job.epoch == 1


def test_reports_of_the_epoch_before_still_count() -> None:
    play = Play("abc")
    play.backed_up()
    play.lose("b")
    play.report("a", 7, epoch=0)
    play.report_fragments("c", 7, [2], epoch=0)
    play.report_fragments("c", 7, [1])
    assert play.job.step == 7


def test_before_the_first_snapshot_anybody_takes_a_fragment_from_the_start() -> None:
    play = Play("abc")
    play.train(1, 1)
    play.lose("b")
    adopt = play.sent(Adopt)["a"]
    assert (adopt.step, adopt.plan.placement) == (0, ("a", "c", "c"))
    assert "c adopts fragment 1 from step 0" in play.stories()
    play.lose("c")
    adopt = play.sent(Adopt)["a"]
    assert (adopt.step, adopt.plan.placement, adopt.plan.epoch) == (0, ("a", "a", "a"), 2)


def test_a_worker_and_its_holder_together_send_the_job_back() -> None:
    play = Play("abc")
    play.backed_up()
    play.lose("b", "c")
    assert not play.sent(Adopt)
    assert play.job.restarts == 1
    assert set(play.sent(Stop)) == {"a"}
    assert any(
        "workers b, c were lost, and the snapshot of fragment 1 was lost with worker c" in s for s in play.stories()
    )
    assert play.state() == "preparing"  # Again, on what is left.


def test_two_neighbours_together_are_one_adoption() -> None:
    """Their backup workers are neighbours of neither."""
    play = Play("abcd")
    step = play.backed_up()
    play.lose("a", "b")
    adopt = play.sent(Adopt)["c"]
    assert (adopt.plan.placement, adopt.plan.epoch, adopt.step) == (("c", "d", "c", "d"), 1, step)
    assert play.job.recoveries == 1


def test_another_loss_while_one_is_adopted() -> None:
    play = Play("abcd")
    step = play.backed_up()
    play.lose("a")
    assert play.sent(Adopt)["c"].plan.placement == ("c", "b", "c", "d")
    play.lose("b")
    adopt = play.sent(Adopt)["c"]
    assert (adopt.plan.placement, adopt.plan.epoch, adopt.step) == (("c", "d", "c", "d"), 2, step)
    assert play.run.switch is not None
    assert play.run.switch.behind == [0, 1]


def test_an_adopter_that_dies_before_the_next_snapshot_sends_the_job_back() -> None:
    play = Play("abc")
    play.backed_up()
    play.lose("b")
    play.all_adopted()
    play.lose("c")
    assert play.job.restarts == 1


def test_after_an_adoption_a_round_is_ordered_at_once() -> None:
    play = Play("abc", backup_every=500)
    play.train(1, 10)
    play.lose("b")
    adopts = play.sent(Adopt)
    for name in adopts:
        play.say(name, Adopted(job="job", epoch=1))
    assert not play.sent(Backup)  # The adopter has not caught up.
    play.say("c", CaughtUp(job="job", epoch=1, fragments=[1], steps=10, seconds=1))
    order = play.sent(Backup)["a"]
    assert (order.step, order.epoch, order.backups) == (12, 1, {0: "c", 1: "a", 2: "a"})


def test_reports_show_too_that_an_adopter_has_caught_up() -> None:
    play = Play("abc", backup_every=500)
    play.train(1, 4)
    play.lose("b")
    for name in play.sent(Adopt):
        play.say(name, Adopted(job="job", epoch=1))
    for step in range(1, 5):
        assert play.run.switch is not None
        play.report_fragments("c", step, [1])
    assert play.run.switch is None


def test_a_round_that_was_under_way_is_given_up() -> None:
    play = Play("abc", backup_every=5)
    play.train(1, 5)
    order = play.sent(Backup)["a"]
    play.hold_all(order, but=[2])
    play.lose("b")
    play.hold_all(order)
    assert play.run.common_step == 0


def test_who_can_t_adopt_sends_the_job_back() -> None:
    play = Play("abc")
    play.backed_up()
    play.lose("b")
    play.say("c", CantAdopt(job="job", epoch=0, message="of a plan that is over"))
    assert play.job.restarts == 0
    play.say("c", CantAdopt(job="job", epoch=1, message="out of memory"))
    assert play.job.restarts == 1
    assert any("worker c can't take over: out of memory" in story for story in play.stories())


def test_a_placement_that_was_not_heard_is_said_again() -> None:
    play = Play("abc")
    play.backed_up()
    play.lose("b")
    adopts = play.sent(Adopt)
    play.say("a", Adopted(job="job", epoch=1))
    play.tick(6)
    assert play.sent(Adopt) == {"c": adopts["c"]}


def test_finished_must_be_said_of_the_new_placement() -> None:
    play = Play("ab", steps=4)
    play.train(1, 3)
    play.report("a", 4)
    play.say("a", Finished(job="job", epoch=0))
    play.lose("b")
    play.all_adopted()
    play.say("a", Finished(job="job", epoch=0))  # Repeated after a broken connection.
    assert play.state() == "running"
    play.report_fragments("a", 4, [1])
    play.say("a", Finished(job="job", epoch=1))
    assert play.state() == "done"
    assert play.job.step == 4


def test_nobody_is_needed_once_all_are_finished() -> None:
    play = Play("ab", steps=2)
    play.train(1, 2)
    play.job.writing = [2]
    play.finish()
    play.lose("b")
    assert not play.sent(Adopt)
    assert play.state() == "running"


def test_before_the_first_snapshot_anybody_can_begin_at_the_run_s_checkpoint() -> None:
    play = Play("abc", every=2)
    play.train(1, 1)
    play.run.from_origin = False
    play.lose("b")
    assert play.job.restarts == 0
    assert play.sent(Adopt)


def test_a_worker_that_comes_back_is_evicted() -> None:
    play = Play("abc")
    play.backed_up()
    play.lose("b")
    play.report("b", 7)
    assert play.sent(Shutdown)["b"].evicted


# A closed connection ----------------------------------------------------------------------------------------------


def probes(play: Play) -> list[str]:
    return [each.worker for each in play.out if isinstance(each, ev.ProbeWorker)]


def test_a_closed_connection_is_looked_into_and_not_believed() -> None:
    play = Play("abc")
    play.backed_up()
    play.say("a", PeerLost(job="job", peer="b"))
    assert probes(play) == ["b"]
    assert play.member("b").live
    play.say("c", PeerLost(job="job", peer="b"))
    assert probes(play) == ["b"]
    play.tick(0.4)
    play.say("c", PeerLost(job="job", peer="b"))
    assert probes(play) == ["b", "b"]
    play.vanish("b")
    assert set(play.sent(Adopt)) == {"a", "c"}
    assert "worker b lost at step 6 (connection closed)" in play.stories()
    play.vanish("b")
    assert not play.sent(Adopt)


@pytest.mark.parametrize("peer", ["d", "nobody"])
def test_only_peers_of_the_job_are_looked_into(peer: str) -> None:
    play = Play("abcd", hosts=3)
    play.say("a", PeerLost(job="job", peer=peer))
    play.say("d", PeerLost(job="job", peer="a"))
    assert probes(play) == []


# A coordinator that was restarted ---------------------------------------------------------------------------------


def test_a_restarted_coordinator_knows_who_holds_what() -> None:
    play = Play("abc")
    step = play.backed_up()
    play.restart_coordinator()
    play.tick(1)
    play.vanish("b")
    adopt = play.sent(Adopt)["c"]
    assert (adopt.step, adopt.plan.placement) == (step, ("a", "c", "c"))


def test_a_restarted_coordinator_gives_half_a_round_up() -> None:
    play = Play("abc", backup_every=5)
    play.train(1, 5)
    order = play.sent(Backup)["a"]
    play.hold_all(order, but=[2])
    play.restart_coordinator()
    play.hold_all(order)
    assert play.run.common_step == 0
    play.train(6, 6)
    again = play.sent(Backup)["a"]
    play.train(7, 8)
    play.hold_all(again)
    assert play.run.common_step == again.step == 7


def test_a_restarted_coordinator_says_the_new_placement_again() -> None:
    play = Play("abc")
    play.backed_up()
    play.lose("b")
    adopts = play.sent(Adopt)
    play.say("a", Adopted(job="job", epoch=1))
    play.restart_coordinator()
    assert play.sent(Adopt) == {"c": adopts["c"]}
