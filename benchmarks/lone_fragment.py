"""A fragment of a model by itself, with what arrives for it made up: what its tasks cost where nobody waits."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from benchmarks import prediction, slow_jobs
from benchmarks.common import Workload
from coordinator.submission import train_config
from dag.cut import Fragment, cut
from dag.operators import torch_dtype
from dag.workload import workload
from executor.program import FragmentProgram
from fusion.submit import CapturedJob

FRAGMENTS = 4
WIDE = Workload(layers=6, width=256, sequence_length=128, micro_batch=4)
MODELS: dict[str, Callable[[Path], dict[str, Any]]] = {
    prediction.WORKLOAD.describe(): prediction.gpt,
    slow_jobs.YARDSTICK.describe(): slow_jobs.YARDSTICK.job,
    WIDE.describe(): WIDE.job,
    "ResNet-18 of width 8, 8 micro-batches of 8": prediction.resnet,
}


def quarters(job: CapturedJob) -> list[int]:
    """Where to cut for fragments of about as much work."""
    work = workload(job.dag)
    middle = [work.flops[-1] * part / FRAGMENTS for part in range(1, FRAGMENTS)]
    return [int(min(work.positions, key=lambda at: abs(work.flops[at] - wanted))) for wanted in middle]


class LoneFragment:
    """The fragment at `index` of the job cut at `cuts`, ready to run."""

    def __init__(self, job: CapturedJob, cuts: list[int], index: int) -> None:
        train = train_config(job.spec, job.data.manifest)
        self.fragment: Fragment = cut(job.dag, cuts).fragments[index]
        self.micro_batches = train.micro_batches
        self.program = FragmentProgram(
            job.dag,
            self.fragment,
            seed=0,
            micro_batches=train.micro_batches,
            optimizer=train.optimizer,
            lr_schedule=train.lr_schedule,
            steps=train.steps,
        )
        self.program.load(job.tensors)
        made = torch.Generator().manual_seed(0)
        self.arrivals = {edge.index: torch.randn(edge.meta.shape, generator=made) for edge in self.fragment.inputs}
        self.gradients = {
            edge.index: 1e-3 * torch.randn(edge.meta.shape, generator=made)
            for edge in self.fragment.outputs
            if edge.gradient
        }
        self.data = {
            op.target: torch.zeros(op.meta.shape, dtype=torch_dtype(op.meta.dtype))
            for op in map(job.dag.ops.__getitem__, self.fragment.placeholders)
        }
