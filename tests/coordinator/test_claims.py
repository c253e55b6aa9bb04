"""A worker that says it is ten times faster than it is: a few steps show it, and plans count on what they show."""

from __future__ import annotations

from collections.abc import Callable

import pytest
from coordinator_cases import job_spec, tiny_dag
from recovery_cases import Play

from coordinator.life import events as ev
from coordinator.plans.planning import Candidate, Predicting, answer
from coordinator.plans.scheduling import scheduler_planner
from fusion.messages import Device
from fusion.plan import Plan


def playing(workers: str, expected: dict[str, float], takes: dict[str, float], **changes: object) -> Play:
    play = Play(workers, backup_every=500)
    for name in workers:
        play.member(name).device = Device(flops_per_second=4e11, **changes)
    play.job.fragments = [
        summary.model_copy(update={"seconds": expected[summary.worker]}) for summary in play.job.fragments
    ]
    play.seconds = takes
    return play


def told(play: Play) -> list[str]:
    return [each.message for each in play.out if isinstance(each, ev.RecordEvent) and each.event == "speed-corrected"]


def test_a_lie_is_corrected_within_a_few_steps_and_a_better_placement_asked_for() -> None:
    play = playing("abc", dict.fromkeys("abc", 0.1), {"a": 0.12, "b": 1.1, "c": 0.1})
    play.train(1, 4)
    assert told(play) == []
    play.train(5, 5)
    assert told(play) == [
        "worker b is 11 times slower than the others, by what each said (4e+11 FLOP/s): its work takes 1.1 s a step, "
        "100 ms was expected; plans count on that from here on"
    ]
    assert play.member("b").slower == pytest.approx(11)
    play.train(6, 8)
    asked = play.asked_plan()
    assert asked.price
    assert asked.slower == {"a": 1.0, "b": pytest.approx(11), "c": 1.0}
    play.train(9, 20)
    assert len(told(play)) == 1


def test_one_of_two_is_enough_to_compare_with_and_the_claim_breaks_the_tie() -> None:
    for takes, who in (({"a": 0.1, "b": 1.2}, "b"), ({"a": 1.2, "b": 0.1}, "a")):
        play = playing("ab", dict.fromkeys("ab", 0.1), takes)
        play.train(1, 6)
        assert [play.member(name).slower > 3 for name in "ab"] == [name == who for name in "ab"]


def test_a_worker_that_said_too_little_is_corrected_too() -> None:
    play = playing("abc", dict.fromkeys("abc", 0.5), {"a": 0.5, "b": 0.05, "c": 0.6})
    play.train(1, 6)
    assert play.member("b").slower == pytest.approx(0.1)
    assert "worker b is 10 times faster than the others, by what each said" in told(play)[0]


@pytest.mark.parametrize(
    ("takes", "why"),
    [
        ({"a": 0.5, "b": 0.6, "c": 0.9}, "everybody is slower than predicted: the cost model is, or cores are shared"),
        ({"a": 0.1, "b": 0.25, "c": 0.1}, "within what the model may be wrong by"),
        ({"a": 0.001, "b": 0.045, "c": 0.001}, "too short to tell"),
    ],
)
def test_what_is_no_lie_is_left_alone(takes: dict[str, float], why: str) -> None:
    expected = 0.001 if takes["a"] < 0.01 else 0.1
    play = playing("abc", dict.fromkeys("abc", expected), takes)
    play.train(1, 20)
    assert told(play) == [], why
    assert [play.member(name).slower for name in "abc"] == [1.0, 1.0, 1.0]


def test_who_does_next_to_no_arithmetic_is_not_judged_by_it() -> None:
    """A single operator may take a quarter of what was expected of it; that says nothing of its worker's speed."""
    play = playing("abc", dict.fromkeys("abc", 0.2), {"a": 0.2, "b": 0.04, "c": 0.2})
    flops = {"a": 10**9, "b": 10**7, "c": 10**9}
    play.job.fragments = [summary.model_copy(update={"flops": flops[summary.worker]}) for summary in play.job.fragments]
    play.train(1, 20)
    assert told(play) == []
    assert play.member("b").slower == 1.0


def test_a_worker_alone_has_nobody_to_be_compared_with() -> None:
    play = playing("a", {"a": 0.1}, {"a": 5.0})
    play.train(1, 12)
    assert told(play) == []


def alone_with_an_idle_worker(takes: float, *, declared: bool = True, idle: Device | None = None) -> Play:
    play = Play("ab", hosts=1, backup_every=500, steps=100)
    play.member("a").device = Device(flops_per_second=4e13, declared=declared)
    play.member("b").device = idle or Device(flops_per_second=4e11)
    play.job.fragments = [summary.model_copy(update={"seconds": 0.1}) for summary in play.job.fragments]
    play.seconds = {"a": takes}
    play.train(1, 3)
    play.answer(play.asked_plan(), ("a",), seconds=0.1, current=0.1)  # On account of the worker that joined.
    play.job.fragments = [summary.model_copy(update={"seconds": 0.1}) for summary in play.job.fragments]
    play.train(4, 12, seconds=1.0)
    return play


def test_who_works_alone_does_not_keep_a_job_by_the_speed_that_it_declared() -> None:
    play = alone_with_an_idle_worker(5.0)
    assert [each.split(":")[0] for each in told(play)] == ["worker a is 50 times slower than it said (4e+13 FLOP/s)"]
    assert play.member("a").slower == pytest.approx(50)
    play.connect_all()  # The idle one stands by.
    play.backed_up(13)
    assert play.run.standby == ["b"]
    asked = play.asked_plan()
    assert asked.price
    assert (asked.workers, asked.slower) == (("a", "b"), {"a": pytest.approx(50), "b": 1.0})
    play.answer(asked, ("b",), seconds=0.5, current=5.0)
    assert play.run.move is not None
    assert (play.run.move.placement, play.run.move.newcomers) == (("b",), [])


@pytest.mark.parametrize(
    ("play", "why"),
    [
        (lambda: alone_with_an_idle_worker(0.9), "the model may be wrong by as much"),
        (lambda: alone_with_an_idle_worker(5.0, declared=False), "what it measured, the idle one measured too"),
        (
            lambda: alone_with_an_idle_worker(5.0, idle=Device(flops_per_second=4e11, declared=True)),
            "or both declared it",
        ),
        (lambda: alone_with_an_idle_worker(5.0, idle=Device()), "the idle one said nothing"),
    ],
)
def test_who_works_alone_is_believed_otherwise(play: Callable[[], Play], why: str) -> None:
    played = play()
    assert told(played) == [], why
    assert played.member("a").slower == 1.0


def test_what_was_found_out_holds_for_the_next_plan_and_can_be_taken_back() -> None:
    play = playing("ab", dict.fromkeys("ab", 0.1), {"a": 0.1, "b": 1.0})
    play.train(1, 6)
    play.lose("a")
    play.restart_coordinator()
    assert play.member("b").slower == pytest.approx(10)
    again = playing("ab", dict.fromkeys("ab", 0.1), {"a": 0.1, "b": 0.1})
    again.member("b").slower = 10.0
    again.train(1, 6)
    assert again.member("b").slower == 1.0
    assert told(again) == ["worker b is as fast as it said (4e+11 FLOP/s); plans count on that from here on"]


def test_the_scheduler_tells_what_each_fragment_takes_by_what_its_worker_says() -> None:
    planner, dag = scheduler_planner(), tiny_dag()
    assert isinstance(planner, Predicting)
    play = Play("ab")
    job = play.job.model_copy(update={"spec": job_spec()})
    pool = [Candidate("a", Device(flops_per_second=1e3)), Candidate("b", Device(flops_per_second=1e4), slower=10.0)]
    asked = ev.MakePlan(job.id, 1, ("a", "b"), None)
    plan, summaries, _ = answer(planner, lambda _: dag, job, pool, asked)
    assert isinstance(plan, Plan)
    for summary in summaries:
        assert summary.seconds is not None
        rate = {"a": 1e3, "b": 1e4}[summary.worker]
        assert summary.seconds > 3 * summary.flops / rate
