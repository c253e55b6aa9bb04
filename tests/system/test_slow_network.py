"""Local mode on a topology: a step over a slow link takes as long as it must, and no bit changes."""

from __future__ import annotations

import inspect
from pathlib import Path

import numpy as np
import pytest
import torch
from cases import Case, as_tensors
from plain import train
from runs import SEED, spec_of

from fusion.local import LocalPool, LocalWorker, check_done
from fusion.submit import capture_job, submit

pytestmark = pytest.mark.system

WIDTH, MICRO_BATCH, MICRO_BATCHES, STEPS = 1024, 32, 4, 3
BYTES_PER_SECOND, LATENCY = 1e6, 0.02
POOL = """
workers:
  - {name: oslo-1, region: oslo, speed: 4.0e+10, memory: 4GiB}
  - {name: lima-1, region: lima, speed: 2.0e+10, memory: 8GiB}
links:
  - {between: [oslo, lima], bandwidth: 8Mbit/s, latency: 20ms}
"""


def build() -> torch.nn.Module:
    middle = [torch.nn.Tanh() for _ in range(4)]
    return torch.nn.Sequential(torch.nn.Linear(8, WIDTH), *middle, torch.nn.Linear(WIDTH, 8))


def test_a_step_over_a_slow_link(tmp_path: Path) -> None:
    (tmp_path / "model.py").write_text(f"import torch\n\nWIDTH = {WIDTH}\n\n\n{inspect.getsource(build)}")
    (tmp_path / "pool.yaml").write_text(POOL)
    inputs = np.random.default_rng(0).normal(size=(256, 8)).astype(np.float32)
    case = Case(
        name="wide",
        model={"entrypoint": "model.py:build"},
        arrays={"inputs": inputs, "targets": np.sin(inputs)},
        build=build,
        loss=lambda model, batch: torch.nn.functional.mse_loss(model(batch["inputs"]), batch["targets"]),
        loss_spec="mse",
        optimizer={"name": "sgd", "lr": 0.1},
    )
    batch = {"steps": STEPS, "micro_batch": MICRO_BATCH, "global_batch": MICRO_BATCH * MICRO_BATCHES}
    spec = spec_of(case, tmp_path, train=batch, plan={"policy": "equal-ops", "workers": 2, "fragments": 2})
    workers = [LocalWorker("oslo-1"), LocalWorker("lima-1")]
    with LocalPool(tmp_path / "run", workers, topology=tmp_path / "pool.yaml", dashboard=False) as pool:
        job = capture_job(spec, tmp_path)
        pool.wait_for_workers()
        with pool.client() as client:
            ended = pool.watch(submit(client, job)["id"], lambda item: None)
            check_done(ended)
            metrics = client.metrics(ended["id"])
    losses, _ = train(
        case.build,
        case.loss,
        as_tensors(case.arrays),
        steps=STEPS,
        global_batch=MICRO_BATCH * MICRO_BATCHES,
        micro_batch=MICRO_BATCH,
        seed=SEED,
        optimizer=case.optimizer,
        clip=None,
    )
    assert [metric["loss"] for metric in metrics] == losses
    assert len(set(ended["plan"]["placement"])) == 2
    # Activations follow one another over the link; the last one's gradient comes back over the other direction.
    wire = 4 * WIDTH * MICRO_BATCH / BYTES_PER_SECOND
    least = MICRO_BATCHES * wire + LATENCY + wire + LATENCY
    # The first step's time begins with the run, so a report that is late shifts no time from one step out of the sum.
    assert sum(metric["step_seconds"] for metric in metrics) >= STEPS * least
    assert min(metric["step_seconds"] for metric in metrics) < 20 * least
