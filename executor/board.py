"""Which task is ready: joins the fixed order of each hosted fragment with what has arrived for it.

Events in (`arrived`, `completed`), decisions out (`next_task`, `owed`). No sockets, clocks, threads or torch, so the
worker and the simulator run the same code.

What a task needs, as keys (kind, edge, step, micro-batch):

========  =====================================================================================================
FORWARD   ACTIVATION of every incoming activation edge, and (micro-batch 0) of every incoming parameter edge
BACKWARD  GRADIENT of every outgoing edge that carries one
WEIGHTS   nothing but the BACKWARD before it
UPDATE    with clipping, NORMS of every fragment of the plan, this one's own included (`edge` is the fragment)
EVALUATE  EVALUATION of every incoming activation edge; ACTIVATION of every incoming parameter edge for step + 1,
          the values that the update has just made
========  =====================================================================================================

So the home of a borrowed parameter sends its value for step `first_step` at the start and for step s + 1 after UPDATE(s)
(after the last update too when an evaluation follows), and every fragment's norms go to all workers, its own included,
after its last backward of a step. Values that one hosted fragment makes for another are arrivals as well.

Where backwards leave the gradients of weights (`Fragment.postponed`, and the plan lets them wait), these run when there
is nothing else to do, when as many micro-batches wait for theirs as the plan allows, and before UPDATE. They go op by op, and
something urgent goes between: what is not completed is given out again. A fragment computes them in micro-batch order, so
the sums have the same bits whenever that is. Whether a fragment's backwards leave them is decided anew for each step.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Sequence
from dataclasses import replace

from dag.cut import Partition
from executor.ordering import Task, TaskKind, TaskOrder, safe_in_flight
from fusion.plan import ScheduleName
from fusion.wire import FrameKind

Key = tuple[FrameKind, int, int, int]
"""(kind, edge, step, micro-batch), as in a wire header."""

# A lower rank goes first: backwards free memory and unblock the fragments before; evaluation holds nobody up.
_RANK = {
    TaskKind.BACKWARD: 0,
    TaskKind.UPDATE: 1,
    TaskKind.WEIGHTS: 2,
    TaskKind.FORWARD: 2,
    TaskKind.EVALUATE: 3,
}


class TaskBoard:
    """The tasks of the fragments that one worker hosts.

    `in_flight` has one entry per fragment of the plan and is lowered where it would deadlock (`safe_in_flight`).
    """

    def __init__(
        self,
        partition: Partition,
        hosted: Sequence[int],
        *,
        schedule: ScheduleName,
        micro_batches: int,
        in_flight: Sequence[int],
        steps: int,
        clip: bool,
        weights_behind: Sequence[int] = (),
        first_step: int = 1,
        eval_every: int | None = None,
        eval_batches: int = 0,
    ) -> None:
        count = len(partition.fragments)
        if len(in_flight) != count:
            raise ValueError(f"in_flight has {len(in_flight)} entries for {count} fragments")
        self._partition = partition
        self._steps = steps
        self._clip = clip
        self._schedule = schedule
        self._micro_batches = micro_batches
        self._in_flight = safe_in_flight(partition, micro_batches, in_flight)
        self.weights_behind = weights_behind
        """As in a plan: one entry per fragment, or none where no backward leaves anything."""
        self._eval_every = eval_every
        self._eval_batches = eval_batches
        self.orders: dict[int, TaskOrder] = {}
        self.hold_after: int | None = None
        """No task of a later step is given out while this is set."""
        self._activations: dict[int, tuple[int, ...]] = {}
        self._parameters: dict[int, tuple[int, ...]] = {}
        self._gradients: dict[int, tuple[int, ...]] = {}
        self._all_fragments = tuple(range(count))
        # How far each fragment got: the first (step, micro-batch) that it has not completed, per kind of task.
        self._reached: dict[tuple[int, TaskKind], tuple[int, int]] = {}
        self._limits = {
            TaskKind.FORWARD: micro_batches,
            TaskKind.BACKWARD: micro_batches,
            TaskKind.WEIGHTS: micro_batches,
            TaskKind.UPDATE: 1,
            TaskKind.EVALUATE: eval_batches,
        }
        self._here: set[Key] = set()
        # For each fragment, what its next task still waits for.
        self._missing: dict[int, set[Key]] = {}
        # For each fragment, whether its backwards of this step leave gradients of weights, and for which micro-batches they
        # have, oldest first.
        self._postpones: dict[int, bool] = {}
        self._postponed: dict[int, deque[Task]] = {}
        for fragment in sorted(hosted):
            self.add(fragment, first_step)

    @property
    def finished(self) -> bool:
        return all(order.finished for order in self.orders.values())

    def add(self, fragment: int, first_step: int) -> None:
        """Host one more fragment, which has everything before `first_step` behind it."""
        self.orders[fragment] = TaskOrder(
            fragment,
            schedule=self._schedule,
            micro_batches=self._micro_batches,
            in_flight=self._in_flight[fragment],
            steps=self._steps,
            first_step=first_step,
            eval_every=self._eval_every,
            eval_batches=self._eval_batches,
        )
        piece = self._partition.fragments[fragment]
        self._activations[fragment] = tuple(e.index for e in piece.inputs if e.kind == "activation")
        self._parameters[fragment] = tuple(e.index for e in piece.inputs if e.kind == "parameter")
        self._gradients[fragment] = tuple(e.index for e in piece.outputs if e.gradient)
        self._reached.update({(fragment, kind): (first_step, 0) for kind in TaskKind})
        self._postpones[fragment] = self._may_postpone(fragment)
        self._postponed[fragment] = deque()
        self._missing[fragment] = self._still_missing(fragment)

    def drop(self, fragment: int) -> list[Key]:
        """Host this fragment no longer; returns what had arrived for it alone."""
        del self.orders[fragment], self._missing[fragment], self._postpones[fragment], self._postponed[fragment]
        unwanted = [key for key in self._here if not self._awaited(key)]
        self._here.difference_update(unwanted)
        return unwanted

    def position(self, fragment: int) -> int:
        """The step that a hosted fragment is in; one more than the last when it has done all."""
        task = self.orders[fragment].peek()
        return task.step if task is not None else self._steps + 1

    def wants_parameters(self, step: int) -> bool:
        """Whether anybody needs the borrowed parameters' values for `step`: the steps, and one more to evaluate the last."""
        return step <= self._steps or (step == self._steps + 1 and self._evaluates(self._steps))

    def arrived(self, kind: FrameKind, edge: int, step: int, micro_batch: int) -> bool:
        """Note that a value is here. False when it is not needed: unknown, already here, or used before."""
        key = (kind, edge, step, micro_batch)
        if key in self._here or not self._awaited(key):
            return False
        self._here.add(key)
        for missing in self._missing.values():
            missing.discard(key)
        return True

    def next_task(self) -> Task | None:
        """The ready task to run now: lowest step first, then backward before forward, then the lower micro-batch.

        WEIGHTS come first where too many wait, or an UPDATE needs them, and otherwise when nothing else is ready.
        """
        for fragment, waiting in self._postponed.items():
            if waiting and len(waiting) >= self._most_behind(fragment):
                return waiting[0]
        best: Task | None = None
        for fragment, order in self.orders.items():
            task = order.peek()
            if task is None or self._missing[fragment] or (best is not None and _priority(best) <= _priority(task)):
                continue
            if self.hold_after is None or task.step <= self.hold_after:
                best = task
        if best is not None and best.kind is TaskKind.UPDATE and self._postponed[best.fragment]:
            return self._postponed[best.fragment][0]
        return self.postponed() if best is None else best

    def postponed(self) -> Task | None:
        """What is to be done when nothing else may: the oldest WEIGHTS."""
        return min((tasks[0] for tasks in self._postponed.values() if tasks), key=_priority, default=None)

    def postpones(self, fragment: int) -> bool:
        """Whether a hosted fragment's backwards leave gradients of weights, in the step that it is in."""
        return self._postpones[fragment]

    def completes_gradients(self, task: Task) -> bool:
        """Whether with `task` its fragment has all gradients of the step: with clipping, its norms are due."""
        last = TaskKind.WEIGHTS if self._postpones[task.fragment] else TaskKind.BACKWARD
        return task.kind is last and task.micro_batch == self._micro_batches - 1

    def needs(self, task: Task) -> tuple[Key, ...]:
        """Keys of everything that must have arrived before `task` may run."""
        fragment, step, micro_batch = task.fragment, task.step, task.micro_batch
        if task.kind is TaskKind.FORWARD:
            activations = [(FrameKind.ACTIVATION, edge, step, micro_batch) for edge in self._activations[fragment]]
            return (*activations, *((FrameKind.ACTIVATION, edge, step, 0) for edge in self._parameters[fragment]))
        if task.kind is TaskKind.BACKWARD:
            return tuple((FrameKind.GRADIENT, edge, step, micro_batch) for edge in self._gradients[fragment])
        if task.kind is TaskKind.WEIGHTS:
            return ()
        if task.kind is TaskKind.UPDATE:
            return tuple((FrameKind.NORMS, other, step, 0) for other in self._all_fragments) if self._clip else ()
        evaluations = [(FrameKind.EVALUATION, edge, step, micro_batch) for edge in self._activations[fragment]]
        return (*evaluations, *((FrameKind.ACTIVATION, edge, step + 1, 0) for edge in self._parameters[fragment]))

    def completed(self, task: Task) -> list[Key]:
        """Note that `task` has run; returns what several tasks used and none needs any more.

        Raises `ValueError` unless it is its fragment's next task.
        """
        if task.kind is TaskKind.WEIGHTS:
            waiting = self._postponed.get(task.fragment)
            if not waiting or waiting[0] != task:
                raise ValueError(f"{task} is not the oldest that its fragment has postponed")
            waiting.popleft()
            return []
        order = self.orders.get(task.fragment)
        if order is None or order.peek() != task:
            raise ValueError(f"{task} is not the next task of a fragment hosted here")
        for key in self.needs(task):
            # Norms serve every fragment here, a borrowed parameter a whole step: both go at the end of the step.
            if key[0] is not FrameKind.NORMS and not self._is_parameter(key):
                self._here.discard(key)
        order.advance()
        self._reached[task.fragment, task.kind] = (task.step, task.micro_batch + 1)
        if task.kind is TaskKind.BACKWARD and self._postpones[task.fragment]:
            self._postponed[task.fragment].append(replace(task, kind=TaskKind.WEIGHTS))
        over: list[Key] = []
        if task.kind is TaskKind.UPDATE:
            self._postpones[task.fragment] = self._may_postpone(task.fragment)
            over = [key for key in self._here if key[2] <= task.step and not self._awaited(key)]
            self._here.difference_update(over)
        self._missing[task.fragment] = self._still_missing(task.fragment)
        return over

    def owed(self) -> list[Key]:
        """What the next task of each fragment waits for, without repeats: ask for it again if it is long in coming."""
        keys = (key for order in self.orders.values() if (task := order.peek()) is not None for key in self.needs(task))
        return [key for key in dict.fromkeys(keys) if key not in self._here]

    def _most_behind(self, fragment: int) -> int:
        return self.weights_behind[fragment] if self.weights_behind else 0

    def _may_postpone(self, fragment: int) -> bool:
        return bool(self._partition.fragments[fragment].postponed) and self._most_behind(fragment) > 0

    def _still_missing(self, fragment: int) -> set[Key]:
        task = self.orders[fragment].peek()
        return set() if task is None else set(self.needs(task)) - self._here

    def _is_parameter(self, key: Key) -> bool:
        return key[0] is FrameKind.ACTIVATION and self._partition.edges[key[1]].kind == "parameter"

    def _awaited(self, key: Key) -> bool:
        """Whether some task still to run needs this key."""
        kind, index, step, micro_batch = key
        if kind is FrameKind.NORMS:
            return (
                self._clip
                and 0 <= index < len(self._all_fragments)
                and micro_batch == 0
                and any(self._ahead(f, TaskKind.UPDATE, step, 0) for f in self.orders)
            )
        if not 0 <= index < len(self._partition.edges):
            return False
        edge = self._partition.edges[index]
        if kind is FrameKind.GRADIENT:
            return edge.gradient and self._ahead(edge.source, TaskKind.BACKWARD, step, micro_batch)
        if edge.kind == "parameter":
            return (
                kind is FrameKind.ACTIVATION
                and micro_batch == 0
                and (
                    self._ahead(edge.target, TaskKind.UPDATE, step, 0)
                    or (step == self._steps + 1 and self._unfinished_evaluation(edge.target))
                )
            )
        if kind is FrameKind.ACTIVATION:
            return self._ahead(edge.target, TaskKind.FORWARD, step, micro_batch)
        if kind is FrameKind.EVALUATION:
            return self._evaluates(step) and self._ahead(edge.target, TaskKind.EVALUATE, step, micro_batch)
        return False

    def _ahead(self, fragment: int, kind: TaskKind, step: int, micro_batch: int) -> bool:
        """Whether `fragment` is hosted here and has this task still before it."""
        if fragment not in self.orders or not 1 <= step <= self._steps:
            return False
        return 0 <= micro_batch < self._limits[kind] and (step, micro_batch) >= self._reached[fragment, kind]

    def _evaluates(self, step: int) -> bool:
        return any(order.evaluates(step) for order in self.orders.values())

    def _unfinished_evaluation(self, fragment: int) -> bool:
        order = self.orders.get(fragment)
        return order is not None and not order.finished and order.evaluates(self._steps)


def _priority(task: Task) -> tuple[int, int, int, int]:
    return (task.step, _RANK[task.kind], task.micro_batch, task.fragment)
