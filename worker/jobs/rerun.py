"""Runs a fragment's steps again, from a snapshot and what the others logged, to find out what its host should have made.

It shares the compute thread with the training, one task at a time, because random operators use the one generator that
the process has. Nothing here touches the job's own fragments, and whatever goes wrong makes the check void, no more.
"""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Callable, Mapping
from dataclasses import dataclass

from torch import Tensor

from compress import edge_seed
from dag.cut import Partition
from executor.board import TaskBoard
from executor.ordering import Task, TaskKind
from fusion.messages import Check, Digest, Replayed, TrainConfig
from fusion.plan import Plan
from fusion.wire import FrameKind, Header
from worker.jobs.assembly import Piece
from worker.jobs.fingerprint import fingerprint
from worker.jobs.state_blob import StateBlob
from worker.protocol.replay_log import Key
from worker.protocol.witness import named
from worker.transport.arrival import Arrival, on_device
from worker.transport.parcel import Parcel
from worker.transport.ways import ways

Ask = Callable[[FrameKind, int, int, int], None]
"""(kind, edge, step, micro-batch): have this message shown."""


@dataclass(frozen=True, slots=True)
class Examine:
    """Run the fragment again; `piece` is it, in the state after `order.after`. `expected` is that after `order.through`."""

    order: Check
    piece: Piece
    expected: Mapping[str, Tensor] | None = None


class Rerun:
    """One spot check at its checker. `shown` for each arrival, `advance` while it returns True, `result` when `finished`."""

    def __init__(self, examine: Examine, plan: Plan, partition: Partition, train: TrainConfig, ask: Ask) -> None:
        self.order = order = examine.order
        self._piece = examine.piece
        self._expected = examine.expected
        self._train = train
        self._partition = partition
        self._ask = ask
        self._ways = ways(plan, partition)
        self._board = TaskBoard(
            partition,
            [order.fragment],
            schedule=plan.schedule,
            micro_batches=train.micro_batches,
            in_flight=plan.in_flight,
            steps=order.through,
            clip=train.clip_grad_norm is not None,
            first_step=order.after + 1,
        )
        self._here: dict[Key, Arrival] = {}
        self._made: dict[Key, str] = {}
        self._used: dict[str, dict[Key, str]] = defaultdict(dict)
        self._states: dict[int, str] = {}
        self._losses: dict[int, list[float]] = defaultdict(list)
        # Without exactness: what was computed, until what the host shows is there.
        self._own: dict[Key, Tensor | None] = {}
        self._unseen: set[Key] = set()
        self._deviation = 0.0
        self._lend(order.after + 1)
        self._request(order.after + 1)

    @property
    def finished(self) -> bool:
        return self._board.finished and not self._unseen

    def ask_again(self) -> None:
        """Nothing has come for long."""
        for key in (*self._board.owed(), *self._unseen):
            self._ask(*key)

    def shown(self, key: Key, sender: str, value: Arrival, digest: str) -> None:
        """What was asked for is here; a second copy changes nothing."""
        if key in self._unseen:
            self._unseen.discard(key)
            self._made[key] = digest
            self._compare(self._own.pop(key), on_device(value))
        elif self._board.arrived(*key):
            self._here[key] = value
            self._used[sender][key] = digest

    def advance(self) -> bool:
        """Run the next task, if what it needs is here; False when there is nothing to do now."""
        task = self._board.next_task()
        if task is None:
            return False
        match task.kind:
            case TaskKind.FORWARD:
                self._forward(task)
            case TaskKind.BACKWARD:
                self._backward(task)
            case _:
                self._update(task)
        if self._train.clip_grad_norm is not None and self._board.completes_gradients(task):
            self._note_norms(task)
        for key in self._board.completed(task):
            self._here.pop(key, None)
        if task.kind is TaskKind.UPDATE and task.step < self.order.through:
            self._lend(task.step + 1)
            self._request(task.step + 1)
        return True

    def result(self) -> Replayed:
        """What the fragment makes, in digests."""
        if self._expected is not None:
            state = self._piece.state()
            for name in state.keys() | self._expected.keys():
                self._compare(state.get(name), self._expected.get(name))
        order = self.order
        return Replayed(
            job=order.job,
            epoch=order.epoch,
            fragment=order.fragment,
            through=order.through,
            made=_told(self._made),
            used={sender: _told(digests) for sender, digests in self._used.items()},
            states=self._states,
            losses={step: sum(losses) / self._train.micro_batches for step, losses in self._losses.items()},
            deviation=self._deviation,
        )

    # Tasks --------------------------------------------------------------------------------------------------------

    def _forward(self, task: Task) -> None:
        piece, step, micro_batch = self._piece, task.step, task.micro_batch
        arrivals: dict[int, Tensor] = {}
        for key in self._board.needs(task):
            # A borrowed parameter serves the whole step.
            arrival = self._here[key] if self._is_parameter(key) else self._here.pop(key)
            value = on_device(arrival)
            assert value is not None
            arrivals[key[1]] = value
            if self._ways[True, key[1]].reuses:
                piece.keep_places(key[1], step, micro_batch, arrival)
        data = piece.feed.training(step, micro_batch, piece.placeholders)
        result = piece.program.forward(step, micro_batch, arrivals, data)
        for edge, value in result.outputs.items():
            self._make(FrameKind.ACTIVATION, edge, step, micro_batch, value)
        if result.loss is not None:
            self._losses[step].append(result.loss)

    def _backward(self, task: Task) -> None:
        step, micro_batch = task.step, task.micro_batch
        gradients = {key[1]: on_device(self._here.pop(key)) for key in self._board.needs(task)}
        for edge, value in self._piece.program.backward(step, micro_batch, gradients).items():
            self._make(FrameKind.GRADIENT, edge, step, micro_batch, value)

    def _note_norms(self, task: Task) -> None:
        norms = self._piece.program.norms()
        key = (FrameKind.NORMS, task.fragment, task.step, 0)
        self._board.arrived(*key)
        self._here[key] = norms
        self._note(key, norms)

    def _update(self, task: Task) -> None:
        norms = {key[1]: value for key in self._board.needs(task) if (value := on_device(self._here[key])) is not None}
        self._piece.program.update(task.step, norms)
        every = self._train.checkpoint_every
        if task.step == self.order.through or (every and task.step % every == 0):
            self._states[task.step] = StateBlob(self._piece.state()).ref().digest[:32]

    # What it makes and needs --------------------------------------------------------------------------------------

    def _lend(self, step: int) -> None:
        for edge, value in self._piece.program.parameter_values().items():
            self._make(FrameKind.ACTIVATION, edge, step, 0, value)

    def _make(self, kind: FrameKind, edge: int, step: int, micro_batch: int, value: Tensor | None) -> None:
        """As its receiver gets it: what a lossy codec loses is lost here too."""
        way, backward = self._ways[kind is FrameKind.GRADIENT, edge], kind is FrameKind.GRADIENT
        if value is not None and way.codec != "none":
            seed = edge_seed(self._train.seed, step, micro_batch, edge, gradient=backward)
            places = self._piece.places.pop((edge, step, micro_batch), None) if way.reuses else None
            if (backward, edge) in self._piece.feedback:
                value = self._piece.feedback.parcel(backward, edge, value, seed, None, places).received()
            else:
                value = Parcel(value, way.codec, way.options, seed, places=places).received()
        self._note((kind, edge, step, micro_batch), value)

    def _note(self, key: Key, value: Tensor | None) -> None:
        if self.order.exact:
            self._made[key] = fingerprint(value)
        else:
            self._own[key] = value
            self._unseen.add(key)
            self._ask(*key)

    def _request(self, step: int) -> None:
        """Ask for everything of a step at once, so that it is here when it is needed."""
        fragment = self.order.fragment
        tasks = [
            Task(kind, fragment, step, index)
            for index in range(self._train.micro_batches)
            for kind in (TaskKind.FORWARD, TaskKind.BACKWARD)
        ]
        keys = dict.fromkeys(
            key for task in (*tasks, Task(TaskKind.UPDATE, fragment, step)) for key in self._board.needs(task)
        )
        for key in keys:
            if key[:2] != (FrameKind.NORMS, fragment):
                self._ask(*key)

    def _is_parameter(self, key: Key) -> bool:
        return self._partition.edges[key[1]].kind == "parameter"

    def _compare(self, own: Tensor | None, theirs: Tensor | None) -> None:
        self._deviation = max(self._deviation, distance(own, theirs))


def distance(own: Tensor | None, theirs: Tensor | None) -> float:
    """Relative to the larger of the two; infinite when only one is there, or one is not finite."""
    if own is None or theirs is None:
        return 0.0 if own is theirs else math.inf
    if own.shape != theirs.shape:
        return math.inf
    first, second = own.detach().double().cpu(), theirs.detach().double().cpu()
    scale = max(float(first.norm()), float(second.norm()))
    if scale == 0.0:
        return 0.0
    found = float((first - second).norm()) / scale
    return found if math.isfinite(found) else math.inf


def _told(digests: Mapping[Key, str]) -> list[Digest]:
    return [named(key, digest) for key, digest in digests.items()]


def asking(order: Check, epoch: int, key: Key) -> Header:
    """The request for a message that a check needs."""
    kind, edge, step, micro_batch = key
    return Header(order.job, epoch, FrameKind.SHOW, edge, step, micro_batch, kind.name)
