"""A thousand devices and a DAG of five thousand ops."""

from __future__ import annotations

import time
from random import Random

import pytest
from scheduler_cases import MEGA, transformer

from scheduler import Device, Link, Network, plan_job


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
