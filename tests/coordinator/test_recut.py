"""Other cuts for a running job: only where the bits don't depend on them, only when it pays, from a checkpoint."""

from __future__ import annotations

from coordinator_cases import ref_of
from recovery_cases import Play

from coordinator.life import events as ev
from fusion.messages import CheckpointPart
from fusion.spec import CompressionSpec


def after_a_loss(play: Play) -> ev.MakePlan:
    """c is lost, the others adopt its fragment, and the scheduler is asked for a better placement."""
    play.backed_up()
    play.lose("c")
    play.all_adopted()
    play.train(play.run.highest + 1, play.run.highest + 12)
    return play.asked_plan()


def checkpoint(play: Play) -> int:
    """Train to the next checkpoint, and have it written."""
    every = play.job.train.checkpoint_every
    assert every is not None
    step = (play.run.highest // every + 1) * every
    play.train(play.run.highest + 1, step + 1)
    for fragment, worker in enumerate(play.plan.placement):
        blob = ref_of(f"{step} {fragment}".encode())
        play.say(worker, CheckpointPart(job="job", epoch=play.job.epoch, step=step, fragment=fragment, blob=blob))
    play.post(ev.CheckpointWritten(play.now, "job", step, 1))
    return step


def test_a_job_that_lost_a_worker_is_cut_anew_at_its_next_checkpoint() -> None:
    play = Play("abc", every=50)
    asked = after_a_loss(play)
    assert asked.recut
    play.answer(asked, play.plan.placement, seconds=1.0, current=1.0, fresh=0.6)
    assert any("is to be cut anew at its next checkpoint" in story and "40%" in story for story in play.stories())
    assert play.state() == "running"
    step = checkpoint(play)
    assert (play.state(), play.job.restart_step) == ("preparing", step)
    asked = play.asked_plan()
    assert (asked.previous, sorted(asked.workers)) == (None, ["a", "b"])
    play.answer(asked, ("a", "b"), seconds=0.6)
    assert (play.plan.cuts, play.plan.placement) == ((1,), ("a", "b"))
    assert "1 step run again" in next(story for story in play.stories() if "goes on from its checkpoint" in story)
    play.restart_coordinator()
    play.tick(1.0)
    assert play.asked_plan().previous is not None, "from here on these cuts stay"


def test_a_worker_that_came_takes_part_in_the_new_cut() -> None:
    play = Play("abc", every=50)
    asked = after_a_loss(play)
    play.answer(asked, play.plan.placement, seconds=1.0, current=1.0, fresh=0.6)
    play.join("e")
    checkpoint(play)
    assert sorted(play.asked_plan().workers) == ["a", "b", "e"]


def test_a_new_cut_that_is_refused_leaves_the_old_one() -> None:
    play = Play("abc", every=50)
    asked = after_a_loss(play)
    play.answer(asked, play.plan.placement, seconds=1.0, current=1.0, fresh=0.6)
    checkpoint(play)
    asked = play.asked_plan()
    play.post(ev.PlanRefused(play.now, "job", asked.attempt, "no room"))
    play.tick(1.0)
    again = play.asked_plan()
    assert again.previous is not None
    assert len(again.previous.cuts) == 2


def test_a_twelfth_of_a_step_pays_in_a_long_job() -> None:
    play = Play("abc", every=50, steps=10_000)
    asked = after_a_loss(play)
    play.answer(asked, play.plan.placement, seconds=1.0, current=1.0, fresh=0.92)
    checkpoint(play)
    assert play.state() == "preparing"


def test_what_gains_little_or_comes_late_is_not_worth_it() -> None:
    for fresh, steps in ((0.96, 100_000), (0.92, 1000), (0.6, 90)):
        play = Play("abc", every=50, steps=steps)
        asked = after_a_loss(play)
        play.answer(asked, play.plan.placement, seconds=1.0, current=1.0, fresh=fresh)
        checkpoint(play)
        assert play.state() == "running"


def test_where_cuts_decide_the_bits_they_stay() -> None:
    play = Play("abc", every=50)
    play.job.spec = play.job.spec.model_copy(update={"compression": CompressionSpec(codec="int8")})
    assert not after_a_loss(play).recut


def test_without_checkpoints_there_is_nothing_to_begin_from() -> None:
    assert not after_a_loss(Play("abc")).recut
