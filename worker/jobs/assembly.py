"""Builds a worker's fragments of one job from blobs alone: the OP-DAG, their tensors, the data they feed on.

Runs no code of the user: the OP-DAG is validated (every operator on the allow-list), tensors and data are plain bytes whose
shapes and dtypes are checked against it.
"""

from __future__ import annotations

import asyncio
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

from torch import Tensor

from compress import Places
from dag import serialize
from dag.cut import Fragment, Partition, cut
from dag.graph import OpDag
from dag.validate import MAX_BYTES
from executor.program import FragmentProgram
from fusion.messages import Prepare
from fusion.plan import Plan
from worker.jobs.feed import Feed, load_feed, sources
from worker.jobs.feedback import Feedback
from worker.jobs.fetch import Fetcher, TensorFile
from worker.machine.memory import MemoryGuard
from worker.protocol.admission import Admission
from worker.transport.arrival import Arrival, places_of
from worker.transport.ways import ways


@dataclass(frozen=True)
class Piece:
    """A fragment that can run here: its program, loaded, and the data that it feeds itself."""

    program: FragmentProgram
    feed: Feed
    placeholders: tuple[str, ...]
    """Data keys that it feeds itself."""
    feedback: Feedback
    """What its codecs have left over."""
    places: dict[tuple[int, int, int], Places] = field(default_factory=dict)
    """(edge, step, micro-batch) -> what an activation kept whose gradient goes back at the same places; until it has."""

    def keep_places(self, edge: int, step: int, micro_batch: int, arrival: Arrival) -> None:
        """Remember which places an activation kept that its forward uses."""
        places = places_of(arrival)
        if places is not None:
            self.places[edge, step, micro_batch] = places

    def state(self) -> dict[str, Tensor]:
        """Copies of all that training changes. Take it between an update and the next forward."""
        return self.program.state() | self.feedback.state()

    def load_state(self, tensors: Mapping[str, Tensor]) -> None:
        """Put back what `state` gave. Raises `BlobError` when a tensor has another shape or dtype than expected."""
        self.program.load_state(tensors)
        self.feedback.load(tensors)


@dataclass(frozen=True)
class Assembly:
    """What one worker needs to know of a job to run fragments of its plan, and to build others of the same cuts."""

    prepare: Prepare
    worker: str
    dag: OpDag
    partition: Partition

    @property
    def first_step(self) -> int:
        return self.prepare.resume.step + 1 if self.prepare.resume is not None else 1

    def admission(self, plan: Plan | None = None) -> Admission:
        """What may arrive here under `plan`, by default the one of the beginning."""
        train = self.prepare.train
        return Admission(
            self.prepare.job,
            plan or self.prepare.plan,
            self.partition,
            self.worker,
            micro_batches=train.micro_batches,
            last_step=train.steps,
            eval_batches=train.eval_batches if train.eval_every is not None else 0,
            norms=[len(fragment.parameters) for fragment in self.partition.fragments]
            if train.clip_grad_norm is not None
            else (),
            first_epoch=self.prepare.plan.epoch,
            verify=self.prepare.verify,
        )


async def assemble(
    prepare: Prepare, worker: str, device: str, fetcher: Fetcher, memory: MemoryGuard
) -> tuple[Assembly, dict[int, Piece]]:
    """Fetch and build; returns the pieces of the worker's fragments too, which are the caller's alone: they may move away.

    Raises `DagError`, `BlobError`, `DataError`, `PlanError`, or an error of the network.
    """
    dag = await asyncio.to_thread(serialize.loads, await fetcher.whole(prepare.dag, MAX_BYTES))
    assembly = Assembly(prepare, worker, dag, cut(dag, prepare.plan.cuts))
    return assembly, await build(assembly, prepare.plan.fragments_of(worker), device, fetcher, memory)


async def build(
    assembly: Assembly, fragments: Sequence[int], device: str, fetcher: Fetcher, memory: MemoryGuard
) -> dict[int, Piece]:
    """These fragments of the job, in the state in which the run begins. Raises what `assemble` raises."""
    prepare, dag, partition = assembly.prepare, assembly.dag, assembly.partition
    _require_memory(prepare, dag, [partition.fragments[index] for index in fragments], memory)
    weights = await fetcher.open(prepare.weights)
    moments = await _optimizer_file(prepare, fetcher)
    placeholders = {op: None for index in fragments for op in partition.fragments[index].placeholders}
    wanted = sources(dag, placeholders, prepare.data, prepare.train.micro_batch_size)
    file = await fetcher.open(prepare.data.blob) if wanted else None
    feed = await load_feed(file, wanted, prepare.data, prepare.train)
    pieces: dict[int, Piece] = {}
    for index in fragments:
        fragment = partition.fragments[index]
        program = await asyncio.to_thread(_build, prepare, dag, fragment, device)
        tensors = await weights.tensors(program.state_names)
        await asyncio.to_thread(program.load, tensors)
        del tensors
        data = tuple(dag.ops[op].target for op in fragment.placeholders)
        piece = Piece(program, feed, data, _feedback(prepare.plan, partition, index))
        if moments is not None:
            own = set(program.parameter_names)
            keys = [key for key in moments.entries if _parameter_of(key) in own or key in piece.feedback.keys]
            await asyncio.to_thread(piece.load_state, await moments.tensors(keys))
        pieces[index] = piece
    return pieces


def _build(prepare: Prepare, dag: OpDag, fragment: Fragment, device: str) -> FragmentProgram:
    train = prepare.train
    return FragmentProgram(
        dag,
        fragment,
        seed=train.seed,
        micro_batches=train.micro_batches,
        optimizer=train.optimizer,
        lr_schedule=train.lr_schedule,
        steps=train.steps,
        clip_grad_norm=train.clip_grad_norm,
        device=device,
        recompute=train.recompute,
    )


def _feedback(plan: Plan, partition: Partition, fragment: int) -> Feedback:
    sends = {
        (backward, edge): way
        for (backward, edge), way in ways(plan, partition).items()
        if way.feedback and fragment == (partition.edges[edge].target if backward else partition.edges[edge].source)
    }
    return Feedback(plan.id, sends)


async def _optimizer_file(prepare: Prepare, fetcher: Fetcher) -> TensorFile | None:
    if prepare.resume is None or prepare.resume.optimizer is None:
        return None
    return await fetcher.open(prepare.resume.optimizer)


def _parameter_of(key: str) -> str:
    """`optimizer/SLOT/NAME` -> NAME; empty for any other key."""
    kind, _, rest = key.partition("/")
    return rest.partition("/")[2] if kind == "optimizer" else ""


def _require_memory(prepare: Prepare, dag: OpDag, fragments: list[Fragment], memory: MemoryGuard) -> None:
    """What the fragments certainly take: parameters, gradients, optimizer state, and saved values in flight."""
    total = 0
    for fragment in fragments:
        held = sum(dag.ops[op].output_bytes for op in (*fragment.parameters, *fragment.borrowed))
        fixed = sum(dag.ops[op].output_bytes for op in (*fragment.constants, *fragment.written_buffers))
        saved = 0 if prepare.train.recompute else sum(dag.ops[op].saved_bytes for op in fragment.ops)
        in_flight = min(prepare.plan.in_flight[fragment.index], prepare.train.micro_batches)
        total += held * (2 + prepare.train.optimizer.slots) + fixed + saved * max(1, in_flight)
    names = ", ".join(str(fragment.index) for fragment in fragments)
    memory.require(total, f"fragment {names}" if len(fragments) == 1 else f"fragments {names}")
