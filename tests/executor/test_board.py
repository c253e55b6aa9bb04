"""Any partition, placement and order of arrival: the boards never deadlock and run every task once, in order."""

from __future__ import annotations

import random
from collections.abc import Collection
from dataclasses import dataclass

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from dag.cut import Edge, Fragment, Partition
from dag.graph import TensorMeta
from executor.board import Key, TaskBoard
from executor.ordering import Task, TaskKind, TaskOrder, safe_in_flight
from fusion.wire import FrameKind

META = TensorMeta((2,), "float32")


def partition_of(count: int, edges: list[tuple[int, int, str, bool]], postponing: Collection[int] = ()) -> Partition:
    """Fragments 0 .. count - 1 and edges (source, target, kind, gradient)."""
    made = tuple(
        Edge(index, index, source, target, kind, META, gradient)  # type: ignore[arg-type]
        for index, (source, target, kind, gradient) in enumerate(edges)
    )
    fragments = tuple(
        Fragment(
            index=index,
            ops=(),
            placeholders=(),
            parameters=(),
            borrowed=tuple(edge.value for edge in made if edge.target == index and edge.kind == "parameter"),
            written_buffers=(),
            constants=(),
            inputs=tuple(edge for edge in made if edge.target == index),
            outputs=tuple(edge for edge in made if edge.source == index),
            has_loss=index == count - 1,
            postponed=((index, (index,)),) if index in postponing else (),
        )
        for index in range(count)
    )
    return Partition(tuple(range(1, count)), fragments, made)


@dataclass
class Pool:
    """Boards of all workers and the messages between them."""

    boards: list[TaskBoard]
    partition: Partition
    micro_batches: int
    clip: bool
    random: random.Random
    first_step: int
    lossy: bool = False

    def play(self) -> list[Task]:
        """Run to the end in a random order; returns the tasks as they ran."""
        travelling: list[tuple[TaskBoard, Key]] = []
        sent: set[Key] = set()
        ran: list[Task] = []

        def send(key: Key) -> None:
            sent.add(key)
            for board in self.boards:
                if not (self.lossy and self.random.random() < 0.3):
                    travelling.append((board, key))
                if self.random.random() < 0.2:
                    travelling.append((board, key))

        def lend(fragment: int, step: int) -> None:
            if any(board.wants_parameters(step) for board in self.boards):
                for edge in self.partition.fragments[fragment].outputs:
                    if edge.kind == "parameter":
                        send((FrameKind.ACTIVATION, edge.index, step, 0))

        for fragment in self.partition.fragments:
            lend(fragment.index, self.first_step)
        while not all(board.finished for board in self.boards):
            ready = [(board, task) for board in self.boards if (task := board.next_task()) is not None]
            if ready and (not travelling or self.random.random() < 0.6):
                board, task = self.random.choice(ready)
                assert board.next_task() == task
                norms_due = self.clip and board.completes_gradients(task)
                board.completed(task)
                ran.append(task)
                fragment = self.partition.fragments[task.fragment]
                forward = {TaskKind.FORWARD: FrameKind.ACTIVATION, TaskKind.EVALUATE: FrameKind.EVALUATION}
                if task.kind in forward:
                    for edge in fragment.outputs:
                        if edge.kind == "activation":
                            send((forward[task.kind], edge.index, task.step, task.micro_batch))
                elif task.kind is TaskKind.BACKWARD:
                    for edge in fragment.inputs:
                        if edge.gradient:
                            send((FrameKind.GRADIENT, edge.index, task.step, task.micro_batch))
                elif task.kind is TaskKind.UPDATE:
                    lend(task.fragment, task.step + 1)
                if norms_due:
                    send((FrameKind.NORMS, task.fragment, task.step, 0))
            elif travelling:
                board, key = travelling.pop(self.random.randrange(len(travelling)))
                took = board.arrived(*key)
                assert not board.arrived(*key), "a duplicate was taken"
                del took
            else:
                # Nothing moves: every board asks again for what it is owed, and only what was sent can be answered.
                asked = [(board, key) for board in self.boards for key in board.owed() if key in sent]
                assert asked, "deadlock"
                travelling.extend(asked)
        return ran


@st.composite
def pools(draw: st.DrawFn) -> tuple[Pool, int, int | None, int]:
    count = draw(st.integers(1, 6))
    pairs = [(source, target) for source in range(count) for target in range(source + 1, count)]
    chain = [(index, index + 1, "activation", draw(st.booleans())) for index in range(count - 1) if draw(st.booleans())]
    skips = draw(st.lists(st.sampled_from(pairs), max_size=5)) if pairs else []
    extra = [(s, t, draw(st.sampled_from(["activation", "parameter"])), draw(st.booleans())) for s, t in skips]
    postponing = draw(st.sets(st.integers(0, count - 1)))
    partition = partition_of(count, chain + extra, postponing)
    weights_behind = draw(st.just(()) | st.lists(st.integers(0, 4), min_size=count, max_size=count).map(tuple))
    workers = draw(st.integers(1, count))
    placement = [draw(st.integers(0, workers - 1)) for _ in range(count)]
    micro_batches = draw(st.integers(1, 5))
    first_step = draw(st.integers(1, 3))
    steps = first_step + draw(st.integers(0, 2))
    eval_every = draw(st.none() | st.integers(1, 2))
    eval_batches = draw(st.integers(0, 2))
    clip = draw(st.booleans())
    in_flight = [draw(st.integers(1, 6)) for _ in range(count)]
    schedule = draw(st.sampled_from(["gpipe", "1f1b"]))
    boards = [
        TaskBoard(
            partition,
            [index for index in range(count) if placement[index] == worker],
            schedule=schedule,
            micro_batches=micro_batches,
            in_flight=in_flight,
            steps=steps,
            clip=clip,
            weights_behind=weights_behind,
            first_step=first_step,
            eval_every=eval_every,
            eval_batches=eval_batches,
        )
        for worker in sorted(set(placement))
    ]
    shuffle = random.Random(draw(st.integers(0, 2**32)))
    pool = Pool(boards, partition, micro_batches, clip, shuffle, first_step, lossy=draw(st.booleans()))
    leaving = sum(index in postponing and behind > 0 for index, behind in enumerate(weights_behind))
    expected = (steps - first_step + 1) * micro_batches * leaving
    for index in range(count):
        order = TaskOrder(
            index,
            schedule=schedule,
            micro_batches=micro_batches,
            in_flight=safe_in_flight(partition, micro_batches, in_flight)[index],
            steps=steps,
            first_step=first_step,
            eval_every=eval_every,
            eval_batches=eval_batches,
        )
        while not order.finished:
            expected += 1
            order.advance()
    return pool, expected, eval_every, steps


@settings(max_examples=150, deadline=None)
@given(pools())
def test_never_deadlocks_and_runs_every_task_once_in_order(made: tuple[Pool, int, int | None, int]) -> None:
    pool, expected, _, _ = made
    ran = pool.play()
    assert len(ran) == len(set(ran)) == expected
    for board in pool.boards:
        for index in board.orders:
            mine = [task for task in ran if task.fragment == index]
            for kind in TaskKind:
                keys = [(task.step, task.micro_batch) for task in mine if task.kind is kind]
                assert keys == sorted(keys)
            most = board.weights_behind[index] if board.weights_behind else 0
            if most and pool.partition.fragments[index].postponed:
                _check_weights(mine, most)
            else:
                assert not any(task.kind is TaskKind.WEIGHTS for task in mine)
        assert board.next_task() is None
        assert board.owed() == []


def _check_weights(tasks: list[Task], most: int) -> None:
    """Each after its own backward, never more than `most` of them waiting, all before the update."""
    waiting: list[tuple[int, int]] = []
    for task in tasks:
        match task.kind:
            case TaskKind.BACKWARD:
                assert len(waiting) < most
                waiting.append((task.step, task.micro_batch))
            case TaskKind.WEIGHTS:
                assert waiting.pop(0) == (task.step, task.micro_batch)
            case TaskKind.UPDATE:
                assert not waiting


def board_of(partition: Partition, hosted: list[int], **options: object) -> TaskBoard:
    defaults: dict[str, object] = {
        "schedule": "1f1b",
        "micro_batches": 2,
        "in_flight": [2] * len(partition.fragments),
        "steps": 3,
        "clip": False,
    }
    return TaskBoard(partition, hosted, **(defaults | options))  # type: ignore[arg-type]


def test_unknown_old_and_duplicate_arrivals_are_refused() -> None:
    partition = partition_of(2, [(0, 1, "activation", True), (0, 1, "activation", False)])
    board = board_of(partition, [1], first_step=2)
    assert board.owed() == [(FrameKind.ACTIVATION, 0, 2, 0), (FrameKind.ACTIVATION, 1, 2, 0)]
    assert not board.arrived(FrameKind.ACTIVATION, 0, 1, 0), "before the first step"
    assert not board.arrived(FrameKind.ACTIVATION, 0, 4, 0), "after the last"
    assert not board.arrived(FrameKind.ACTIVATION, 0, 2, 2), "no such micro-batch"
    assert not board.arrived(FrameKind.ACTIVATION, 7, 2, 0), "no such edge"
    assert not board.arrived(FrameKind.GRADIENT, 0, 2, 0), "for another fragment"
    assert not board.arrived(FrameKind.EVALUATION, 0, 2, 0), "no evaluation asked for"
    assert not board.arrived(FrameKind.NORMS, 0, 2, 0), "no clipping asked for"
    assert board.arrived(FrameKind.ACTIVATION, 0, 2, 0)
    assert not board.arrived(FrameKind.ACTIVATION, 0, 2, 0), "here already"
    assert board.next_task() is None
    assert board.arrived(FrameKind.ACTIVATION, 1, 2, 0)
    task = board.next_task()
    assert task == Task(TaskKind.FORWARD, 1, 2, 0)
    board.completed(task)
    assert not board.arrived(FrameKind.ACTIVATION, 0, 2, 0), "used before"


def test_only_the_next_task_can_be_completed() -> None:
    board = board_of(partition_of(1, []), [0])
    with pytest.raises(ValueError, match="not the next task"):
        board.completed(Task(TaskKind.UPDATE, 0, 1, 0))


def test_backward_goes_first_and_the_lower_step_before_all() -> None:
    partition = partition_of(2, [(0, 1, "activation", True)])
    board = board_of(partition, [0, 1], micro_batches=3, in_flight=[2, 1])
    ran = []
    while (task := board.next_task()) is not None and len(ran) < 4:
        board.completed(task)
        ran.append((task.kind, task.fragment))
        kind = FrameKind.ACTIVATION if task.kind is TaskKind.FORWARD else FrameKind.GRADIENT
        board.arrived(kind, 0, task.step, task.micro_batch)
    assert ran == [
        (TaskKind.FORWARD, 0),
        (TaskKind.FORWARD, 1),
        (TaskKind.BACKWARD, 1),
        (TaskKind.FORWARD, 0),
    ]


def test_clipping_waits_for_the_norms_of_every_fragment() -> None:
    board = board_of(partition_of(3, []), [1], clip=True, micro_batches=1, steps=1)
    for _ in range(2):
        task = board.next_task()
        assert task is not None
        board.completed(task)
    assert board.owed() == [(FrameKind.NORMS, other, 1, 0) for other in range(3)]
    assert all(board.arrived(FrameKind.NORMS, other, 1, 0) for other in range(3))
    assert board.next_task() == Task(TaskKind.UPDATE, 1, 1, 0)


def test_evaluating_the_last_step_takes_the_parameters_of_one_more() -> None:
    partition = partition_of(2, [(0, 1, "parameter", True)])
    board = board_of(partition, [1], micro_batches=1, steps=1, eval_every=1, eval_batches=1)
    assert board.wants_parameters(2)
    assert not board.wants_parameters(3)
    assert board.arrived(FrameKind.ACTIVATION, 0, 1, 0)
    assert board.arrived(FrameKind.ACTIVATION, 0, 2, 0)
    kinds = []
    while (task := board.next_task()) is not None:
        board.completed(task)
        kinds.append(task.kind)
    assert kinds == [TaskKind.FORWARD, TaskKind.BACKWARD, TaskKind.UPDATE, TaskKind.EVALUATE]
    assert board.finished


def test_weights_wait_until_there_is_nothing_else_to_do() -> None:
    partition = partition_of(2, [(0, 1, "activation", True)], postponing=[1])
    options = {"micro_batches": 3, "in_flight": [3, 3], "steps": 1}

    def ran(weights_behind: tuple[int, ...], *, late: bool) -> str:
        """The last of three micro-batches arrives when nothing else is to be done, or with the others."""
        board = board_of(
            partition, [1], weights_behind=weights_behind, schedule="1f1b", **(options | {"in_flight": [3, 1]})
        )
        for index in range(2 if late else 3):
            board.arrived(FrameKind.ACTIVATION, 0, 1, index)
        found = []
        while not board.finished:
            task = board.next_task()
            if task is None:
                assert board.arrived(FrameKind.ACTIVATION, 0, 1, 2)
                continue
            board.completed(task)
            found.append(f"{task.kind.name[0]}{task.micro_batch}")
        return " ".join(found)

    assert ran((), late=False) == ran((9, 0), late=False) == "F0 B0 F1 B1 F2 B2 U0", "nothing is left for later"
    assert ran((0, 1), late=False) == "F0 B0 W0 F1 B1 W1 F2 B2 W2 U0"
    assert ran((0, 2), late=False) == "F0 B0 F1 B1 W0 F2 B2 W1 W2 U0"
    assert ran((0, 9), late=False) == "F0 B0 F1 B1 F2 B2 W0 W1 W2 U0"
    assert ran((0, 9), late=True) == "F0 B0 F1 B1 W0 W1 F2 B2 W2 U0"


def test_whether_backwards_leave_weights_does_not_change_within_a_step() -> None:
    """Else a backward that does all would come before what an earlier one has left, and sums in another order."""
    partition = partition_of(1, [], postponing=[0])
    board, found = board_of(partition, [0], weights_behind=(2,), in_flight=[2], steps=3), []
    while not board.finished:
        task = board.next_task()
        assert task is not None
        leaves, due = board.postpones(0), board.completes_gradients(task)
        board.completed(task)
        found.append(f"{task.step}{task.kind.name[0]}{task.micro_batch}{'!' if due else ''}")
        if task.kind is TaskKind.BACKWARD and task.micro_batch == 0:
            board.weights_behind = {1: (0,), 2: (3,)}.get(task.step, (0,))
            assert board.postpones(0) == leaves
    first, second, third = (" ".join(name[1:] for name in found if name[0] == step) for step in "123")
    assert first == "F0 F1 B0 W0 B1 W1! U0", "at once, as soon as none may wait"
    assert second == "F0 F1 B0 B1! U0"
    assert third == "F0 F1 B0 W0 B1 W1! U0"


def test_only_the_oldest_weights_can_be_completed() -> None:
    board = board_of(partition_of(1, [], postponing=[0]), [0], weights_behind=(2,), in_flight=[2])
    for kind, index in ((TaskKind.FORWARD, 0), (TaskKind.FORWARD, 1), (TaskKind.BACKWARD, 0), (TaskKind.BACKWARD, 1)):
        board.completed(Task(kind, 0, 1, index))
    for task in (Task(TaskKind.WEIGHTS, 0, 1, 1), Task(TaskKind.WEIGHTS, 1, 1, 0)):
        with pytest.raises(ValueError, match="not the oldest"):
            board.completed(task)
    board.completed(Task(TaskKind.WEIGHTS, 0, 1, 0))
    assert board.next_task() == Task(TaskKind.WEIGHTS, 0, 1, 1)


def test_in_flight_falls_along_every_edge() -> None:
    partition = partition_of(4, [(0, 1, "activation", True), (1, 3, "activation", False), (2, 3, "parameter", True)])
    assert safe_in_flight(partition, 8, [2, 5, 9, 4]) == (2, 2, 8, 2)
    assert safe_in_flight(partition, 1, [0, 5, 9, 4]) == (1, 1, 1, 1)
