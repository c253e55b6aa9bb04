"""What a job works with: its blobs, its data, what of its spec concerns a worker, where it resumes."""

from __future__ import annotations

from typing import Literal

from pydantic import Field

from fusion.messages.base import Message
from fusion.spec import LrScheduleSpec, OptimizerSpec


class BlobRef(Message):
    """A content-addressed blob: `GET /api/v1/blobs/{digest}`, ranges allowed."""

    digest: str = Field(pattern=r"^[0-9a-f]{64}$")
    size: int = Field(ge=0)


class DataManifest(Message):
    """The data of a job: safetensors blobs and how samples are read from them.

    `arrays`: one tensor per placeholder, first axis the sample. `tokens`: a 1-D tensor `tokens`; sample i is
    `tokens[i*L : i*L + L]` for `inputs` and the same shifted by one for `targets` (L = `sequence_length`).
    Samples `train_samples ..` of the total are held out for evaluation. Integers may be stored in any integer dtype: what an
    int64 placeholder reads is widened.
    """

    kind: Literal["arrays", "tokens"]
    blob: BlobRef
    samples: int = Field(gt=0)
    train_samples: int = Field(gt=0)
    sequence_length: int | None = None
    feeds: dict[str, Literal["inputs", "targets"] | str] = Field(
        default_factory=dict, description="Placeholder name -> tensor in the blob, or `inputs`/`targets` of tokens."
    )


class TrainConfig(Message):
    """What a worker needs to know of the spec's `train` section."""

    steps: int = Field(gt=0)
    micro_batches: int = Field(gt=0)
    micro_batch_size: int = Field(gt=0)
    seed: int
    optimizer: OptimizerSpec
    lr_schedule: LrScheduleSpec
    clip_grad_norm: float | None = None
    eval_every: int | None = None
    eval_batches: int = 0
    recompute: bool = False
    checkpoint_every: int | None = None


class Resume(Message):
    """Start after `step` steps, from these blobs instead of the initial weights."""

    step: int = Field(ge=0)
    optimizer: BlobRef | None = None
