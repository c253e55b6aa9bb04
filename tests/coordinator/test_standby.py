"""A worker without a fragment holds the snapshots of a job that is on one worker only. Sans I/O."""

from __future__ import annotations

from recovery_cases import Play

from coordinator.life import events as ev
from fusion.messages import Adopt, Stop


def alone(workers: str = "ab", fragments: int = 2, **settings: int) -> Play:
    """A job whose fragments are all on `a`, which has trained for a while; the others are idle."""
    settings = {"steps": 500, "backup_every": 5, **settings}
    play = Play(workers, hosts=1, fragments=fragments, **settings)  # type: ignore[arg-type]
    assert play.run.backups == {}
    until_one_is_asked(play)
    return play


def until_one_is_asked(play: Play) -> None:
    """Train on; where the scheduler is asked, it finds nothing better. Somebody is asked to stand by before long."""
    for _ in range(5):
        play.train(play.run.highest + 1, play.run.highest + 1, seconds=0.5)
        if any(isinstance(each, ev.MakePlan) for each in play.out):
            play.answer(play.asked_plan(), play.plan.placement, seconds=1.0, current=1.0)
        if play.run.move is not None:
            return
    raise AssertionError("nobody is asked to stand by")


def standing_by(workers: str = "ab", fragments: int = 2) -> Play:
    play = alone(workers, fragments)
    play.connect_all()
    play.tick()
    assert play.run.standby == ["b"]
    return play


def test_an_idle_worker_holds_the_snapshots_and_takes_over_without_a_step_back() -> None:
    play = standing_by()
    assert "worker b holds snapshots of job job, because all fragments are on a" in play.stories()
    assert play.run.backups == {0: "b", 1: "b"}
    common = play.backed_up(play.run.highest + 1)
    play.train(play.run.highest + 1, play.run.highest + 3)
    play.vanish("a")
    order = play.sent(Adopt, clear=False)["b"]
    assert isinstance(order, Adopt)
    assert (order.step, order.plan.placement) == (common, ("b", "b"))
    assert (play.job.state, play.job.restarts, play.run.standby) == ("running", 0, [])
    play.all_adopted()
    # Who was lost comes back, and holds the snapshots in its turn.
    play.join("a")
    until_one_is_asked(play)
    play.connect_all()
    play.tick()
    assert (play.run.standby, play.run.backups) == (["a"], {0: "a", 1: "a"})


def test_a_short_job_bothers_nobody() -> None:
    play = Play("ab", hosts=1, fragments=2, steps=20, backup_every=5)
    play.train(1, 19, seconds=0.12)
    assert play.run.move is None
    assert play.member("b").state == "idle"


def test_who_stands_by_goes_where_a_job_waits_for_workers() -> None:
    play = standing_by()
    other = play.job.model_copy(update={"id": "other", "number": 2, "state": "queued", "reason": "x", "plan": None})
    other.forget_run()
    other.hosts = {}
    play.post(ev.JobSubmitted(play.now, other))
    play.train(play.run.highest + 1, play.run.highest + 1)
    assert isinstance(play.sent(Stop)["b"], Stop)
    assert (play.run.standby, play.run.backups, play.run.round) == ([], {}, None)
    assert play.member("b").job == "other"
    play.train(play.run.highest + 1, play.run.highest + 5, seconds=0.5)
    assert play.run.move is None


def test_who_stands_by_leaves_at_once_and_another_takes_its_place() -> None:
    play = standing_by("abc")
    play.leave("b")
    assert play.member("b").state == "left"
    assert any("worker b leaves (SIGTERM); it has no fragments" in story for story in play.stories())
    until_one_is_asked(play)
    play.connect_all()
    play.tick()
    assert (play.run.standby, play.run.backups) == (["c"], {0: "c", 1: "c"})


def test_the_loss_of_who_stands_by_costs_nothing() -> None:
    play = standing_by("abc")
    play.backed_up(play.run.highest + 1)
    play.vanish("b")
    assert (play.job.state, play.job.restarts, play.run.standby, play.run.backups) == ("running", 0, [], {})
    play.all_adopted()
    until_one_is_asked(play)
    assert play.run.move is not None
    assert play.run.move.newcomers == ["c"]


def test_one_that_can_t_get_ready_is_let_go() -> None:
    play = alone()
    play.tick(61)
    assert any("worker b does not stand by: " in story for story in play.stories())
    assert play.member("b").state == "idle"
    play.train(play.run.highest + 1, play.run.highest + 5, seconds=0.5)
    assert play.run.move is None, "nor asked again at once"


def test_a_restarted_coordinator_knows_who_stands_by() -> None:
    play = standing_by()
    common = play.backed_up(play.run.highest + 1)
    play.restart_coordinator()
    assert play.run.standby == ["b"]
    play.tick()
    play.vanish("a")
    assert play.sent(Adopt)["b"].step == common  # type: ignore[attr-defined]


def test_two_workers_need_nobody_to_stand_by() -> None:
    play = Play("abc", hosts=2, fragments=2, steps=500, backup_every=5)
    play.train(1, 20, seconds=0.5)
    assert play.run.move is None or play.run.move.placement != play.plan.placement
    assert play.run.standby == []
