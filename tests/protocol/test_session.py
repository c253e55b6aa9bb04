"""Sessions of two workers at moments that schedules seldom meet."""

from __future__ import annotations

from collections.abc import Callable

from protocol_values import CASES, NOTHING, Value

from executor.ordering import Task, TaskKind
from fusion.plan import Plan
from fusion.wire import FrameKind, Header
from worker.protocol import instructions as todo
from worker.protocol.session import Session

CASE = CASES["chain"]


def plan(epoch: int, *placement: str) -> Plan:
    return Plan(
        policy="any",
        schedule=CASE.schedule,
        cuts=CASE.partition.positions,
        placement=placement,
        in_flight=CASE.in_flight,
        codecs={},
        epoch=epoch,
    )


class Workers:
    """`a` and `b`, whose messages arrive at once."""

    def __init__(self, first: Plan) -> None:
        self.reports: list[tuple[str, int, tuple[int, ...]]] = []
        """(worker, step, fragments)."""
        self._sessions = {
            worker: Session[Value](
                job="job",
                worker=worker,
                plan=first,
                partition=CASE.partition,
                train=CASE.train,
                first_step=1,
                empty=NOTHING,
                log_bytes=2**20,
                log_own=True,
            )
            for worker in first.workers
        }

    def run(self, until: Callable[[Task], bool]) -> None:
        """Task after task, those of `a` first, until one has run of which that is true, or none is left."""
        while True:
            session, task = next(
                ((session, task) for session in self._sessions.values() if (task := session.next_task())), (None, None)
            )
            if session is None or task is None:
                return
            self._execute(session, task)
            self._carry()
            if until(task):
                return

    def switch(self, to: Plan, step: int) -> None:
        for session in self._sessions.values():
            session.switch(to, step)
        self._carry()

    def _execute(self, session: Session[Value], task: Task) -> None:
        fragment = CASE.partition.fragments[task.fragment]
        for key in session.board.needs(task):
            session.inbox.take(key)
        made = {
            TaskKind.FORWARD: (FrameKind.ACTIVATION, fragment.outputs),
            TaskKind.BACKWARD: (FrameKind.GRADIENT, fragment.inputs),
        }
        kind, edges = made.get(task.kind, (FrameKind.DONE, ()))
        for edge in edges:
            session.emit(Header("job", session.epoch, kind, edge.index, task.step, task.micro_batch), Value(1))
        session.completed(task)

    def _carry(self) -> None:
        taken = [(worker, each) for worker, session in self._sessions.items() for each in session.take()]
        for worker, instruction in taken:
            match instruction:
                case todo.Send(to, header, parcel):
                    self._sessions[to].arrived(header, worker, parcel)
                case todo.ReportStep(step, fragments):
                    self.reports.append((worker, step, fragments))
        if taken:
            self._carry()


def test_a_step_that_waited_for_a_fragment_that_moves_away_is_told_without_it() -> None:
    workers = Workers(plan(0, "a", "b", "a"))
    workers.run(until=lambda task: task == Task(TaskKind.UPDATE, 2, 2))
    assert workers.reports == [("a", 1, (0, 2)), ("b", 1, (1,))]
    workers.switch(plan(1, "b", "b", "a"), 1)
    workers.run(until=lambda _: False)
    steps = range(1, CASE.train.steps + 1)
    told = {fragment: [step for _, step, ran in workers.reports if fragment in ran] for fragment in range(3)}
    assert told == {fragment: list(steps) for fragment in range(3)}
