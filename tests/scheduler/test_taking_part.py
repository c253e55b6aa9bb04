"""Who takes part where a job asks for a number of workers."""

from __future__ import annotations

import time
from itertools import combinations
from random import Random

import pytest
from scheduler_cases import MEGA, transformer

from dag.workload import workload
from fusion.errors import PlanError
from fusion.plan import Plan
from fusion.spec import CompressionSpec
from scheduler import Costs, Device, Link, Network, Training, homogeneous, plan_for, plan_job
from scheduler.groups import groups
from scheduler.policies import POLICIES
from scheduler.taking_part import AS_GOOD

DAG = transformer(4, elements=16384)
FAST, SLOW = Link(125e6, 1e-3), Link(2e6, 0.09)
PLAIN = CompressionSpec()


def places(devices: tuple[Device, ...]) -> Network:
    """Fast links within a region, slow ones between two."""
    regions = {device.region for device in devices}
    links = {(first, second): FAST if first == second else SLOW for first in regions for second in regions}
    return Network(SLOW, {}, links, {device.name: device.region for device in devices})


def asked(count: int, devices: tuple[Device, ...], network: Network, policy: str = "op-fence", dag=DAG) -> Plan:
    return plan_for(dag, devices, network, Training(micro_batches=4, workers=count), policy, PLAIN)


@pytest.mark.parametrize("policy", sorted(POLICIES))
def test_two_that_are_near_each_other_take_part_in_whatever_order_they_joined(policy: str) -> None:
    a1, b1, a2 = Device("a1", "a"), Device("b1", "b"), Device("a2", "a")
    for pool in ((a1, b1, a2), (b1, a1, a2), (a2, a1, b1)):
        assert set(asked(2, pool, places(pool), policy).workers) == {"a1", "a2"}


def test_of_equal_workers_those_that_joined_first_take_part() -> None:
    for pool, count in ((homogeneous("dbca"), 2), (homogeneous(f"w{index}" for index in range(40)), 6)):
        plan = asked(count, pool, Network())
        assert set(plan.workers) == {device.name for device in pool[:count]}


def test_faster_workers_take_part_where_links_are_alike() -> None:
    pool = tuple(Device(f"w{index}", flops_per_second=4e10 if index in (3, 7, 11) else 1e10) for index in range(12))
    assert set(asked(3, pool, Network()).workers) == {"w3", "w7", "w11"}


def test_a_fast_worker_far_away_is_not_worth_its_link() -> None:
    pool = (Device("far", "b", 1e11), *(Device(f"near{index}", "a", 5e10) for index in range(9)))
    assert "far" not in asked(3, pool, places(pool)).workers


def test_a_job_that_fits_only_the_roomiest_workers_is_not_refused() -> None:
    """The fast ones near each other have no room, and nothing that is guessed from speeds and links leads elsewhere."""
    small = tuple(Device(f"small{index}", "a", 5e10, 1) for index in range(8))
    pool = (*small, Device("large1", "b", 1e9, 2**30), Device("large2", "c", 1e9, 2**30))
    assert set(asked(2, pool, places(pool)).workers) == {"large1", "large2"}
    with pytest.raises(PlanError, match="missing"):
        asked(2, small, places(small))


def test_a_policy_that_does_not_fit_the_best_group_gets_the_next() -> None:
    """Half of the ops each is too much for one of the fast pair; OP-Fence cuts elsewhere."""
    pool = (Device("a1", "a", 5e10, 2**30), Device("b1", "b", 5e10, 2**30), Device("a2", "a", 5e10, 1_400_000))
    assert set(asked(2, pool, places(pool)).workers) == {"a1", "a2"}
    assert set(asked(2, pool, places(pool), "equal-ops").workers) == {"a1", "b1"}


@pytest.mark.parametrize("seed", range(4))
def test_no_other_group_is_clearly_faster(seed: int) -> None:
    """Exhaustively: there are more pairs in a pool of six than are planned."""
    generator = Random(seed)
    pool = tuple(Device(f"w{i}", generator.choice("abc"), 10 ** generator.uniform(9.7, 10.8)) for i in range(6))
    network, dag = places(pool), transformer(3, elements=4096, flops=50 * MEGA)
    every = [
        plan_job(dag, group, network, micro_batches=4, use_all=True).predicted_step_seconds
        for group in combinations(pool, 2)
    ]
    plan = asked(2, pool, network, dag=dag)
    assert len(plan.workers) == 2
    assert plan.predicted_step_seconds is not None
    assert plan.predicted_step_seconds <= 1.05 * AS_GOOD * min(seconds for seconds in every if seconds)


def test_groups_of_a_thousand_devices_are_found_at_once() -> None:
    generator = Random(0)
    pool = tuple(
        Device(f"w{index}", f"r{generator.randrange(20)}", 10 ** generator.uniform(10, 11)) for index in range(1000)
    )
    training = Training(micro_batches=8)
    costs = Costs(workload(DAG), pool, places(pool), "1f1b", 8, training.optimizer_spec)
    for count in (2, 16, 64, 400):
        begun = time.process_time()
        found = groups(costs, count)
        assert time.process_time() - begun < 5
        assert found[0] == tuple(range(count))
        assert all(len(set(group)) == count for group in found)
        assert found == groups(costs, count), "the same every time"
        best = [pool[index] for index in found[1]]
        assert len({device.region for device in best}) <= 1 + count // 30
