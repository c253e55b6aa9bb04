"""When the tasks of a step ran here and what they needed arrived: told of some steps only, for people to look at. Sans I/O."""

from __future__ import annotations

from executor.ordering import Task, TaskKind
from fusion.messages import MAX_TRACED, StepTrace

EVERY, TOLD = 8, 2
"""Of every eight steps the first two are told, the same ones by every worker."""
SLOW_SECONDS = 1.0
"""Steps that take longer are all told: they are few."""


class Trace:
    """The open steps of one worker. Times come in by a clock that never goes back; `epoch` is what it would have read
    at the epoch of the calendar's clock, so that different workers' times can be compared.
    """

    def __init__(self, epoch: float) -> None:
        self._epoch = epoch
        self._tasks: dict[int, list[tuple[TaskKind, int, int, float, float]]] = {}
        self._arrivals: dict[int, list[tuple[bool, int, int, float, str]]] = {}

    def ran(self, task: Task, begin: float, end: float) -> None:
        """A task ran here. Evaluations come after their step's report, so they count to the next one."""
        step = task.step + (task.kind is TaskKind.EVALUATE)
        tasks = self._tasks.setdefault(step, [])
        this = (task.kind, task.fragment, task.micro_batch)
        if tasks and tasks[-1][:3] == this:  # WEIGHTS, op by op
            begin = tasks.pop()[3]
        tasks.append((*this, begin, end))

    def arrived(self, step: int, gradient: bool, fragment: int, micro_batch: int, at: float, sender: str) -> None:
        """What `fragment` made on another worker has arrived."""
        self._arrivals.setdefault(step, []).append((gradient, fragment, micro_batch, at, sender))

    def take(self, step: int, now: float) -> StepTrace | None:
        """What is to be told of a step that is over; forgets it and all before it."""
        tasks, arrivals = self._tasks.get(step, []), self._arrivals.get(step, [])
        for kept in (self._tasks, self._arrivals):
            for old in [other for other in kept if other <= step]:
                del kept[old]
        if not tasks or len(tasks) > MAX_TRACED or len(arrivals) > MAX_TRACED:
            return None
        begun = min(task[3] for task in tasks)
        if (step - 1) % EVERY >= TOLD and now - begun < SLOW_SECONDS:
            return None
        return StepTrace(
            begun=begun - self._epoch,
            told=now - begun,
            tasks=[
                (kind.value, fragment, micro_batch, begin - begun, end - begun)
                for kind, fragment, micro_batch, begin, end in tasks
            ],
            arrivals=[
                ("gradient" if gradient else "activation", fragment, micro_batch, at - begun, sender)
                for gradient, fragment, micro_batch, at, sender in arrivals
            ],
        )
