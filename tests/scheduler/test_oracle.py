"""OP-Fence against the best of all placements, over random small cases."""

from __future__ import annotations

import numpy as np
import pytest
from oracle import best, simulated
from scheduler_cases import random_case

from dag.workload import workload
from fusion.spec import OptimizerSpec
from scheduler import plan_job
from scheduler.cost import Costs
from scheduler.estimate import Placed

CASES = 100


@pytest.mark.timeout(600)
def test_op_fence_is_close_to_the_optimum(record_property: pytest.RecordProperty) -> None:
    ratios = []
    for seed in range(CASES):
        dag, devices, network, micro_batches = random_case(seed, most_devices=3, positions=5)
        schedule = ("1f1b", "gpipe")[seed % 2]
        costs = Costs(workload(dag), devices, network, schedule, micro_batches, OptimizerSpec())  # type: ignore[arg-type]
        plan = plan_job(dag, devices, network, schedule=schedule, micro_batches=micro_batches)  # type: ignore[arg-type]
        names = [device.name for device in devices]
        mine = Placed(plan.cuts, tuple(names.index(name) for name in plan.placement))
        ratios.append(simulated(costs, mine, plan.in_flight) / best(costs))
    record_property("mean_ratio", float(np.mean(ratios)))
    record_property("worst_ratio", max(ratios))
    assert np.mean(ratios) <= 1.05
    assert max(ratios) <= 1.15
