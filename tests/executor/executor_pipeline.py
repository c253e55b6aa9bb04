"""Runs a whole partition in this process: programs and task boards of several workers, messages delivered in any order."""

from __future__ import annotations

import random
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from dag.cut import Fragment, Partition, cut
from dag.graph import OpDag
from dag.serialize import dumps, loads
from executor.board import Key, TaskBoard
from executor.ordering import Task, TaskKind
from executor.program import FragmentProgram
from fusion.spec import LrScheduleSpec, OptimizerSpec
from fusion.wire import FrameKind

Batch = Mapping[str, Tensor]
BatchOf = Callable[[int, int], Batch]
"""(step, micro-batch) -> data by key."""


@dataclass
class Settings:
    steps: int = 3
    micro_batches: int = 4
    seed: int = 7
    optimizer: OptimizerSpec = field(default_factory=lambda: OptimizerSpec(name="adamw", lr=1e-2))
    lr_schedule: LrScheduleSpec = field(default_factory=LrScheduleSpec)
    clip_grad_norm: float | None = None
    recompute: bool = False
    schedule: str = "1f1b"
    in_flight: int = 3
    eval_every: int | None = None
    eval_batches: int = 0
    device: str = "cpu"


@dataclass
class Outcome:
    losses: list[float]
    state: dict[str, Tensor]
    norms: list[float]
    evaluations: dict[int, float]
    snapshots: dict[int, dict[str, Tensor]]

    def tensor(self, name: str) -> Tensor:
        return self.state[f"parameter/{name}" if f"parameter/{name}" in self.state else f"buffer/{name}"]


class Pipeline:
    """All fragments of a partition on `placement` (fragment -> worker), shuffled by `shuffle`."""

    def __init__(
        self,
        dag: OpDag,
        tensors: Mapping[str, Tensor],
        cuts: Sequence[int],
        settings: Settings,
        *,
        placement: Sequence[int] | None = None,
        shuffle: int = 0,
        first_step: int = 1,
        resume: Mapping[str, Tensor] | None = None,
    ) -> None:
        self.settings = settings
        self.random = random.Random(shuffle)
        dag = loads(dumps(dag))
        self.partition: Partition = cut(dag, cuts)
        count = len(self.partition.fragments)
        placement = list(range(count)) if placement is None else placement
        self.first_step = first_step
        self._dag, self._tensors = dag, tensors
        self.programs = [self.fresh(fragment) for fragment in self.partition.fragments]
        if resume is not None:
            for program in self.programs:
                program.load_state(resume)
        in_flight = [self.random.randint(1, settings.in_flight) for _ in range(count)]
        behind = [self.random.randint(0, settings.in_flight) for _ in range(count)]
        self.boards = [
            TaskBoard(
                self.partition,
                [index for index, host in enumerate(placement) if host == worker],
                schedule=settings.schedule,  # type: ignore[arg-type]
                micro_batches=settings.micro_batches,
                in_flight=in_flight,
                steps=settings.steps,
                clip=settings.clip_grad_norm is not None,
                weights_behind=behind,
                first_step=first_step,
                eval_every=settings.eval_every,
                eval_batches=settings.eval_batches,
            )
            for worker in sorted(set(placement))
        ]
        self.values: dict[Key, Tensor | None] = {}
        self.copies: dict[Key, Tensor | None] = {}
        self.travelling: list[tuple[TaskBoard, Key]] = []

    def fresh(self, fragment: Fragment) -> FragmentProgram:
        """The fragment in the state in which the run begins."""
        settings = self.settings
        program = FragmentProgram(
            self._dag,
            fragment,
            seed=settings.seed,
            micro_batches=settings.micro_batches,
            optimizer=settings.optimizer,
            lr_schedule=settings.lr_schedule,
            steps=settings.steps,
            clip_grad_norm=settings.clip_grad_norm,
            recompute=settings.recompute,
            device=settings.device,
        )
        program.load({name: self._tensors[name] for name in program.state_names})
        return program

    def run(self, batch_of: BatchOf, snapshot_at: Sequence[int] = ()) -> Outcome:
        """Train from the first step to the last. Fails when nothing can move any more."""
        self.batch_of = batch_of
        self.losses: dict[int, list[float]] = {}
        self.evaluated: dict[int, list[float]] = {}
        self.total_norms: dict[int, float] = {}
        snapshots: dict[int, dict[str, Tensor]] = {step: {} for step in snapshot_at}
        for program in self.programs:
            self._lend(program, self.first_step)
        while not all(board.finished for board in self.boards):
            if self.random.random() < 0.05:
                # As after a change of the placement, at any moment.
                for board in self.boards:
                    board.weights_behind = [self.random.randint(0, 2) for _ in self.programs]
            ready = [(board, task) for board in self.boards if (task := board.next_task()) is not None]
            assert ready or self.travelling, "deadlock"
            if ready and (not self.travelling or self.random.random() < 0.5):
                board, task = self.random.choice(ready)
                if not self._execute(board, task):
                    continue
                if board.completes_gradients(task):
                    self._tell_norms(self.programs[task.fragment], task)
                board.completed(task)
                if task.kind is TaskKind.UPDATE and task.step in snapshots:
                    snapshots[task.step] |= self.programs[task.fragment].state()
            else:
                board, key = self.travelling.pop(self.random.randrange(len(self.travelling)))
                board.arrived(*key)
        for key, value in self.values.items():
            copy = self.copies[key]
            assert (value is None and copy is None) or (value is not None and same(value, copy)), f"{key} was mutated"
        state: dict[str, Tensor] = {}
        for program in self.programs:
            state |= program.state()
        count = self.settings.micro_batches
        return Outcome(
            losses=[sum(self.losses[step]) / count for step in sorted(self.losses)],
            state=state,
            norms=[self.total_norms[step] for step in sorted(self.total_norms)],
            evaluations={step: sum(values) / len(values) for step, values in self.evaluated.items()},
            snapshots=snapshots,
        )

    def _execute(self, board: TaskBoard, task: Task) -> bool:
        """Whether it is completed."""
        program = self.programs[task.fragment]
        fragment = program.fragment
        step, index = task.step, task.micro_batch
        if task.kind is TaskKind.UPDATE:
            norms = {
                other.fragment.index: self.values.get((FrameKind.NORMS, other.fragment.index, step, 0))
                for other in self.programs
            }
            total = program.update(step, norms if self.settings.clip_grad_norm is not None else None)  # type: ignore[arg-type]
            if total is not None:
                assert self.total_norms.setdefault(step, total) == total
            self._lend(program, step + 1)
            return True
        if task.kind is TaskKind.BACKWARD:
            given = {
                e.index: self.values[FrameKind.GRADIENT, e.index, step, index] for e in fragment.outputs if e.gradient
            }
            for edge, gradient in program.backward(step, index, given).items():
                self._send((FrameKind.GRADIENT, edge, step, index), gradient)
            return True
        if task.kind is TaskKind.WEIGHTS:
            return not program.weights(step, index)
        evaluation = task.kind is TaskKind.EVALUATE
        kind = FrameKind.EVALUATION if evaluation else FrameKind.ACTIVATION
        arrivals = {
            e.index: self.values[kind, e.index, step, index]
            if e.kind == "activation"
            else self.values[FrameKind.ACTIVATION, e.index, step + evaluation, 0]
            for e in fragment.inputs
        }
        data = self.batch_of(-step if evaluation else step, index)
        if evaluation:
            result = program.evaluate(step, index, arrivals, data)  # type: ignore[arg-type]
        else:
            postpone = board.postpones(task.fragment)
            result = program.forward(step, index, arrivals, data, postpone=postpone)  # type: ignore[arg-type]
        for edge, value in result.outputs.items():
            self._send((kind, edge, step, index), value)
        if result.loss is not None:
            (self.evaluated if evaluation else self.losses).setdefault(step, []).append(result.loss)
        return True

    def _tell_norms(self, program: FragmentProgram, task: Task) -> None:
        self._send((FrameKind.NORMS, program.fragment.index, task.step, 0), program.norms())

    def _lend(self, program: FragmentProgram, step: int) -> None:
        if any(board.wants_parameters(step) for board in self.boards):
            for edge, value in program.parameter_values().items():
                self._send((FrameKind.ACTIVATION, edge, step, 0), value)

    def _send(self, key: Key, value: Tensor | None) -> None:
        assert value is None or value.is_contiguous()
        self.values[key] = value
        self.copies[key] = None if value is None else value.clone()
        for board in self.boards:
            self.travelling.append((board, key))
            if self.random.random() < 0.1:
                self.travelling.append((board, key))


def same(left: Tensor | None, right: Tensor | None) -> bool:
    """Equal bit for bit, NaN included."""
    if left is None or right is None:
        return left is right
    if left.dtype != right.dtype or left.shape != right.shape:
        return False
    return left.numel() == 0 or torch.equal(
        left.contiguous().view(-1).view(torch.uint8), right.contiguous().view(-1).view(torch.uint8)
    )


def differing(outcome: Outcome, expected: Mapping[str, Tensor]) -> list[str]:
    """Names of `expected` (a state dict) whose tensors the outcome has with other bits, or has not."""
    wrong = []
    for key, value in outcome.state.items():
        kind, _, name = key.partition("/")
        if kind != "optimizer" and not same(value, expected[name].detach()):
            wrong.append(name)
    return wrong
