"""A worker's network is cut and heals, before `failure_timeout` and after it: every bit stays, and no step counts twice."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
from cases import all_cases
from runs import captured

from benchmarks.disturbed import Outcome, Running, differences, joined
from benchmarks.placed_pool import PlacedPool
from benchmarks.shaping import ShapedNetwork
from fusion.submit import CapturedJob

pytestmark = [pytest.mark.system, pytest.mark.usefixtures("shaped_links")]

NAMES = ("w0", "w1", "w2")
TIMEOUT = 2.0
STEPS = 40


@pytest.fixture(scope="module")
def job(tmp_path_factory: pytest.TempPathFactory) -> CapturedJob:
    case = next(case for case in all_cases() if case.name == "gpt-dropout")
    return captured(
        case,
        tmp_path_factory.mktemp("job"),
        train={"steps": STEPS, "clip_grad_norm": 1.0},
        plan={"fragments": 3, "policy": "equal-ops"},
        fault_tolerance={"failure_timeout": TIMEOUT},
    )


@contextmanager
def running(job: CapturedJob, folder: Path) -> Iterator[tuple[ShapedNetwork, PlacedPool, Running]]:
    with ShapedNetwork(NAMES, 1e9) as network, PlacedPool(folder, NAMES, network) as pool:
        pool.wait_for_workers()
        run = Running(pool, job)
        run.until_step(3)
        yield network, pool, run


@pytest.fixture(scope="module")
def calm(job: CapturedJob, tmp_path_factory: pytest.TempPathFactory) -> Outcome:
    with running(job, tmp_path_factory.mktemp("calm")) as (_, _, run):
        return run.finish()


def test_a_partition_that_heals_before_the_timeout_costs_nothing_but_time(
    job: CapturedJob, calm: Outcome, tmp_path: Path
) -> None:
    with running(job, tmp_path) as (network, _, run):
        victim = run.plan()[1]
        network.cut(victim)
        until = time.monotonic() + TIMEOUT / 4
        run.until(lambda: time.monotonic() > until)
        network.heal(victim)
        outcome = run.finish()
    assert differences(calm, outcome) == [], run.story()
    assert outcome.count("worker-lost", "adoption", "restarted") == 0, run.story()


def test_a_partition_that_heals_after_the_timeout_brings_the_worker_back_as_a_new_one(
    job: CapturedJob, calm: Outcome, tmp_path: Path
) -> None:
    with running(job, tmp_path) as (network, pool, run):
        run.until(lambda: run.common_step() > 0)
        victim = run.plan()[1]
        network.cut(victim)
        run.until(lambda: run.heard("adoption"))
        assert victim not in joined(pool, NAMES)
        network.heal(victim)
        run.until(lambda: run.ended is not None or victim in joined(pool, NAMES))
        outcome = run.finish()
    assert differences(calm, outcome) == [], run.story()
    assert outcome.count("adoption") == 1, run.story()
    assert outcome.count("restarted") == 0, run.story()
