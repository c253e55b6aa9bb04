"""Runs a case on a pool and brings back what plain PyTorch would have: losses and the final state dict."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from cases import Case, as_tensors
from plain import train
from safetensors.torch import load_file
from torch import Tensor

from fusion.local import LocalPool, check_done
from fusion.spec import JobSpec
from fusion.spec_file import spec_from
from fusion.submit import CapturedJob, capture_job, submit

STEPS = 20
GLOBAL_BATCH = 8
MICRO_BATCH = 2
SEED = 3


@dataclass(frozen=True)
class Outcome:
    job: dict[str, Any]
    losses: list[float]
    state: dict[str, Tensor]


def spec_of(case: Case, folder: Path, **changes: Any) -> JobSpec:
    """The case as a job spec; `changes` replace keys of `train` and `plan`, or whole sections."""
    data = folder / f"{case.name}.npz"
    if not data.exists():
        np.savez(data, **case.arrays)
    train: dict[str, Any] = {
        "steps": STEPS,
        "global_batch": GLOBAL_BATCH,
        "micro_batch": MICRO_BATCH,
        "seed": SEED,
        "optimizer": case.optimizer,
        "clip_grad_norm": case.clip,
        **changes.pop("train", {}),
    }
    return spec_from(
        {
            "name": case.name,
            "model": case.model,
            "loss": case.loss_spec,
            "data": {"arrays": str(data)},
            "train": train,
            **changes,
        }
    )


def captured(case: Case, folder: Path, **changes: Any) -> CapturedJob:
    return capture_job(spec_of(case, folder, **changes), folder)


def in_one_process(case: Case, steps: int = STEPS) -> tuple[list[float], dict[str, Tensor]]:
    """Losses and final weights of plain PyTorch, without any pool."""
    return train(
        case.build,
        case.loss,
        as_tensors(case.arrays),
        steps=steps,
        global_batch=GLOBAL_BATCH,
        micro_batch=MICRO_BATCH,
        seed=SEED,
        optimizer=case.optimizer,
        clip=case.clip,
    )


def replanned(job: CapturedJob, **plan: Any) -> CapturedJob:
    """The same captured job with another `plan` section."""
    spec = job.spec.model_copy(update={"plan": job.spec.plan.model_copy(update=plan)})
    return CapturedJob(spec, job.dag, job.tensors, job.data)


def run(pool: LocalPool, job: CapturedJob, *, resume: str | None = None) -> Outcome:
    """Submit, wait for the end, and fetch losses and weights. Fails the test when the job does not end well."""
    with pool.client() as client:
        made = submit(client, job, resume=resume)
        ended = pool.watch(made["id"], lambda item: None)
        check_done(ended)
        losses = [metric["loss"] for metric in client.metrics(made["id"])]
        return Outcome(client.job(made["id"]), losses, weights(pool, made["id"], job.spec.train.steps))


def weights(pool: LocalPool, job: str, step: int) -> dict[str, Tensor]:
    target = pool.folder / f"{job}-{step}.safetensors"
    with pool.client() as client:
        client.download_checkpoint(job, step, "model", target)
    return load_file(target)


def assert_same_bits(one: dict[str, Tensor], other: dict[str, Tensor]) -> None:
    assert one.keys() == other.keys()
    different = [name for name in one if not torch.equal(one[name], other[name])]
    assert not different
