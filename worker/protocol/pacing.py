"""Keeps fragments that no gradient comes back to (a frozen stem, say) from running ahead of those they feed. Sans I/O.

Every other fragment is paced by the gradients it waits for. A free-running one may be two steps ahead of its slowest
receiver: each receiving fragment says DONE, on one edge between the two, when it is through with a step.
"""

from __future__ import annotations

from collections.abc import Collection

from dag.cut import Edge, Partition
from executor.ordering import Task, TaskKind
from fusion.wire import FrameKind
from worker.protocol.replay_log import Key

STEPS_AHEAD = 2


def free_running(partition: Partition) -> frozenset[int]:
    """Fragments that feed others and get no gradient back."""
    return frozenset(
        fragment.index
        for fragment in partition.fragments
        if fragment.outputs and not any(edge.gradient for edge in fragment.outputs)
    )


class Pacing:
    """The pacing of the fragments that one worker hosts."""

    def __init__(self, partition: Partition, hosted: Collection[int], first_step: int) -> None:
        free = free_running(partition)
        self._pairs: dict[tuple[int, int], Edge] = {}
        for edge in partition.edges:
            if edge.source in free:
                self._pairs.setdefault((edge.source, edge.target), edge)
        self._edges = partition.edges
        self._to_say: list[Edge] = []
        # Edge -> the last step its target is through with.
        self._done: dict[Edge, int] = {}
        self.host(hosted, first_step)

    def host(self, hosted: Collection[int], first_step: int) -> None:
        """These fragments are hosted from now on; those that are new have everything before `first_step` behind them."""
        self._to_say = [edge for edge in self._pairs.values() if edge.target in hosted]
        self._done = {
            edge: max(self._done.get(edge, 0), first_step - 1) for edge in self._pairs.values() if edge.source in hosted
        }

    @property
    def kept_steps(self) -> int:
        """How many steps, the current one included, receivers may still ask for messages of."""
        return STEPS_AHEAD + 1 if self._done else 2

    def to_say(self, fragment: int) -> list[Edge]:
        """The edges on which `fragment`, hosted here, says DONE after each step."""
        return [edge for edge in self._to_say if edge.target == fragment]

    def through(self, step: int) -> None:
        """Everybody is through with `step`; that they said so may have been lost, and is forgotten."""
        self._done = {edge: max(done, step) for edge, done in self._done.items()}

    def heard(self, edge: int, step: int) -> None:
        """DONE of `step` came on this edge."""
        named = self._edges[edge]
        if named in self._done:
            self._done[named] = max(self._done[named], step)

    def holds(self, task: Task) -> bool:
        """Whether `task` must wait for a receiver to catch up."""
        return bool(self.owed(task))

    def owed(self, task: Task) -> list[Key]:
        """The DONE messages that `task` waits for."""
        if not self._done or task.kind is not TaskKind.FORWARD or task.micro_batch != 0:
            return []
        step = task.step - STEPS_AHEAD
        return [
            (FrameKind.DONE, edge.index, step, 0)
            for edge, done in self._done.items()
            if edge.source == task.fragment and done < step
        ]
