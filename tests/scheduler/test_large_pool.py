"""A thousand devices and a DAG of five thousand ops; how much a search may simulate."""

from __future__ import annotations

import time
from random import Random
from typing import Any

import pytest
from scheduler_cases import MEGA, transformer

from scheduler import Device, Link, Network, plan_job
from scheduler.cost import Costs
from scheduler.estimate import Estimator, Placed
from scheduler.policies import base
from scheduler.policies.op_fence import MOST_COMPARED
from scheduler.simulation import Simulation


@pytest.mark.slow
def test_a_thousand_devices_are_planned_within_ten_seconds_of_one_core() -> None:
    generator = Random(0)
    regions = [f"r{index}" for index in range(20)]
    devices = tuple(
        Device(f"w{index}", generator.choice(regions), 10 ** generator.uniform(10, 11), 8 * 2**30)
        for index in range(1000)
    )
    links = {}
    for index, first in enumerate(regions):
        for second in regions[: index + 1]:
            far = Link(10 ** generator.uniform(6, 7.5), generator.uniform(0.01, 0.15))
            links[first, second] = links[second, first] = Link(125e6, 0.001) if first == second else far
    network = Network(Link(1e6, 0.1), {}, links, {device.name: device.region for device in devices})
    dag = transformer(1000, flops=500 * MEGA)
    assert len(dag.body) >= 5000

    begun = time.process_time()
    plan = plan_job(dag, devices, network, micro_batches=32)
    assert time.process_time() - begun < 10

    naive = plan_job(dag, devices, network, micro_batches=32, policy="equal-compute", fragments=len(plan.placement))
    assert plan.predicted_step_seconds is not None
    assert naive.predicted_step_seconds is not None
    assert plan.predicted_step_seconds < 0.8 * naive.predicted_step_seconds


@pytest.mark.slow
def test_a_long_model_is_not_tried_at_every_position_for_who_has_to_take_part() -> None:
    """Thirteen slow workers get a piece each; all ways to give them one would take half a minute."""
    devices = tuple(
        Device(f"w{index}", "near" if index < 3 else "far", 1e10 if index < 3 else 1e8) for index in range(16)
    )
    slow, fast = Link(2e5, 0.02), Link(1e8, 1e-3)
    links = {(a, b): fast if a == b else slow for a in ("near", "far") for b in ("near", "far")}
    network = Network(slow, {}, links, {device.name: device.region for device in devices})
    begun = time.process_time()
    plan = plan_job(transformer(300), devices, network, micro_batches=8, use_all=True)
    assert time.process_time() - begun < 10
    assert len(set(plan.placement)) == 16


def test_long_pipelines_are_not_simulated_while_searching(monkeypatch: pytest.MonkeyPatch) -> None:
    """The baselines' pipelines over the whole pool would take minutes to play."""
    played: list[int] = []
    simulate = base.play

    def noted(costs: Costs, estimate: Estimator, placed: Placed, *args: Any, **settings: Any) -> Simulation:
        played.append(costs.micro_batches * len(placed.devices))
        return simulate(costs, estimate, placed, *args, **settings)

    monkeypatch.setattr(base, "play", noted)
    # Two fast workers side by side do best; all others are slow and far away.
    devices = tuple(
        Device(f"w{index}", "near" if index < 2 else "far", 1e11 if index < 2 else 1e9) for index in range(90)
    )
    near, far = Link(125e6, 0.001), Link(1e5, 0.2)
    links = {(first, second): far for first in ("near", "far") for second in ("near", "far")} | {("near", "near"): near}
    network = Network(far, {}, links, {device.name: device.region for device in devices})
    dag, micro_batches = transformer(16), 64
    plan = plan_job(dag, devices, network, micro_batches=micro_batches)
    long = plan_job(dag, devices, network, micro_batches=micro_batches, policy="equal-ops")
    assert len(long.placement) * micro_batches > MOST_COMPARED > len(plan.placement) * micro_batches
    assert played
    assert max(played) <= MOST_COMPARED
