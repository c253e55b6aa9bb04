"""The order of one fragment's tasks: what the schedule lets it do after what.

With 4 micro-batches, fragment 0 of 2 (`in_flight` 2) and fragment 1 (`in_flight` 1), F forward, B backward, U update::

    gpipe  0:  F0 F1 F2 F3 B0 B1 B2 B3 U
           1:  F0 F1 F2 F3 B0 B1 B2 B3 U
    1f1b   0:  F0 F1 B0 F2 B1 F3 B2 B3 U
           1:  F0 B0 F1 B1 F2 B2 F3 B3 U

The executor and the simulator both follow this class. It knows nothing of arrivals: `executor.board` adds them.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from enum import Enum

from dag.cut import Partition
from fusion.plan import ScheduleName


class TaskKind(Enum):
    """What a task does with its fragment."""

    FORWARD = "forward"
    BACKWARD = "backward"
    WEIGHTS = "weights"
    """The gradients of weights that a backward has left (`Fragment.postponed`). In no fixed order: `executor.board`."""
    UPDATE = "update"
    EVALUATE = "evaluate"


@dataclass(frozen=True, slots=True)
class Task:
    """One unit of work. `micro_batch` is 0 for UPDATE and counts evaluation batches for EVALUATE; steps count from 1."""

    kind: TaskKind
    fragment: int
    step: int
    micro_batch: int = 0


def passes(schedule: ScheduleName, micro_batches: int, in_flight: int) -> tuple[tuple[TaskKind, int], ...]:
    """The forwards and backwards of one step in order, as (kind, micro-batch).

    Both run in micro-batch order. A forward is at most `in_flight` micro-batches ahead of its backward (1F1B);
    GPipe runs all forwards first.
    """
    ahead = micro_batches if schedule == "gpipe" else max(1, min(in_flight, micro_batches))
    order = [(TaskKind.FORWARD, index) for index in range(ahead)]
    for index in range(micro_batches):
        order.append((TaskKind.BACKWARD, index))
        if index + ahead < micro_batches:
            order.append((TaskKind.FORWARD, index + ahead))
    return tuple(order)


def safe_in_flight(partition: Partition, micro_batches: int, in_flight: Sequence[int]) -> tuple[int, ...]:
    """`in_flight` per fragment, lowered where it would deadlock.

    Before its backward of micro-batch m, a fragment runs its forward of m + in_flight - 1, which needs that forward of
    every fragment that feeds it. So a fragment may never be allowed more in flight than any fragment that feeds it.
    With that, each turn round a would-be cycle of waits leads to a lower micro-batch, so there is no cycle.
    """
    safe = [max(1, min(count, micro_batches)) for count in in_flight]
    for edge in sorted(partition.edges, key=lambda edge: edge.target):
        # Sources are lower than targets, so a source's own limit is final before it limits its targets.
        safe[edge.target] = min(safe[edge.target], safe[edge.source])
    return tuple(safe)


class TaskOrder:
    """One fragment's tasks in their fixed order, from `first_step` to `steps`.

    After the passes of a step come its UPDATE and, after every `eval_every` steps, `eval_batches` EVALUATEs.
    `peek` tells the next task, `advance` moves past it.
    """

    def __init__(
        self,
        fragment: int,
        *,
        schedule: ScheduleName,
        micro_batches: int,
        in_flight: int,
        steps: int,
        first_step: int = 1,
        eval_every: int | None = None,
        eval_batches: int = 0,
    ) -> None:
        if micro_batches < 1 or first_step < 1:
            raise ValueError(f"micro_batches {micro_batches} and first_step {first_step} must be at least 1")
        self.fragment = fragment
        self.steps = steps
        self._training = (*passes(schedule, micro_batches, in_flight), (TaskKind.UPDATE, 0))
        self._evaluation = tuple((TaskKind.EVALUATE, index) for index in range(eval_batches))
        self._eval_every = eval_every
        self._step = first_step
        self._position = 0
        self._tasks = self._of_step(first_step)
        self._next = self._make()

    @property
    def finished(self) -> bool:
        return self._next is None

    def evaluates(self, step: int) -> bool:
        """Whether EVALUATE tasks follow the update of `step`."""
        return bool(self._evaluation) and self._eval_every is not None and step % self._eval_every == 0

    def peek(self) -> Task | None:
        """The next task; None after the last."""
        return self._next

    def advance(self) -> None:
        """Move past the next task. Raises `ValueError` after the last."""
        if self._next is None:
            raise ValueError(f"fragment {self.fragment} has no task left")
        self._position += 1
        if self._position == len(self._tasks):
            self._step += 1
            self._position = 0
            self._tasks = self._of_step(self._step)
        self._next = self._make()

    def _of_step(self, step: int) -> tuple[tuple[TaskKind, int], ...]:
        return self._training + self._evaluation if self.evaluates(step) else self._training

    def _make(self) -> Task | None:
        if self._step > self.steps:
            return None
        kind, micro_batch = self._tasks[self._position]
        return Task(kind, self.fragment, self._step, micro_batch)
