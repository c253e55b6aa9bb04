"""Processes that are killed are missed, and come back under their names, long before anybody's timeout."""

from __future__ import annotations

from pathlib import Path

import pytest
from cases import all_cases
from runs import captured

from benchmarks.disturbed import FaultyPool, Running, joined
from fusion.submit import CapturedJob

pytestmark = pytest.mark.system

NAMES = ("w0", "w1")
TIMEOUT = 600.0
SOON = 60.0
"""For starting processes on a busy machine; a third of the timeout is more than three times that."""


def job_of(folder: Path, steps: int) -> CapturedJob:
    return captured(
        next(case for case in all_cases() if case.name == "gpt-untied"),
        folder,
        train={"steps": steps},
        plan={"workers": 1, "fragments": 1},
        checkpoint={"every": 10},
        fault_tolerance={"failure_timeout": TIMEOUT},
    )


def test_the_only_host_of_a_job_is_missed_at_once_and_all_come_back_under_their_names(tmp_path: Path) -> None:
    with FaultyPool(tmp_path / "pool", NAMES) as pool:
        pool.wait_for_workers()
        run = Running(pool, job_of(tmp_path, 400))
        run.until_step(12)
        (host,) = set(run.plan())
        pool.kill(host)
        run.until(lambda: run.heard("worker-lost") and run.heard("restarted"), 20.0)
        (spare,) = set(NAMES) - {host}
        run.until(lambda: set(run.plan()) == {spare})
        pool.kill(spare)
        for name in NAMES:
            pool.start_again(name)
        run.until(lambda: joined(pool, NAMES) == set(NAMES), SOON)
        outcome = run.finish(SOON)
    assert sorted(outcome.losses) == list(range(1, 401))
    assert outcome.count("worker-lost") == 2, run.story()


def test_after_a_power_cut_everybody_comes_back_under_its_name(tmp_path: Path) -> None:
    with FaultyPool(tmp_path / "pool", NAMES) as pool:
        pool.wait_for_workers()
        run = Running(pool, job_of(tmp_path, 200))
        run.until_step(12)
        for name in ("coordinator", *NAMES):
            pool.kill(name)
        pool.start_coordinator()
        for name in NAMES:
            pool.start_again(name)
        run.until(lambda: joined(pool, NAMES) == set(NAMES), SOON)
        outcome = run.finish(SOON)
    assert sorted(outcome.losses) == list(range(1, 201))
