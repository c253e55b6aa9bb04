"""A run that goes on from a checkpoint gives the bits of the run that was never interrupted, on another number of workers."""

from __future__ import annotations

from pathlib import Path

import pytest
from cases import Case, all_cases
from runs import assert_same_bits, captured, replanned, run

from fusion.local import LocalPool

pytestmark = pytest.mark.system

# Dropout (randomness by step), batch norm with momentum (buffers and optimizer slots), clipping with AdamW (step counters).
RESUMED = [case for case in all_cases() if case.name in ("gpt-dropout", "resnet-18", "vit")]


@pytest.mark.parametrize("case", RESUMED, ids=lambda case: case.name)
def test_resume_on_another_number_of_workers(case: Case, pool: LocalPool, tmp_path: Path) -> None:
    job = captured(case, tmp_path, checkpoint={"every": 7}, train={"lr_schedule": {"name": "cosine", "warmup": 3}})
    whole = run(pool, replanned(job, workers=2))
    resumed = run(pool, replanned(job, workers=3), resume=f"{whole.job['id']}@14")
    assert resumed.losses == whole.losses[14:]
    assert_same_bits(resumed.state, whole.state)
