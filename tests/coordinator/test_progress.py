"""Steps and evaluations whose reports come late, twice, or never. Sans I/O."""

from __future__ import annotations

import math

import msgpack
import pytest
from coordinator_cases import ref_of
from recovery_cases import Play

from coordinator.life import events as ev
from coordinator.life.jobs import Metric
from coordinator.life.progress import PATIENCE
from fusion.errors import FrameError
from fusion.messages import (
    CheckpointPart,
    EvaluationReport,
    FragmentTimes,
    StepReport,
    decode_to_coordinator,
    encode,
)


def told(play: Play) -> dict[int, Metric]:
    return {each.metric.step: each.metric for each in play.out if isinstance(each, ev.RecordMetric)}


def say(play: Play, name: str, step: int, seconds: float | None = None) -> None:
    """What this worker, which computes the loss if it is b, reports of a step."""
    times = [FragmentTimes(fragment="ab".index(name), forward=0, backward=0, update=0)]
    loss = 10.0 + step if name == "b" else None
    play.say(
        name,
        StepReport(job="job", epoch=0, step=step, fragments=times, sent_bytes=1, loss=loss, seconds=seconds),
    )


def evaluate(play: Play, step: int) -> None:
    play.say("b", EvaluationReport(job="job", epoch=0, step=step, loss=20.0 + step, batches=1))


def almost_over() -> Play:
    """Everybody has finished, and b's reports of the last step, which is evaluated, have not come."""
    play = Play("ab", steps=2, eval_every=2)
    say(play, "b", 1)
    for step in (1, 2):
        say(play, "a", step)
    play.finish()
    return play


def test_what_overtook_the_reports_that_are_said_again_waits_for_them() -> None:
    """A connection breaks; what was sent before that was noticed arrives first on the new one, the repeats after it."""
    play = Play("ab")
    for step in (1, 2, 3):
        say(play, "a", step)
    say(play, "b", 1)
    say(play, "b", 3)
    assert list(told(play)) == [1]
    for step in (1, 2, 3):
        say(play, "b", step)
    assert {step: metric.loss for step, metric in told(play).items()} == {1: 11.0, 2: 12.0, 3: 13.0}


def test_a_step_of_which_nothing_has_come_yet_is_waited_for_too() -> None:
    play = Play("a")
    for step in (1, 3, 4):
        say(play, "a", step)
    assert list(told(play)) == [1]
    for step in (2, 3, 4):
        say(play, "a", step)
    assert play.metrics() == [1, 2, 3, 4]


def test_a_step_of_which_nothing_ever_comes_counts_in_the_end() -> None:
    play = Play("a")
    for step in (1, 4):
        say(play, "a", step)
    play.tick(PATIENCE + 0.5)
    assert play.metrics() == [1, 2, 3, 4]


def test_a_worker_that_claims_a_step_far_ahead_takes_little_memory() -> None:
    play = Play("a", steps=10**9)
    say(play, "a", 10**9)
    assert len(play.job.partial) <= 1001


def test_steps_whose_reports_come_late_and_all_at_once_took_what_workers_say() -> None:
    play = Play("ab")
    for step in (1, 2):
        play.tick(0.5)
        say(play, "a", step, None if step == 1 else 0.6)
        say(play, "b", step, None if step == 1 else 0.4)
    play.tick(10.0)  # Nobody listens.
    for step in (3, 4, 5):
        say(play, "a", step, 0.6)
        say(play, "b", step, 0.4)
    seconds = {step: round(metric.step_seconds, 3) for step, metric in told(play).items()}
    assert seconds == {1: 0.5, 2: 0.5, 3: 0.6, 4: 0.4, 5: 0.4}


def test_an_evaluation_that_was_overtaken_is_waited_for() -> None:
    play = Play("ab", eval_every=2)
    for step in (1, 2, 3):
        say(play, "a", step)
        say(play, "b", step)
    assert list(told(play)) == [1]
    evaluate(play, 2)
    assert {step: metric.eval_loss for step, metric in told(play).items()} == {1: None, 2: 22.0, 3: None}


def test_what_never_comes_is_waited_for_no_longer_than_a_moment() -> None:
    play = Play("ab", eval_every=3)
    for step in (1, 2, 3, 4):
        say(play, "a", step)
    for step in (1, 3, 4):
        say(play, "b", step)
    play.tick(PATIENCE - 0.5)
    assert list(told(play)) == [1]
    play.tick(1.0)
    assert {step: metric.loss for step, metric in told(play).items()} == {1: 11.0, 2: None, 3: 13.0, 4: 14.0}
    assert told(play)[3].eval_loss is None
    say(play, "b", 2)
    evaluate(play, 3)
    assert len(play.metrics()) == 4


def test_the_last_steps_are_waited_for_before_the_job_is_over() -> None:
    play = almost_over()
    play.tick(PATIENCE - 0.5)
    assert play.job.state == "running"
    say(play, "b", 2)
    assert play.job.state == "running"
    evaluate(play, 2)
    assert play.job.state == "done"
    assert told(play)[2].loss == 12.0
    assert told(play)[2].eval_loss == 22.0


def test_a_job_whose_last_reports_are_lost_ends_all_the_same() -> None:
    play = almost_over()
    play.tick(PATIENCE + 0.5)
    assert play.job.state == "done"
    assert {step: metric.loss for step, metric in told(play).items()} == {1: 11.0, 2: None}


def upload(play: Play, step: int) -> None:
    for fragment, name in enumerate("ab"):
        blob = ref_of(f"{step} {fragment}".encode())
        play.say(name, CheckpointPart(job="job", epoch=0, step=step, fragment=fragment, blob=blob))


def written(play: Play) -> list[int]:
    return [each.step for each in play.out if isinstance(each, ev.WriteCheckpoint)]


def test_a_checkpoint_waits_for_the_evaluation_of_its_step() -> None:
    """Who goes on from it, a drained worker's heirs say, would not evaluate again."""
    play = Play("ab", every=2, eval_every=4)
    for step in (1, 2, 3, 4):
        say(play, "a", step)
        say(play, "b", step)
    upload(play, 2)
    assert written(play) == [2]
    play.post(ev.CheckpointWritten(play.now, "job", 2, 1))
    upload(play, 4)
    assert written(play) == [2]
    evaluate(play, 4)
    assert written(play) == [2, 4]
    assert told(play)[4].eval_loss == 24.0


def test_without_its_checkpoint_a_step_is_evaluated_again() -> None:
    play = Play("ab", every=2, eval_every=2)
    for step in (1, 2):
        say(play, "a", step)
        say(play, "b", step)
    upload(play, 2)
    play.lose("a", "b")
    assert play.job.restart_step == 0
    assert list(told(play)) == [1]


def test_a_checkpoint_waits_no_longer_than_the_step_for_an_evaluation_that_is_lost() -> None:
    play = Play("ab", every=2, eval_every=2)
    for step in (1, 2, 3):
        say(play, "a", step)
        say(play, "b", step)
    upload(play, 2)
    play.tick(PATIENCE + 0.5)
    assert written(play) == [2]
    assert told(play)[2].eval_loss is None


def test_the_last_checkpoint_is_kept_even_if_its_evaluation_is_lost() -> None:
    play = almost_over()
    upload(play, 2)
    play.tick(PATIENCE - 0.5)
    assert written(play) == []
    play.tick(1.0)
    assert written(play) == [2]
    assert play.job.state == "running"
    play.post(ev.CheckpointWritten(play.now, "job", 2, 1))
    assert play.job.state == "done"
    assert play.job.checkpoint == 2


def test_what_belongs_to_no_step_of_the_job_changes_nothing() -> None:
    play = Play("ab", steps=4, every=2, eval_every=2)
    for step in (3, 6, 2**40):
        evaluate(play, step)
    for step, fragment in ((3, 0), (6, 0), (2, -1), (2, 2)):
        blob = ref_of(b"no part")
        play.say("a", CheckpointPart(job="job", epoch=0, step=step, fragment=fragment, blob=blob))
        assert ev.DropBlobs((blob.digest,)) in play.out
    assert not play.job.partial
    assert not play.job.parts
    for step in range(1, 5):
        say(play, "a", step)
        say(play, "b", step)
        if step % 2 == 0:
            evaluate(play, step)
    play.finish()
    assert play.job.state == "done"
    assert list(told(play)) == [1, 2, 3, 4]


def test_a_fragment_that_is_reported_twice_at_once_does_not_stand_for_another() -> None:
    play = Play("ab")
    play.report_fragments("a", 1, [0, 0])
    assert not play.metrics()
    play.report("b", 1)
    assert play.metrics() == [1]


def test_times_of_fragments_that_there_are_not_are_not_kept() -> None:
    play = Play("ab")
    play.seconds["a"] = 1.0
    play.report_fragments("a", 1, [-1, 0, 1, 2, 10**9])
    assert set(play.run.times) <= {0, 1}


@pytest.mark.parametrize("seconds", [math.nan, math.inf, -1.0])
def test_what_is_no_time_is_refused(seconds: float) -> None:
    """A job's record with such a number could not be read again: it would be left out when the coordinator is restarted."""
    times = FragmentTimes(fragment=0, forward=0, backward=0, update=0)
    report = StepReport(job="job", epoch=0, step=1, fragments=[times])
    said = report.model_dump()
    said["fragments"][0]["forward"] = seconds
    with pytest.raises(FrameError, match="bad control message"):
        decode_to_coordinator(msgpack.packb(said))
    assert decode_to_coordinator(encode(report)) == report


def test_a_clock_that_was_set_back_keeps_no_step_waiting() -> None:
    play = Play("ab", steps=10)
    say(play, "a", 1)
    for name in "ab":
        say(play, name, 2)
    assert not play.metrics()
    play.now -= 3600.0
    play.restart_coordinator()
    play.tick(PATIENCE + 0.5)
    assert play.metrics() == [1, 2]


def test_a_part_that_is_of_no_use_is_let_go() -> None:
    play = Play("ab", every=2)
    first, again, late = (ref_of(text) for text in (b"first", b"again", b"late"))
    part = CheckpointPart(job="job", epoch=0, step=2, fragment=0, blob=first)
    play.say("a", part)
    play.say("a", part)
    assert not [each for each in play.out if isinstance(each, ev.DropBlobs)]
    # Who adopted the fragment made other bits of it, on another kind of device.
    play.say("a", part.model_copy(update={"blob": again}))
    assert ev.DropBlobs((first.digest,)) in play.out
    play.post(ev.CancelRequested(play.now, "job"))
    assert ev.DropBlobs((again.digest,)) in play.out
    play.say("b", part.model_copy(update={"fragment": 1, "blob": late}))
    assert ev.DropBlobs((late.digest,)) in play.out
