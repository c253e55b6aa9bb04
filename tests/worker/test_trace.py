"""A trace tells of the same steps on every worker, and of nothing twice."""

from __future__ import annotations

from executor.ordering import Task, TaskKind
from worker.protocol.trace import EVERY, Trace


def run(trace: Trace, step: int, at: float, seconds: float = 0.1) -> None:
    trace.arrived(step, False, 0, 0, at - 0.01, "before")
    trace.ran(Task(TaskKind.FORWARD, 1, step, 0), at, at + seconds)
    trace.ran(Task(TaskKind.UPDATE, 1, step), at + seconds, at + 2 * seconds)


def test_times_are_those_of_the_calendar_relative_to_the_first_task() -> None:
    trace = Trace(epoch=-1000.0)
    run(trace, 1, at=5.0, seconds=0.25)
    told = trace.take(1, now=6.0)
    assert told is not None
    assert (told.begun, told.told) == (1005.0, 1.0)
    assert told.tasks == [("forward", 1, 0, 0.0, 0.25), ("update", 1, 0, 0.25, 0.5)]
    assert told.arrivals == [("activation", 0, 0, 5.0 - 0.01 - 5.0, "before")]
    assert trace.take(1, now=6.0) is None


def test_of_quick_steps_two_in_eight_are_told() -> None:
    trace = Trace(epoch=0.0)
    told = []
    for step in range(1, 2 * EVERY + 1):
        run(trace, step, at=float(step))
        if trace.take(step, now=step + 0.2) is not None:
            told.append(step)
    assert told == [1, 2, 9, 10]


def test_slow_steps_are_all_told() -> None:
    trace = Trace(epoch=0.0)
    run(trace, 5, at=0.0, seconds=3.0)
    assert trace.take(5, now=6.0) is not None


def test_a_step_with_too_many_tasks_is_not_told() -> None:
    trace = Trace(epoch=0.0)
    for micro_batch in range(2001):
        trace.ran(Task(TaskKind.FORWARD, 0, 1, micro_batch), 0.0, 0.1)
    assert trace.take(1, now=1.0) is None


def test_an_evaluation_counts_to_the_next_step() -> None:
    trace = Trace(epoch=0.0)
    run(trace, 1, at=0.0)
    assert trace.take(1, now=0.3) is not None
    trace.ran(Task(TaskKind.EVALUATE, 1, 1, 0), 1.0, 1.5)
    run(trace, 2, at=2.0)
    told = trace.take(2, now=2.3)
    assert told is not None
    assert told.tasks[0] == ("evaluate", 1, 0, 0.0, 0.5)
