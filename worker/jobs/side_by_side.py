"""Computes micro-batches of a step that is replayed at the same time, on cores that wait as everybody waits for the replay.

In training a backward waits for what the others make of its forward. A replay has both in the inbox: what came forward and
what comes back. So forward and backward of several micro-batches can run at once, each on a thread of its own, and their
tasks, which keep their order, take what is there. The gradients of parameters add up as the backwards' turns come, so no
bit changes.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import partial

from executor.lanes import Lanes
from executor.ordering import Task, TaskKind
from executor.program import Whole
from worker.jobs.assembly import Assembly, Piece
from worker.machine.memory import MemoryGuard
from worker.protocol.session import Session
from worker.transport.arrival import Arrival, on_device, present
from worker.transport.parcel import Parcel

PER_LANE = 2
"""Micro-batches that a lane computes before the compute thread looks what others ask for."""
_SPARED = 0.1
"""Share of the memory limit that is left alone: figures of memory are estimates, and who goes over the limit fails the job."""


class SideBySide:
    """Used by the compute thread alone, between the updates of the fragments in `pieces`, which belong to their owner."""

    def __init__(
        self,
        assembly: Assembly,
        pieces: Mapping[int, Piece],
        session: Session[Parcel],
        memory: MemoryGuard,
        lanes: Lanes,
    ) -> None:
        self._assembly = assembly
        self._pieces = pieces
        self._session = session
        self._memory = memory
        self._lanes = lanes
        self._made: dict[tuple[int, int, int], Whole] = {}
        """(fragment, step, micro-batch) -> what waits for its backward's turn."""
        self._took: tuple[Task, float] | None = None

    def forward(self, task: Task) -> Whole | None:
        """What the task gives, if it is computed with others; the task is the next one of its fragment."""
        key = (task.fragment, task.step, task.micro_batch)
        if key not in self._made and task.fragment in self._session.replaying:
            self._compute(task)
        whole = self._made.get(key)
        self._took = None if whole is None else (task, whole.forward_seconds)
        return whole

    def backward(self, task: Task) -> Whole | None:
        """What the task gives, if its forward was computed with others; it is forgotten here."""
        whole = self._made.pop((task.fragment, task.step, task.micro_batch), None)
        self._took = None if whole is None else (task, whole.backward_seconds)
        return whole

    def took(self, task: Task) -> float | None:
        """Seconds that the task took on its thread, if it is the one that was asked for last, and was computed with others."""
        return self._took[1] if self._took is not None and self._took[0] == task else None

    def close(self) -> None:
        """Let the threads end."""
        self._lanes.close()

    def forget(self, fragments: set[int]) -> None:
        """These go on elsewhere, or from another state."""
        self._made = {key: whole for key, whole in self._made.items() if key[0] not in fragments}

    def _compute(self, task: Task) -> None:
        piece = self._pieces[task.fragment]
        count = self._room(task.fragment) if piece.program.apart else 0
        calls: list[Callable[[], Whole]] = []
        end = min(self._assembly.prepare.train.micro_batches, task.micro_batch + count)
        for micro_batch in range(task.micro_batch, end):
            arrivals = self._here(Task(TaskKind.FORWARD, task.fragment, task.step, micro_batch))
            gradients = self._here(Task(TaskKind.BACKWARD, task.fragment, task.step, micro_batch))
            if arrivals is None or gradients is None:
                break
            data = piece.feed.training(task.step, micro_batch, piece.placeholders)
            values = {edge: on_device(gradient) for edge, gradient in gradients.items()}
            calls.append(partial(piece.program.whole, task.step, micro_batch, present(arrivals), data, values))
        if len(calls) > 1:
            for micro_batch, whole in enumerate(self._lanes.run(calls), task.micro_batch):
                self._made[task.fragment, task.step, micro_batch] = whole

    def _here(self, task: Task) -> dict[int, Arrival] | None:
        """What has arrived for the task, by edge; None unless all has."""
        inbox, keys = self._session.inbox, self._session.board.needs(task)
        return {key[1]: inbox.get(key) for key in keys} if all(key in inbox for key in keys) else None

    def _room(self, fragment: int) -> int:
        """How many micro-batches to compute: as memory allows, in which as many as there are lanes are at work, and what has
        been made of all is kept.
        """
        ops, named = self._assembly.dag.ops, self._assembly.partition.fragments[fragment]
        saved = sum(ops[op].saved_bytes for op in named.ops)
        made = sum(ops[op].output_bytes for op in named.parameters)
        made += sum(ops[edge.value].output_bytes for edge in (*named.inputs, *named.outputs))
        free = (1 - _SPARED) * self._memory.limit - self._memory.used()
        return min(PER_LANE * self._lanes.count, max(0, int(free - self._lanes.count * saved) // max(1, made)))
