"""The keystone: on any number of workers, the numbers of plain PyTorch, to the last bit; with lossy codecs, those of one process."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from cases import Case, all_cases
from runs import STEPS, Outcome, assert_same_bits, captured, in_one_process, replanned, run

from benchmarks.one_process import OneProcess, Step
from coordinator.shown.views import ShownPlan
from fusion.local import LocalPool, check_done
from fusion.spec import CompressionSpec
from fusion.submit import CapturedJob, submit

pytestmark = pytest.mark.system

LOSSY: dict[str, dict[str, Any]] = {
    "dense": {"codec": "none"},
    "stochastic": {"forward": "int4", "backward": "int3:stochastic=1"},
    "gradients at its places": {"forward": "topk:ratio=4,value_bits=8", "backward": "topk-reused:value_bits=8"},
    "error feedback": {"codec": "topk", "ratio": 10, "error_feedback": True},
}
FEW = 4
"""Steps, after which the losses of two codecs differ for sure."""


@pytest.fixture
def _threads() -> Iterator[None]:
    threads = torch.get_num_threads()
    yield
    torch.set_num_threads(threads)


@pytest.mark.parametrize("case", all_cases(), ids=lambda case: case.name)
def test_any_number_of_workers_gives_the_bits_of_plain_pytorch(case: Case, pool: LocalPool, tmp_path: Path) -> None:
    job = captured(case, tmp_path)
    outcomes: dict[int, Outcome] = {
        workers: run(pool, replanned(job, workers=workers, schedule="gpipe" if workers == 3 else "1f1b"))
        for workers in (1, 2, 3, 4)
    }
    for workers, outcome in outcomes.items():
        assert len(outcome.losses) == STEPS
        assert len(set(outcome.job["plan"]["placement"])) == workers
    first = outcomes[1]
    if not case.random:
        losses, state = in_one_process(case)
        assert first.losses == losses
        assert_same_bits(first.state, state)
    for outcome in outcomes.values():
        if case.three_contributions:
            assert outcome.losses == pytest.approx(first.losses, rel=1e-6)
            for name, tensor in first.state.items():
                torch.testing.assert_close(outcome.state[name], tensor, rtol=1e-6, atol=1e-7)
        else:
            assert outcome.losses == first.losses
            assert_same_bits(outcome.state, first.state)


@pytest.mark.usefixtures("_threads")
def test_a_plan_in_one_process_has_the_losses_of_the_pool_that_follows_it(pool: LocalPool, tmp_path: Path) -> None:
    case = next(case for case in all_cases() if case.name == "gpt-tied")
    job = captured(
        case,
        tmp_path,
        train={"steps": FEW, "eval_every": FEW, "eval_batches": 2},
        plan={"policy": "equal-ops", "workers": 2, "fragments": 2},
    )
    losses: dict[str, list[float]] = {}
    for name, compression in LOSSY.items():
        spec = job.spec.model_copy(update={"compression": CompressionSpec(**compression)})
        lossy = CapturedJob(spec, job.dag, job.tensors, job.data)
        with pool.client() as client:
            ended = pool.watch(submit(client, lossy)["id"], lambda item: None)
            check_done(ended)
            metrics = client.metrics(ended["id"])
        plan = ShownPlan.model_validate(ended["plan"])
        assert len(set(plan.placement)) == 2
        process, steps = OneProcess(lossy, plan), list[Step]()
        process.train(steps.append)
        losses[name] = [step.loss for step in steps]
        assert losses[name] == [metric["loss"] for metric in metrics], name
        assert process.evaluations[FEW] == metrics[-1]["eval_loss"], name
        assert (process.evaluate_without_codecs() == process.evaluations[FEW]) == (name == "dense")
        assert (steps[0].raw_bytes == steps[0].sent_bytes) == (name == "dense")
    assert len({tuple(found) for found in losses.values()}) == len(LOSSY)
