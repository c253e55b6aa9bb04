"""A short run of `benchmarks/chaos.py`: faults of random kinds, one after the other; every bit stays."""

from __future__ import annotations

from pathlib import Path

import pytest

from benchmarks.chaos import calm, captured, disturbed, leaks
from benchmarks.common import Workload
from benchmarks.disturbed import differences

pytestmark = pytest.mark.system

SMALL = Workload(layers=3, width=64, sequence_length=64, micro_batch=2, micro_batches=4, steps=100)
NAMES = ("worker-1", "worker-2", "worker-3")


def test_faults_of_every_kind_change_no_bit(tmp_path: Path) -> None:
    folder = tmp_path / "job"
    folder.mkdir()
    job = captured(SMALL, folder)
    before, usual = calm(job, NAMES, tmp_path / "calm")
    said: list[str] = []
    outcome, storm, after = disturbed(job, NAMES, tmp_path / "storm", faults=4, seed=4, say=said.append)
    assert differences(before, outcome) == [], said
    assert leaks(usual, after) == []
    assert sum(storm.happened.values()) >= 2, "the job was over before anything could happen; give it more steps"
