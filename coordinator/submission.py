"""Checks a submitted job again on the server, whatever client sent it, and makes the job's record.

Everything here blocks (it reads blobs); it is called from a thread. Refusals are `FusionError`s in one line.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from pathlib import Path

from coordinator.life.jobs import Job
from coordinator.shown.views import Submission
from coordinator.storage.blobs import BlobStore
from coordinator.storage.checkpoints import Checkpoints
from coordinator.storage.tensorfile import StoredTensor, read_header
from dag.cut import cut_points
from dag.graph import Op, OpDag
from dag.serialize import loads
from fusion.errors import BlobError, DagError, DataError, PlanError, SpecError
from fusion.messages import BlobRef, DataManifest, TrainConfig
from fusion.sampling import evaluation_batches
from fusion.spec import JobSpec
from fusion.units import format_seconds

_INTEGERS = frozenset({"int64", "int32", "int16", "int8", "uint8"})


@dataclass(frozen=True, slots=True)
class ResumePoint:
    """What a resumed job starts from."""

    step: int
    model: BlobRef
    optimizer: BlobRef | None


def read_dag(blobs: BlobStore, ref: BlobRef, max_bytes: int) -> OpDag:
    """Load and validate an OP-DAG blob. Raises `DagError` or `BlobError`."""
    path = blobs.require(ref, "OP-DAG")
    if ref.size > max_bytes:
        raise DagError(f"OP-DAG of {ref.size} bytes is larger than {max_bytes}")
    return loads(path.read_bytes())


def accept(
    submission: Submission,
    resume: ResumePoint | None,
    *,
    job_id: str,
    number: int,
    now: float,
    blobs: BlobStore,
    checkpoints: Checkpoints,
    max_dag_bytes: int,
    heartbeat_seconds: float,
    delay: float = 0.0,
) -> tuple[Job, OpDag]:
    """Check everything; return the job's record and its OP-DAG. `delay` is the worst latency of the pool, in seconds.

    Raises `SpecError`, `DagError`, `BlobError`, `DataError`, `PlanError` or `DiskFullError`.
    """
    spec, data = submission.spec, submission.data
    # Twice the delay: for a heartbeat that has just left, and for a connection that has to send a packet again.
    shortest = math.ceil(100 * (4 * heartbeat_seconds + 2 * delay)) / 100
    if spec.fault_tolerance.failure_timeout < shortest:
        slowest = f", and the slowest link of the pool delays them by {format_seconds(delay)}" if delay > 0 else ""
        raise SpecError(
            f"fault_tolerance.failure_timeout of {spec.fault_tolerance.failure_timeout:g}s is too short: "
            f"workers send a heartbeat every {heartbeat_seconds:g}s{slowest}; give at least {shortest:g}s"
        )
    dag = read_dag(blobs, submission.dag, max_dag_bytes)
    check_weights(dag, blobs.require(submission.weights, "weights"))
    check_data(dag, data, blobs.require(data.blob, "data"), spec.train.micro_batch_size)
    check_fragments(dag, spec.plan.fragments)
    train = train_config(spec, data)
    weights = submission.weights
    if resume is not None:
        if resume.step >= train.steps:
            raise SpecError(
                f"the checkpoint is at step {resume.step} and train.steps is {train.steps}: nothing is left to do; "
                "raise train.steps"
            )
        weights = checkpoints.merged_weights(dag, weights, resume.model, resume.optimizer)
    job = Job(
        id=job_id,
        number=number,
        spec=spec,
        dag=submission.dag,
        weights=weights,
        data=data,
        train=train,
        submitted_at=now,
        origin_step=resume.step if resume else 0,
        origin_optimizer=resume.optimizer if resume else None,
        step=resume.step if resume else 0,
    )
    return job, dag


def train_config(spec: JobSpec, data: DataManifest) -> TrainConfig:
    """What workers need of the spec's `train` section."""
    train = spec.train
    held_out = evaluation_batches(data.samples, data.train_samples, train.micro_batch_size)
    return TrainConfig(
        steps=train.steps,
        micro_batches=train.micro_batches,
        micro_batch_size=train.micro_batch_size,
        seed=train.seed,
        optimizer=train.optimizer,
        lr_schedule=train.lr_schedule,
        clip_grad_norm=train.clip_grad_norm,
        eval_every=train.eval_every,
        eval_batches=min(train.eval_batches, held_out) if train.eval_every else 0,
        recompute=train.recompute,
        checkpoint_every=spec.checkpoint.every,
    )


def check_fragments(dag: OpDag, fragments: int | None) -> None:
    """Raises `PlanError` when the OP-DAG can't be cut into so many fragments."""
    if fragments is None:
        return
    if fragments > len(dag.body):
        raise PlanError(
            f"plan.fragments is {fragments}, but the model has only {len(dag.body)} ops; ask for fewer fragments"
        )
    most = len(cut_points(dag)) + 1
    if fragments > most:
        raise PlanError(
            f"plan.fragments is {fragments}, but the model's {len(dag.body)} ops can be cut into at most {most} fragments "
            "(in-place writes and multi-output ops stay whole); ask for fewer"
        )


def check_weights(dag: OpDag, path: Path) -> None:
    """Raises `BlobError` when a tensor of the OP-DAG is missing in the weights, or has another shape or dtype."""
    header = read_header(path, "weights")
    for op in dag.ops:
        if op.kind in ("parameter", "buffer", "constant"):
            tensor = header.get(op.target)
            if tensor is None:
                raise BlobError(f"weights: {op.kind} {op.target!r} of the OP-DAG is missing")
            if tensor.shape != op.meta.shape or tensor.torch_dtype != op.meta.dtype:
                raise BlobError(
                    f"weights: {op.kind} {op.target!r} is {tensor.torch_dtype} {list(tensor.shape)}, "
                    f"the OP-DAG wants {op.meta.dtype} {list(op.meta.shape)}"
                )


def check_data(dag: OpDag, data: DataManifest, path: Path, micro_batch_size: int) -> None:
    """Raises `DataError` when the data does not feed every placeholder with the shape and dtype of the OP-DAG."""
    if data.train_samples > data.samples:
        raise DataError(f"data: train_samples {data.train_samples} is more than samples {data.samples}")
    try:
        header = read_header(path, "data")
    except BlobError as error:
        raise DataError(str(error)) from None
    if data.kind == "tokens":
        _check_tokens(data, header)
    for op in dag.placeholders:
        if op.meta.shape and op.meta.shape[0] != micro_batch_size:
            raise DataError(
                f"data: the OP-DAG was captured for micro-batches of {op.meta.shape[0]} samples ({op.target!r}), "
                f"train asks for {micro_batch_size}; capture again"
            )
        source = data.feeds.get(op.target, op.target)
        if data.kind == "tokens":
            _check_token_feed(op, data, source)
        else:
            _check_array_feed(op, data, source, header)


def _check_tokens(data: DataManifest, header: dict[str, StoredTensor]) -> None:
    tokens = header.get("tokens")
    if data.sequence_length is None or data.sequence_length < 1:
        raise DataError("data: tokens need a sequence_length")
    if tokens is None:
        raise DataError("data: the blob has no tensor named tokens")
    if len(tokens.shape) != 1 or tokens.torch_dtype not in _INTEGERS:
        raise DataError(f"data: tokens must be a 1-D integer tensor, not {tokens.torch_dtype} {list(tokens.shape)}")
    needed = data.samples * data.sequence_length + 1
    if tokens.shape[0] < needed:
        raise DataError(
            f"data: {data.samples} samples of {data.sequence_length} tokens need {needed} tokens, there are {tokens.shape[0]}"
        )


def _check_token_feed(op: Op, data: DataManifest, source: str) -> None:
    if source not in ("inputs", "targets"):
        raise DataError(
            f"data: placeholder {op.target!r} is fed from {source!r}; token data has inputs and targets only"
        )
    if op.meta.shape[1:] != (data.sequence_length,) or op.meta.dtype not in _INTEGERS:
        raise DataError(
            f"data: placeholder {op.target!r} is {op.meta.dtype} {list(op.meta.shape)}, "
            f"the data gives token sequences of {data.sequence_length}"
        )


def _check_array_feed(op: Op, data: DataManifest, source: str, header: dict[str, StoredTensor]) -> None:
    tensor = header.get(source)
    if tensor is None:
        raise DataError(
            f"data: nothing feeds placeholder {op.target!r}; the blob has {', '.join(sorted(header)) or 'nothing'}"
        )
    if not tensor.shape or tensor.shape[0] < data.samples:
        raise DataError(f"data: {source!r} has shape {list(tensor.shape)}, too few for {data.samples} samples")
    widened = op.meta.dtype == "int64" and tensor.torch_dtype in _INTEGERS
    if tensor.shape[1:] != op.meta.shape[1:] or not (widened or tensor.torch_dtype == op.meta.dtype):
        raise DataError(
            f"data: a sample of {source!r} is {tensor.torch_dtype} {list(tensor.shape[1:])}, "
            f"placeholder {op.target!r} wants {op.meta.dtype} {list(op.meta.shape[1:])}"
        )
