"""The fixed order of one fragment's tasks."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from executor.ordering import Task, TaskKind, TaskOrder, passes

F, B, U, E = TaskKind.FORWARD, TaskKind.BACKWARD, TaskKind.UPDATE, TaskKind.EVALUATE


def drain(order: TaskOrder) -> list[Task]:
    tasks = []
    while (task := order.peek()) is not None:
        tasks.append(task)
        order.advance()
    return tasks


def spelled(schedule: str, micro_batches: int, in_flight: int) -> str:
    return " ".join(f"{kind.name[0]}{index}" for kind, index in passes(schedule, micro_batches, in_flight))  # type: ignore[arg-type]


def test_the_drawn_tables() -> None:
    assert spelled("gpipe", 4, 2) == "F0 F1 F2 F3 B0 B1 B2 B3"
    assert spelled("1f1b", 4, 2) == "F0 F1 B0 F2 B1 F3 B2 B3"
    assert spelled("1f1b", 4, 1) == "F0 B0 F1 B1 F2 B2 F3 B3"
    assert spelled("1f1b", 2, 9) == "F0 F1 B0 B1"


def test_evaluation_follows_the_update_of_every_nth_step() -> None:
    order = TaskOrder(
        3, schedule="1f1b", micro_batches=1, in_flight=1, steps=5, first_step=2, eval_every=2, eval_batches=2
    )
    assert [(task.kind, task.step, task.micro_batch) for task in drain(order)] == [
        (F, 2, 0), (B, 2, 0), (U, 2, 0), (E, 2, 0), (E, 2, 1),
        (F, 3, 0), (B, 3, 0), (U, 3, 0),
        (F, 4, 0), (B, 4, 0), (U, 4, 0), (E, 4, 0), (E, 4, 1),
        (F, 5, 0), (B, 5, 0), (U, 5, 0),
    ]  # fmt: skip
    assert order.finished
    with pytest.raises(ValueError, match="no task left"):
        order.advance()


def test_nothing_to_do_after_the_last_step() -> None:
    assert TaskOrder(0, schedule="gpipe", micro_batches=2, in_flight=1, steps=3, first_step=4).finished


@given(
    schedule=st.sampled_from(["gpipe", "1f1b"]),
    micro_batches=st.integers(1, 9),
    in_flight=st.integers(1, 12),
    steps=st.integers(0, 4),
    first_step=st.integers(1, 4),
)
def test_every_task_once_and_in_micro_batch_order(
    schedule: str, micro_batches: int, in_flight: int, steps: int, first_step: int
) -> None:
    order = TaskOrder(
        0, schedule=schedule, micro_batches=micro_batches, in_flight=in_flight, steps=steps, first_step=first_step
    )  # type: ignore[arg-type]
    tasks = drain(order)
    for step in range(first_step, steps + 1):
        of_step = [task for task in tasks if task.step == step]
        assert of_step[-1].kind is U
        assert [task.micro_batch for task in of_step if task.kind is F] == list(range(micro_batches))
        assert [task.micro_batch for task in of_step if task.kind is B] == list(range(micro_batches))
        ahead = 0
        for task in of_step[:-1]:
            ahead += 1 if task.kind is F else -1
            assert 0 <= ahead <= (micro_batches if schedule == "gpipe" else in_flight)
    assert len(tasks) == max(0, steps - first_step + 1) * (2 * micro_batches + 1)
