"""Jobs whose values are hashes of what they were computed from: equal values mean equal bits.

A forward hashes its inputs and the fragment's state, a backward what came back, an update everything of its step; so a
step that is lost, applied twice, or computed from anything else than it should be shows in every value from there on.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Literal

from dag.cut import Edge, Fragment, Partition
from dag.graph import TensorMeta
from fusion.messages import BlobRef, TrainConfig
from fusion.plan import CodecChoice, ScheduleName
from fusion.spec import JobSpec, LrScheduleSpec, OptimizerSpec
from fusion.wire import FrameKind
from worker.protocol.replay_log import Key

META = TensorMeta((2,), "float32")
PAYLOAD_BYTES = 8
EDGES = tuple[int, int, Literal["activation", "parameter"], bool]


def mix(*parts: int) -> int:
    """A value that nothing but these parts gives, in any process."""
    return hash(parts)


@dataclass(frozen=True, slots=True)
class Value:
    """What a message carries here."""

    value: int
    nbytes: int = PAYLOAD_BYTES
    common: int = -1
    """With the announcement of a snapshot: the common step, as far as its host knows."""
    places: str = ""
    """The process that made the activation; with a gradient that of the activation whose places it has."""


NOTHING = Value(0, 0)


def weights_of(step: int) -> BlobRef:
    """The blob to begin from after `step`; 0 is the job's own weights."""
    return BlobRef(digest=f"{step:064x}", size=1)


def part_of(state: int) -> BlobRef:
    """The blob of a fragment's state."""
    return BlobRef(digest=f"{state & (2**64 - 1):064x}", size=1)


class Program:
    """One fragment, computing hashes. `state` is that after a step; `load_state` puts it back."""

    def __init__(self, partition: Partition, fragment: int, state: int) -> None:
        self.fragment = partition.fragments[fragment]
        self.state = state
        self._forwards: dict[tuple[int, int], int] = {}
        self._gradients = 0
        self._owed: dict[tuple[int, int], int] = {}
        self._postponing: set[tuple[int, int]] = set()

    def forward(
        self, step: int, micro_batch: int, arrivals: Mapping[int, int], *, postpone: bool = False
    ) -> dict[int, int]:
        """Edge -> activation. The loss is `loss_of` the last forward. With `postpone`, the backward leaves something."""
        if postpone:
            self._postponing.add((step, micro_batch))
        made = mix(1, self.fragment.index, step, micro_batch, self.state, *_flat(arrivals))
        self._forwards[step, micro_batch] = made
        return {edge.index: mix(made, edge.index) for edge in self.fragment.outputs if edge.kind == "activation"}

    def loss(self, step: int, micro_batch: int) -> float | None:
        return _loss(self._forwards[step, micro_batch]) if self.fragment.has_loss else None

    def backward(self, step: int, micro_batch: int, gradients: Mapping[int, int]) -> dict[int, int]:
        """Edge -> gradient. What is postponed counts from `weights` on."""
        made = mix(2, self._forwards.pop((step, micro_batch)), *_flat(gradients))
        self._owed[step, micro_batch] = made
        if (step, micro_batch) not in self._postponing:
            self.weights(step, micro_batch)
        self._postponing.discard((step, micro_batch))
        return {edge.index: mix(made, edge.index) for edge in self.fragment.inputs if edge.gradient}

    def weights(self, step: int, micro_batch: int) -> None:
        self._gradients = mix(3, self._gradients, self._owed.pop((step, micro_batch)))

    def norms(self) -> int:
        assert not self._owed, "norms without all gradients"
        return mix(4, self._gradients)

    def update(self, step: int, norms: Mapping[int, int]) -> None:
        assert not self._owed, "an update without all gradients"
        self.state = mix(5, self.state, step, self._gradients, *_flat(norms))
        self._gradients = 0

    def evaluate(self, step: int, batch: int, arrivals: Mapping[int, int]) -> tuple[dict[int, int], float | None]:
        """Edge -> value, and the loss where it is made."""
        made = mix(6, self.fragment.index, batch, self.state, *_flat(arrivals))
        outputs = {edge.index: mix(made, edge.index) for edge in self.fragment.outputs if edge.kind == "activation"}
        return outputs, _loss(made) if self.fragment.has_loss else None

    def parameters(self) -> dict[int, int]:
        """Edge -> the lent parameter's value."""
        return {
            edge.index: mix(7, self.state, edge.index) for edge in self.fragment.outputs if edge.kind == "parameter"
        }


def _flat(values: Mapping[int, int]) -> list[int]:
    return [part for index in sorted(values) for part in (index, values[index])]


def _loss(value: int) -> float:
    return value % 1_000_003 / 1000


@dataclass(frozen=True)
class Case:
    """A job: its partition and how it is trained."""

    name: str
    edges: tuple[EDGES, ...]
    fragments: int
    train: TrainConfig
    schedule: ScheduleName
    in_flight: tuple[int, ...]
    codecs: dict[int, CodecChoice] = field(default_factory=dict)

    @cached_property
    def partition(self) -> Partition:
        return partition_of(self.fragments, self.edges)

    def initial_state(self, fragment: int) -> int:
        return mix(0, fragment)

    @cached_property
    def undisturbed(self) -> Undisturbed:
        return Undisturbed(self)

    def evaluates(self, step: int) -> bool:
        train = self.train
        return bool(train.eval_every and train.eval_batches and step % train.eval_every == 0)


class Undisturbed:
    """Every value of a job that one machine computes alone, one fragment after the other."""

    def __init__(self, case: Case) -> None:
        self.values: dict[Key, int] = {}
        self.states: dict[tuple[int, int], int] = {}
        """(fragment, step) -> state."""
        self.losses: dict[int, float] = {}
        self.evaluations: dict[int, float] = {}
        self._case = case
        self._programs = [Program(case.partition, index, case.initial_state(index)) for index in range(case.fragments)]
        self._note(0)
        for step in range(1, case.train.steps + 1):
            self._step(step)

    def _note(self, step: int) -> None:
        for index, program in enumerate(self._programs):
            self.states[index, step] = program.state
            for edge, value in program.parameters().items():
                self.values[FrameKind.ACTIVATION, edge, step + 1, 0] = value

    def _step(self, step: int) -> None:
        train, programs = self._case.train, self._programs
        losses = []
        for batch in range(train.micro_batches):
            for program in programs:
                made = program.forward(step, batch, self._inputs(FrameKind.ACTIVATION, program.fragment, step, batch))
                self.values.update({(FrameKind.ACTIVATION, edge, step, batch): v for edge, v in made.items()})
            losses.append(programs[-1].loss(step, batch) or 0.0)
        for batch in range(train.micro_batches):
            for program in reversed(programs):
                wanted = [edge.index for edge in program.fragment.outputs if edge.gradient]
                gradients = {edge: self.values[FrameKind.GRADIENT, edge, step, batch] for edge in wanted}
                made = program.backward(step, batch, gradients)
                self.values.update({(FrameKind.GRADIENT, edge, step, batch): v for edge, v in made.items()})
        norms = {index: program.norms() for index, program in enumerate(programs)}
        if train.clip_grad_norm is not None:
            self.values.update({(FrameKind.NORMS, index, step, 0): norm for index, norm in norms.items()})
        for program in programs:
            program.update(step, norms if train.clip_grad_norm is not None else {})
        self.losses[step] = sum(losses) / train.micro_batches
        self._note(step)
        if self._case.evaluates(step):
            self.evaluations[step] = self._evaluate(step)

    def _evaluate(self, step: int) -> float:
        losses = []
        for batch in range(self._case.train.eval_batches):
            for program in self._programs:
                arrivals = self._inputs(FrameKind.EVALUATION, program.fragment, step, batch)
                made, loss = program.evaluate(step, batch, arrivals)
                self.values.update({(FrameKind.EVALUATION, edge, step, batch): v for edge, v in made.items()})
            losses.append(loss or 0.0)
        return sum(losses) / len(losses)

    def _inputs(self, kind: FrameKind, fragment: Fragment, step: int, batch: int) -> dict[int, int]:
        lent = step + 1 if kind is FrameKind.EVALUATION else step
        return {
            edge.index: self.values[(kind, edge.index, step, batch)]
            if edge.kind == "activation"
            else self.values[(FrameKind.ACTIVATION, edge.index, lent, 0)]
            for edge in fragment.inputs
        }


def partition_of(count: int, edges: Sequence[EDGES]) -> Partition:
    """Fragments 0 .. count - 1 and these edges."""
    made = tuple(
        Edge(index, index, source, target, kind, META, gradient)
        for index, (source, target, kind, gradient) in enumerate(edges)
    )
    fragments = tuple(
        Fragment(
            index=index,
            ops=(),
            placeholders=(),
            parameters=(index,),
            borrowed=tuple(edge.value for edge in made if edge.target == index and edge.kind == "parameter"),
            written_buffers=(),
            constants=(),
            inputs=tuple(edge for edge in made if edge.target == index),
            outputs=tuple(edge for edge in made if edge.source == index),
            has_loss=index == count - 1,
            # As weights do behind an activation whose gradient somebody waits for.
            postponed=((index, (index,)),) if any(e.gradient for e in made if e.target == index) else (),
        )
        for index in range(count)
    )
    return Partition(tuple(range(1, count)), fragments, made)


def _case(
    name: str,
    fragments: int,
    edges: Sequence[EDGES],
    *,
    micro_batches: int = 2,
    schedule: ScheduleName = "1f1b",
    clip: bool = False,
    eval_every: int | None = None,
    checkpoint_every: int | None = None,
    steps: int = 12,
    reuses: bool = False,
) -> Case:
    train = TrainConfig(
        steps=steps,
        micro_batches=micro_batches,
        micro_batch_size=1,
        seed=0,
        optimizer=OptimizerSpec(),
        lr_schedule=LrScheduleSpec(),
        clip_grad_norm=1.0 if clip else None,
        eval_every=eval_every,
        eval_batches=2 if eval_every else 0,
        checkpoint_every=checkpoint_every,
    )
    returning = [index for index, (_, _, kind, gradient) in enumerate(edges) if kind == "activation" and gradient]
    codecs = dict.fromkeys(returning if reuses else [], CodecChoice(forward="topk", backward="topk-reused"))
    return Case(name, tuple(edges), fragments, train, schedule, tuple(range(fragments, 0, -1)), codecs)


_CHAIN: tuple[EDGES, ...] = ((0, 1, "activation", True), (1, 2, "activation", True))

CASES: dict[str, Case] = {
    case.name: case
    for case in (
        _case("chain", 3, _CHAIN, checkpoint_every=4, reuses=True),
        _case(
            "tied",
            4,
            [*_CHAIN, (2, 3, "activation", True), (0, 3, "parameter", True)],
            clip=True,
            eval_every=3,
            checkpoint_every=5,
            reuses=True,
        ),
        _case(
            "stem",
            4,
            [
                (0, 1, "activation", False),
                (0, 3, "activation", False),
                (1, 2, "activation", True),
                (2, 3, "activation", True),
            ],
            schedule="gpipe",
            eval_every=4,
            micro_batches=1,
        ),
        _case(
            "skips",
            5,
            [
                (0, 1, "activation", False),
                (1, 2, "activation", True),
                (1, 4, "activation", True),
                (2, 3, "activation", True),
                (3, 4, "activation", True),
                (1, 3, "parameter", True),
            ],
            clip=True,
            eval_every=5,
            checkpoint_every=3,
            micro_batches=1,
            steps=10,
        ),
    )
}
"""With and without: a tied parameter, clipping, evaluation, checkpoints, a stem that no gradient comes back to, gradients that
leave out the places that they share with their activations."""


def spec_of(checkpoint_every: int | None, backup_every: int | Literal["auto"], log_memory: int, keep: int) -> JobSpec:
    """A spec with these settings; the rest is not looked at."""
    return JobSpec.model_validate(
        {
            "name": "job",
            "model": {"entrypoint": "model.py:build"},
            "loss": "mse",
            "data": {"arrays": "data.npz"},
            "train": {"steps": 1, "global_batch": 1, "micro_batch": 1},
            "checkpoint": {"every": checkpoint_every, "keep": keep},
            "fault_tolerance": {"failure_timeout": 5.0, "backup_every": backup_every, "log_memory": log_memory},
        }
    )
