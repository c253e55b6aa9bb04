"""Backup rounds: who holds what, when a round is ordered, and when a common step may be relied on."""

from __future__ import annotations

from itertools import pairwise
from typing import cast

import pytest
from recovery_cases import Play

from coordinator.life import events as ev
from coordinator.life.backup_pace import carrying, spacing, spread
from coordinator.life.backup_workers import choose
from coordinator.life.links import Links
from fusion.messages import (
    Backup,
    BackupFailed,
    Commit,
    EvaluationReport,
    Holding,
    LinkFigures,
    LinkMeasured,
)
from fusion.units import format_bytes


def test_each_fragment_is_backed_up_by_the_next_worker() -> None:
    play = Play("abc")
    assert play.run.backups == {0: "b", 1: "c", 2: "a"}
    prepare = next(each for each in play.out if isinstance(each, ev.PrepareWorkers))
    assert prepare.backups == {0: "b", 1: "c", 2: "a"}


def measured(play: Play, seconds: dict[str, float], rate: float = 1e9) -> Links:
    """Links between pairs of workers, named by their letters."""
    links = Links()
    for pair, each in seconds.items():
        names = [member for member in play.lifecycle.pool.live() if member.name in pair]
        for member in names:
            member.probes, member.joined_at = True, 0.0
        links.hurry(pair)
        assert links.due(100.0, names) == [tuple(names)]
        figures = LinkFigures(seconds=each, bytes_per_second=rate)
        links.measured(100.0, pair[0], LinkMeasured(peer=pair[1], there=figures, back=figures))
    return links


def test_a_near_worker_is_chosen_before_a_far_one_and_one_that_nobody_measured() -> None:
    """Without measurements `a` is backed up by `c`, half way round; a link of 20 ms and one of 60 ms are alike here."""
    play = Play("abcd")
    assert play.run.backups == {0: "c", 1: "d", 2: "a", 3: "b"}

    def chosen(**seconds: float) -> str:
        links = measured(play, seconds)
        return choose(play.job, play.plan, play.lifecycle.pool.of_job("job"), None, links)[0][0]

    assert chosen(ab=0.02, ac=0.06, ad=0.5) == "c"
    assert chosen(ab=0.02, ac=0.5, ad=0.5) == "b"
    assert chosen(ad=0.02) == "d"
    assert chosen(ac=0.4, ad=0.3) == "c"


def test_a_worker_of_another_machine_is_chosen_before_one_that_a_power_cut_takes_along() -> None:
    play = Play("abcd")
    for name, machine in zip("abcd", ("one", "two", "one", ""), strict=True):
        found = play.member(name)
        found.device = found.device.model_copy(update={"machine": machine})

    def chosen(links: Links | None = None) -> dict[int, str]:
        return choose(play.job, play.plan, play.lifecycle.pool.of_job("job"), None, links)[0]

    assert chosen() == {0: "d", 1: "d", 2: "b", 3: "b"}
    # But not over a slow link: a snapshot would take too long.
    assert chosen(measured(play, {"ac": 0.0, "ab": 0.5, "ad": 0.5}))[0] == "c"


@pytest.mark.parametrize(
    ("traffic", "expected"),
    [
        (10_000, {0: "c", 1: "d", 2: "a", 3: "b"}),  # 10 ms of a step of one second: half way round
        (200_000, {0: "b", 1: "a", 2: "b", 3: "c"}),  # to each neighbour a fifth of a step
    ],
)
def test_a_neighbour_is_chosen_where_a_step_s_traffic_takes_long(traffic: int, expected: dict[int, str]) -> None:
    """Its own side of what it replays and goes on with does not cross a link."""
    play = Play("abcd")
    plan = play.plan.model_copy(update={"predicted_step_seconds": 1.0})
    for summary in play.job.fragments:
        neighbours = {summary.index - 1, summary.index + 1} & {0, 1, 2, 3}
        summary.traffic = dict.fromkeys(neighbours, traffic // play.job.train.micro_batches)
    links = measured(play, dict.fromkeys(["ab", "ac", "ad", "bc", "bd", "cd"], 0.0), rate=1e6)
    assert choose(play.job, plan, play.lifecycle.pool.of_job("job"), None, links)[0] == expected


def test_a_worker_without_room_is_passed_over() -> None:
    # AdamW keeps two slots: a fragment takes 4 times its parameters where it is trained, 6 where two snapshots are held.
    play = Play("abc", memory={"b": 9000, "c": 0}, fragment_bytes=1000)
    assert play.run.backups == {0: "c", 1: "c", 2: "a"}


def test_people_are_told_what_has_no_backup_and_why() -> None:
    play = Play("ab", memory={"a": 9000, "b": 10_000}, fragment_bytes=1000)
    assert play.run.backups == {0: "b"}
    assert any(f"of fragment 1 ({format_bytes(6000)})" in story for story in play.stories())
    assert "job job runs without a backup: one worker only" in Play("a").stories()


def test_a_single_worker_takes_no_snapshots() -> None:
    play = Play("a")
    play.train(1, 50)
    assert not play.sent(Backup)
    assert not play.sent(Commit)


def test_a_round_is_ordered_ahead_of_everybody() -> None:
    play = Play("abc", backup_every=5)
    play.train(1, 2)
    assert not play.sent(Backup)
    play.train(3, 3)
    orders = play.sent(Backup)
    assert set(orders) == {"a", "b", "c"}
    assert orders["a"] == Backup(job="job", epoch=0, step=5, backups={0: "b", 1: "c", 2: "a"})


def test_a_step_is_common_only_when_all_is_held_and_all_are_through() -> None:
    play = Play("abc", backup_every=5)
    play.train(1, 3)
    order = play.sent(Backup)["a"]
    play.train(4, 5)
    play.hold_all(order, but=[1])
    assert play.run.common_step == 0
    play.say("a", Holding(job="job", epoch=0, step=5, fragment=1))  # Not the backup worker of that fragment.
    play.say("c", Holding(job="job", epoch=0, step=4, fragment=1))  # Not the step.
    assert not play.sent(Commit)
    play.say("c", Holding(job="job", epoch=0, step=5, fragment=1))
    assert play.run.common_step == 5
    assert play.run.holders == {0: "b", 1: "c", 2: "a"}
    assert set(play.sent(Commit)) == {"a", "b", "c"}
    assert play.job.commits == 1


def test_who_is_not_through_with_the_step_is_waited_for() -> None:
    play = Play("abc", backup_every=5)
    play.train(1, 4)
    order = play.sent(Backup)["a"]
    for name in "ab":
        play.report(name, 5)
    play.hold_all(order)
    assert not play.sent(Commit)
    play.report("c", 5)
    assert set(play.sent(Commit)) == {"a", "b", "c"}


def test_an_evaluation_after_the_step_is_waited_for() -> None:
    play = Play("ab", backup_every=5, eval_every=5)
    play.train(1, 5)
    play.hold_all(play.sent(Backup)["a"])
    play.say("b", EvaluationReport(job="job", epoch=0, step=5, loss=1.0, batches=1))
    assert not play.sent(Commit)
    play.train(6, 6)
    assert play.sent(Commit)["a"].step == 5


def test_the_record_is_saved_before_anybody_may_forget() -> None:
    play = Play("ab", backup_every=5)
    play.train(1, 5)
    order = play.sent(Backup)["a"]
    play.out.clear()
    play.hold_all(order)
    kinds = [type(each.message) if isinstance(each, ev.Send) else type(each) for each in play.out]
    assert kinds.index(Commit) > kinds.index(ev.SaveJob)


def test_an_order_that_came_too_late_is_given_further_ahead() -> None:
    play = Play("ab", backup_every=5)
    play.train(1, 3)
    order = play.sent(Backup)["a"]
    play.say("a", BackupFailed(job="job", epoch=0, step=order.step, fragment=0, cause="passed"))
    assert play.sent(Backup)["b"].step == 3 + 4
    play.say("a", BackupFailed(job="job", epoch=0, step=7, fragment=0, cause="passed"))
    again = play.sent(Backup)["b"]
    assert again.step == 3 + 8
    play.train(4, 11)
    play.hold_all(order)  # Of the round that was given up.
    assert play.run.common_step == 0
    play.hold_all(again)
    assert play.run.common_step == 11
    assert play.run.margin == 7


def test_a_damaged_snapshot_is_taken_again() -> None:
    play = Play("ab", backup_every=5)
    play.train(1, 5)
    order = play.sent(Backup)["a"]
    play.hold_all(order, but=[0])
    play.say("b", BackupFailed(job="job", epoch=0, step=5, fragment=0, cause="corrupt"))
    assert play.sent(Backup)["a"].step == 7
    assert any("fragment 0 arrived damaged at b" in story for story in play.stories())


def test_a_worker_that_has_no_room_after_all_is_replaced() -> None:
    play = Play("abc", backup_every=5)
    play.train(1, 5)
    order = play.sent(Backup)["a"]
    play.say("b", BackupFailed(job="job", epoch=0, step=order.step, fragment=0, cause="memory", message="full"))
    assert play.sent(Backup)["a"].backups[0] == "c"
    play.say("c", BackupFailed(job="job", epoch=0, step=7, fragment=0, cause="memory"))
    assert play.sent(Backup)["a"].backups == {1: "c", 2: "a"}
    assert any("no other worker has room for the snapshot of fragment 0" in story for story in play.stories())


def test_a_worker_that_can_t_build_what_it_is_to_take_over_is_replaced() -> None:
    """It finds out when it likes, and names no round."""
    play = Play("abc", backup_every=5)
    step = play.backed_up()
    assert play.run.holders[0] == play.run.backups[0] == "b"
    cant = BackupFailed(job="job", epoch=0, step=0, fragment=0, cause="memory", message="full")
    play.say("c", cant)
    assert play.run.backups[0] == "b", "who is no backup of it has no say"
    play.say("b", cant.model_copy(update={"epoch": 7}))
    assert play.run.backups[0] == "b", "of another plan"
    play.say("b", cant)
    assert play.run.backups[0] == "c"
    assert any("worker b has no room to take over fragment 0: full" in story for story in play.stories())
    assert (play.run.common_step, play.run.holders[0]) == (step, "b"), "it still holds the common snapshot"
    play.train(step + 1, step + 5)
    order = play.sent(Backup)["a"]
    assert order.backups[0] == "c"
    play.hold_all(order)
    assert play.run.holders[0] == "c"


def test_a_round_whose_backup_worker_can_t_build_the_fragment_is_given_up() -> None:
    play = Play("abc", backup_every=5)
    play.train(1, 5)
    order = play.sent(Backup)["a"]
    assert order.backups[0] == "b"
    play.say("b", BackupFailed(job="job", epoch=0, step=0, fragment=0, cause="memory"))
    assert play.sent(Backup)["a"].backups[0] == "c"


def test_who_can_t_build_a_fragment_is_replaced_though_the_plan_has_changed_meanwhile() -> None:
    """It says so once."""
    play = Play("abcd", backup_every=5)
    play.backed_up()
    where = play.run.backups[0]
    play.lose(next(name for name in "bcd" if name != where))
    play.all_adopted()
    assert (play.job.epoch, play.run.backups[0]) == (1, where)
    play.say(where, BackupFailed(job="job", epoch=0, step=0, fragment=0, cause="memory"))
    assert play.run.backups[0] not in ("a", where)


def test_fragments_without_a_backup_don_t_keep_the_others_from_it() -> None:
    play = Play("ab", memory={"a": 9000, "b": 10_000}, fragment_bytes=1000, backup_every=5)
    step = play.backed_up()
    assert play.run.holders == {0: "b"}
    assert play.sent(Commit)["a"].step == step


def test_a_filling_log_does_not_wait_for_its_turn() -> None:
    play = Play("ab", backup_every=500, log_memory="1MiB")
    play.train(1, 10)
    assert not play.sent(Backup)
    play.report("a", 11, log_bytes=2**19 + 1)
    assert play.sent(Backup)["a"].step == 13


def test_the_last_step_is_not_backed_up() -> None:
    play = Play("ab", steps=6, backup_every=5)
    play.train(1, 3)
    assert play.sent(Backup)["a"].step == 5
    late = Play("ab", steps=5, backup_every=5)
    late.train(1, 5)
    assert not late.sent(Backup)


def test_a_round_that_got_lost_is_ordered_again() -> None:
    play = Play("ab", backup_every=5)
    play.train(1, 5)
    assert play.sent(Backup)["a"].step == 5
    play.tick(59)
    assert not play.sent(Backup)
    play.tick(2)
    assert play.sent(Backup)["a"].step == 7


@pytest.mark.parametrize(
    ("pace", "cost", "steps"),
    [
        (0.0, 0.0, 3),
        (0.1, 0.0, 3),
        (0.1, 0.05, 5),
        (0.1, 1.0, 100),
        (1.0, 0.0, 3),
        (2.0, 0.0, 3),
        (3.0, 0.0, 2),
        (60.0, 2.0, 1),
        (0.005, 0.0, 50),
    ],
)
def test_auto_is_often_unless_rounds_are_dear(pace: float, cost: float, steps: int) -> None:
    assert spacing("auto", pace, cost) == steps
    assert spacing(7, pace, cost) == 7


def test_auto_leaves_the_processor_to_the_training() -> None:
    assert spacing("auto", 0.1, 0.0, work=0.02) == 10  # 20 ms in every second.
    assert spacing("auto", 1.0, 0.0, work=0.02) == 3
    assert spacing(7, 0.1, 0.0, work=1.0) == 7


def test_auto_leaves_the_links_to_the_training() -> None:
    assert spacing("auto", 0.1, 1.0, carrying=0.1) == 60  # 0.1 s in every 6: a round may take longer than that.
    assert spacing("auto", 0.1, 4.0, carrying=0.1) == 80
    assert spacing("auto", 0.1, 0.05, carrying=5.0) == 30  # It took 50 ms: the link can't be that slow.
    assert spacing("auto", 1.0, 0.1, carrying=0.01) == 3
    assert spacing(7, 0.1, 1.0, carrying=1.0) == 7


def test_snapshots_are_spread_where_they_would_be_felt_and_there_is_time() -> None:
    assert spread(72.0, 1.2) == pytest.approx(4.8)
    assert spread(16.0, 1.2) == pytest.approx(2.0)  # A loss in this time replays what came since the round before.
    assert spread(9.0, 1.2) == 0.0  # As fast as it goes takes longer.
    assert spread(72.0, 0.1) == 0.0  # Nothing waits long for that.
    assert spread(3600.0, 10.0) == pytest.approx(20.0)
    assert spread(3600.0, 30.0) == 0.0
    assert spread(72.0, None) == 0.0


def test_hosts_hear_how_long_a_round_may_take_unless_it_is_hurried(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("coordinator.life.backups.carrying", lambda *_: 0.5)
    play = Play("ab", backup_every=100, log_memory="1MiB")
    for step in range(1, 99):
        play.tick(0.1)
        play.train(step, step)
    order = play.sent(Backup)["a"]
    assert order.seconds == spread(100 * play.run.pace, 0.5) > 0.5
    play.tick(5.1)
    again = play.sent(Backup)["a"]
    assert (again.again, again.seconds) == (True, order.seconds)
    play.train(99, 100)
    play.hold_all(order)
    play.train(101, 102)
    play.report("a", 103, log_bytes=2**19 + 1)
    assert play.sent(Backup)["a"].seconds == 0.0


def test_a_round_may_take_as_long_as_its_snapshots_need(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("coordinator.life.backups.carrying", lambda *_: 50.0)
    play = Play("ab", backup_every=5)
    play.train(1, 5)
    order = play.sent(Backup)["a"]
    play.tick(149)
    assert not [each for each in play.sent(Backup).values() if not each.again]
    play.tick(2)
    assert play.sent(Backup)["a"].step > order.step


def test_a_round_may_take_as_long_as_the_one_before(monkeypatch: pytest.MonkeyPatch) -> None:
    play = Play("ab", backup_every=5)
    play.train(1, 5)
    order = play.sent(Backup)["a"]
    play.tick(50)
    play.hold_all(order)
    play.train(6, 10)
    assert play.run.common_step == order.step
    second = play.sent(Backup)["a"]
    play.train(11, second.step)
    play.tick(149)
    assert not [each for each in play.sent(Backup).values() if not each.again]
    play.tick(2)
    assert play.sent(Backup)["a"].step > second.step


def test_the_busiest_link_of_a_round_is_what_counts() -> None:
    play = Play("abc")
    job, plan = play.job, play.plan
    assert plan.placement == ("a", "b", "c")
    bytes_of = [summary.parameter_bytes * (1 + job.train.optimizer.slots) for summary in job.fragments]
    rates = {("a", "b"): 1e6, ("c", "b"): 1e6, ("b", "c"): 1e3}

    class Known:
        def transfer(self, source: str, target: str, count: int) -> float | None:
            rate = rates.get((source, target))
            return None if rate is None else 0.5 + count / rate

    links = cast("Links", Known())
    # Both come in at b: one link.
    assert carrying(job, plan, {0: "b", 2: "b"}, links) == pytest.approx(1.0 + (bytes_of[0] + bytes_of[2]) / 1e6)
    assert carrying(job, plan, {0: "b", 1: "c"}, links) == pytest.approx(
        0.5 + max(bytes_of[0] / 1e6, bytes_of[1] / 1e3)
    )
    assert carrying(job, plan, {0: "c", 1: "c"}, links) is None
    assert carrying(job, plan, {}, links) == 0.0


def test_one_round_that_takes_long_puts_the_next_off_by_twice_as_many_steps_at_most() -> None:
    play = Play("abc", backup_every="auto")
    spacings = []
    common = 0
    for _ in range(4):
        while not (orders := play.sent(Backup)):
            play.train(play.run.highest + 1, play.run.highest + 1)
        order = next(iter(orders.values()))
        spacings.append(order.step - common)
        play.train(play.run.highest + 1, order.step)
        play.tick(30.0)  # The snapshots are on their way for so long.
        play.hold_all(order)
        play.train(order.step + 1, order.step + 1)
        common = play.run.common_step
        assert common == order.step
    assert all(later <= 2 * earlier + play.run.margin for earlier, later in pairwise(spacings))
    assert spacings[-1] > 2 * spacings[0]
