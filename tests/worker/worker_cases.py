"""Small jobs and pieces of jobs for the worker's tests."""

from __future__ import annotations

import hashlib
import threading
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from pydantic import BaseModel
from torch import Tensor, nn

from dag import serialize
from dag.capture import capture
from dag.cut import cut, cut_points
from dag.graph import OpDag
from fusion.messages import BlobRef, DataManifest, PeerAddress, Prepare, Resume, TrainConfig
from fusion.plan import CodecChoice, Plan
from fusion.spec import LrScheduleSpec, OptimizerSpec

MICRO_BATCH = 2
FEATURES = 6


class Stack(nn.Module):
    """Layers with dropout in a row; with `tied`, the last layer uses the first one's weight; `frozen` stem layers."""

    def __init__(self, layers: int = 4, *, tied: bool = False, frozen: int = 0, dropout: float = 0.1) -> None:
        super().__init__()
        torch.manual_seed(1)
        self.layers = nn.ModuleList(nn.Linear(FEATURES, FEATURES) for _ in range(layers))
        self.dropout = nn.Dropout(dropout)
        if tied:
            self.layers[-1].weight = self.layers[0].weight
        for layer in self.layers[:frozen]:
            layer.requires_grad_(False)

    def forward(self, inputs: Tensor) -> Tensor:
        x = inputs
        for layer in self.layers:
            x = self.dropout(torch.tanh(layer(x)))
        return x


def loss(output: Tensor, targets: Tensor) -> Tensor:
    return nn.functional.mse_loss(output, targets)


def ref(data: bytes) -> BlobRef:
    return BlobRef(digest=hashlib.sha256(data).hexdigest(), size=len(data))


@dataclass
class Case:
    """One job: its OP-DAG, tensors and data, as blobs too."""

    dag: OpDag
    tensors: dict[str, Tensor]
    data: dict[str, Tensor]
    train: TrainConfig
    blobs: dict[str, bytes] = field(default_factory=dict)

    def add(self, data: bytes) -> BlobRef:
        made = ref(data)
        self.blobs[made.digest] = data
        return made

    def positions(self, fragments: int) -> tuple[int, ...]:
        """Legal cuts, about evenly spread."""
        legal = [point.position for point in cut_points(self.dag)]
        return tuple(legal[len(legal) * index // fragments] for index in range(1, fragments))

    def prepare(
        self,
        placement: Sequence[str],
        peers: Sequence[PeerAddress] = (),
        *,
        epoch: int = 0,
        schedule: Any = "1f1b",
        resume: Resume | None = None,
        codecs: Mapping[int, CodecChoice] | None = None,
        failure_timeout: float = 5.0,
        job: str = "job-1",
        log_bytes: int = 0,
        verify: bool = False,
        backups: Mapping[int, str] | None = None,
    ) -> Prepare:
        import safetensors.torch

        count = len(placement)
        plan = Plan(
            epoch=epoch,
            policy="test",
            schedule=schedule,
            cuts=self.positions(count),
            placement=tuple(placement),
            in_flight=tuple(count - index for index in range(count)),
            # Of one fragment's backwards whole, the next one's following at once, others' waiting.
            weights_behind=tuple(range(count)),
            codecs=dict(codecs or {}),
        )
        samples = len(self.data["inputs"])
        return Prepare(
            job=job,
            plan=plan,
            dag=self.add(serialize.dumps(self.dag)),
            weights=self.add(safetensors.torch.save(self.tensors)),
            data=DataManifest(
                kind="arrays",
                blob=self.add(safetensors.torch.save(self.data)),
                samples=samples,
                train_samples=samples - 2 * MICRO_BATCH,
                feeds={"inputs": "inputs", "targets": "targets"},
            ),
            train=self.train,
            peers=list(peers),
            resume=resume,
            failure_timeout=failure_timeout,
            log_bytes=log_bytes,
            verify=verify,
            backups=dict(backups or {}),
        )


def make_case(
    model: nn.Module | None = None,
    *,
    steps: int = 4,
    micro_batches: int = 3,
    clip: float | None = None,
    eval_every: int | None = None,
    checkpoint_every: int | None = None,
) -> Case:
    model = Stack() if model is None else model
    torch.manual_seed(3)
    data = {"inputs": torch.randn(20, FEATURES), "targets": torch.randn(20, FEATURES)}
    captured = capture(model, {key: value[:MICRO_BATCH] for key, value in data.items()}, loss)
    train = TrainConfig(
        steps=steps,
        micro_batches=micro_batches,
        micro_batch_size=MICRO_BATCH,
        seed=11,
        optimizer=OptimizerSpec(name="adamw", lr=0.01),
        lr_schedule=LrScheduleSpec(name="cosine", warmup=2),
        clip_grad_norm=clip,
        eval_every=eval_every,
        eval_batches=2 if eval_every else 0,
        checkpoint_every=checkpoint_every,
    )
    tensors = {key: value.detach().clone().contiguous() for key, value in captured.tensors.items()}
    return Case(captured.dag, tensors, data, train)


def partition_of(prepare: Prepare, case: Case) -> Any:
    return cut(case.dag, prepare.plan.cuts)


class Reports:
    """Collects a host's reports; `wait` blocks until one of a type is there."""

    def __init__(self) -> None:
        self.messages: list[BaseModel] = []
        self._changed = threading.Condition()

    def __call__(self, message: BaseModel) -> None:
        with self._changed:
            self.messages.append(message)
            self._changed.notify_all()

    def of(self, kind: type[Any]) -> list[Any]:
        with self._changed:
            return [message for message in self.messages if isinstance(message, kind)]

    def wait(self, *kinds: type[Any], timeout: float = 60) -> Any:
        def found() -> BaseModel | None:
            return next((message for message in self.messages if isinstance(message, kinds)), None)

        with self._changed:
            assert self._changed.wait_for(lambda: found() is not None, timeout), f"none of {kinds} in {self.messages}"
            return found()
