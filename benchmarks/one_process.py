"""Trains a job in this process under any plan: the bits of a pool that follows this plan, without a pool or a network.

A lossy edge stays lossy in the same way when both its ends are on one worker. So one worker that hosts every fragment has
the losses of any pool; here its own classes run on one thread, with blobs in memory in place of a coordinator.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from time import perf_counter

import torch
from pydantic import BaseModel
from torch import Tensor

from compress.settings import raw_bytes
from coordinator.submission import train_config
from dag.cut import Partition
from dag.serialize import digest, dumps
from fusion.messages import BlobRef, EvaluationReport, Prepare
from fusion.plan import Plan
from fusion.submit import CapturedJob, weights_file
from fusion.wire import FrameKind, Header
from worker.jobs.assembly import assemble
from worker.jobs.fetch import Fetcher
from worker.jobs.task_runner import EMPTY, TaskRunner
from worker.machine.memory import MemoryGuard
from worker.protocol.accounts import Accounts
from worker.protocol.instructions import LendParameters, ReportStep
from worker.protocol.session import Session
from worker.transport.parcel import Parcel

_HERE = "here"
_PLENTY = 2**40


@dataclass(frozen=True)
class Step:
    """What one step came to."""

    number: int
    loss: float
    raw_bytes: int
    """Of the values on the plan's edges, as tensors."""
    sent_bytes: int
    """Of the same, as their codecs made them."""


class OneProcess:
    """One job under one plan, from `tensors`: by default the captured ones. Wants the process's only thread."""

    def __init__(self, job: CapturedJob, plan: Plan, tensors: Mapping[str, Tensor] | None = None) -> None:
        plan = plan.model_copy(update={"epoch": 0, "placement": (_HERE,) * len(plan.placement)})
        blobs: dict[str, bytes] = {}

        def held(data: bytes) -> BlobRef:
            ref = BlobRef(digest=digest(data), size=len(data))
            blobs[ref.digest] = data
            return ref

        with weights_file(job.tensors if tensors is None else tensors) as (_, path):
            weights = held(path.read_bytes())
        held(job.data.blob)
        prepare = Prepare(
            job=_HERE,
            plan=plan,
            dag=held(dumps(job.dag)),
            weights=weights,
            data=job.data.manifest,
            train=train_config(job.spec, job.data.manifest),
            peers=[],
        )
        self._tensors = dict(job.tensors)
        self._assembly, self._pieces = asyncio.run(assemble(prepare, _HERE, "cpu", _Held(blobs), MemoryGuard(_PLENTY)))
        self._session = _Sent(prepare, self._assembly.partition)
        self._accounts = Accounts(_HERE, prepare.train)
        self._runner = TaskRunner(
            self._assembly,
            self._pieces,
            self._session,
            self._accounts,
            None,
            lambda parcel: None,  # encoded when its receiver takes it
            self._take,
        )
        self.evaluations: dict[int, float] = {}
        """Step -> loss on the held-out samples after it, with the codecs."""

    def train(self, listen: Callable[[Step], None]) -> None:
        """Run every step."""
        torch.set_num_threads(1)
        self._session.begin()
        while True:
            for instruction in self._session.take():
                match instruction:
                    case LendParameters(fragment, step):
                        self._runner.lend_parameters(fragment, step)
                    case ReportStep(step, fragments):
                        listen(self._ended(step, fragments))
            task = self._session.next_task()
            if task is None:
                break
            begin = perf_counter()
            done = self._runner.run(task)
            self._accounts.spent(task, perf_counter() - begin)
            if done:
                self._session.completed(task)
        if not self._session.finished:
            raise RuntimeError(f"the tasks of the plan block each other after step {self._session.step}")

    def weights(self) -> dict[str, Tensor]:
        """The tensors that another run may start from."""
        found = dict(self._tensors)
        for piece in self._pieces.values():
            for key, value in piece.program.state().items():
                kind, _, name = key.partition("/")
                if kind != "optimizer":
                    found[name] = value
        return found

    def evaluate_without_codecs(self) -> float:
        """The loss on the held-out samples now, every value as it was computed."""
        train, pieces = self._assembly.prepare.train, self._pieces
        lent = {edge: value for piece in pieces.values() for edge, value in piece.program.parameter_values().items()}
        losses: list[float] = []
        for batch in range(train.eval_batches):
            values = dict(lent)
            for _, piece in sorted(pieces.items()):
                data = piece.feed.evaluation(batch, piece.placeholders)
                result = piece.program.evaluate(train.steps, batch, values, data)
                values |= result.outputs
                losses += [] if result.loss is None else [result.loss]
        return sum(losses) / len(losses)

    def _ended(self, step: int, fragments: tuple[int, ...]) -> Step:
        report = self._accounts.step_report(0, step, fragments, {}, 0, 0, perf_counter())
        assert report.loss is not None
        return Step(step, report.loss, *self._session.take_bytes())

    def _take(self, report: BaseModel) -> None:
        if isinstance(report, EvaluationReport):
            self.evaluations[report.step] = report.loss


class _Held(Fetcher):
    """Reads blobs that are in memory."""

    def __init__(self, blobs: Mapping[str, bytes]) -> None:
        self._blobs = blobs
        self._max_blob_bytes = _PLENTY

    async def read_range(self, ref: BlobRef, begin: int, end: int) -> Tensor:
        return torch.frombuffer(bytearray(self._blobs[ref.digest][begin:end]), dtype=torch.uint8)


class _Sent(Session[Parcel]):
    """A session that keeps what a step's tasks make until its bytes are counted."""

    def __init__(self, prepare: Prepare, partition: Partition) -> None:
        super().__init__(
            job=prepare.job,
            worker=_HERE,
            plan=prepare.plan,
            partition=partition,
            train=prepare.train,
            first_step=1,
            empty=EMPTY,
        )
        self._made: list[tuple[Header, Parcel]] = []

    def emit(self, header: Header, parcel: Parcel) -> None:
        if header.kind in (FrameKind.ACTIVATION, FrameKind.GRADIENT) and not parcel.null:
            self._made.append((header, parcel))
        super().emit(header, parcel)

    def take_bytes(self) -> tuple[int, int]:
        """Since the last call: bytes of the values, and of their payloads."""
        made, self._made = self._made, []
        payloads = (parcel.payload_for(header.codec) for header, parcel in made)
        raw = sum(raw_bytes(header.shape, header.dtype) for header, _ in made)
        return raw, sum(payload.nbytes for payload in payloads if payload is not None)
