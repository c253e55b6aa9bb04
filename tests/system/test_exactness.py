"""The keystone: on any number of workers, the numbers of plain PyTorch, to the last bit."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from cases import Case, all_cases
from runs import STEPS, Outcome, assert_same_bits, captured, in_one_process, replanned, run

from fusion.local import LocalPool

pytestmark = pytest.mark.system


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
