"""Orders that a broken connection may have lost are given again. Sans I/O."""

from __future__ import annotations

from recovery_cases import Play

from coordinator.life import events as ev
from fusion.messages import Backup, Ready, StepReport, Stop


def prepared(play: Play) -> list[tuple[str, ...]]:
    """Whom the job was prepared on, order by order."""
    found = [each.hosts for each in play.out if isinstance(each, ev.PrepareWorkers)]
    play.out = [each for each in play.out if not isinstance(each, ev.PrepareWorkers)]
    return found


def preparing(workers: str) -> Play:
    """A job that is sent back, and prepared anew on the same workers."""
    play = Play(workers)
    play.lifecycle.go_back(play.job, play.now, "the test wants it")
    play.tick()
    play.answer(play.asked_plan(), tuple(workers))
    assert play.job.state == "preparing"
    return play


def test_who_does_not_get_ready_is_told_again_more_and_more_rarely() -> None:
    play = preparing("ab")
    hosts = play.job.hosts
    assert prepared(play)[-1] == (hosts["a"], hosts["b"])
    play.say("a", Ready(job="job", epoch=play.job.epoch))
    asked = []
    for second in range(1, 30):
        play.tick(1.0)
        for again in prepared(play):
            assert again == (hosts["b"],)
            asked.append(second)
    assert asked == [5, 15]
    play.say("b", Ready(job="job", epoch=play.job.epoch))
    assert play.job.state == "running"
    play.tick(60.0)
    assert not prepared(play)


def test_an_order_for_snapshots_is_given_again_until_its_step_is_reached() -> None:
    play = Play("ab", backup_every=5)
    play.train(1, 4)
    order = play.sent(Backup)["a"]
    assert not order.again
    play.tick(5.0)
    repeated = play.sent(Backup)
    assert {name: (each.step, each.again) for name, each in repeated.items()} == {
        "a": (order.step, True),
        "b": (order.step, True),
    }
    play.train(5, order.step)
    play.tick(20.0)
    assert not play.sent(Backup)


def test_who_works_on_for_a_job_that_is_over_is_stopped_again() -> None:
    play = Play("ab")
    play.train(1, 2)
    play.post(ev.CancelRequested(play.now, "job"))
    assert set(play.sent(Stop)) == {"a", "b"}
    play.say("a", StepReport(job="job", epoch=0, step=3, sent_bytes=1, fragments=[]))
    assert set(play.sent(Stop)) == {"a"}
    assert play.job.state == "cancelled"
