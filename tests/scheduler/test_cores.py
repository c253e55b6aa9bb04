"""Devices that share cores: the pace of what computes on them, and what plans make of it."""

from __future__ import annotations

from dataclasses import replace
from itertools import pairwise

import numpy as np
import pytest
from scheduler_cases import chain, transformer

from dag.workload import workload
from fusion.plan import ScheduleName
from fusion.spec import OptimizerSpec
from scheduler import plan_job
from scheduler.cores import SharedCores, crowded
from scheduler.cost import Costs
from scheduler.devices import Device, Link, Network, Processor
from scheduler.estimate import Estimator, Placed
from scheduler.messages import plain
from scheduler.simulation import Simulation
from scheduler.simulator import STEPS, simulate

INSTANT = Network(Link(1e15, 0.0))
SGD = OptimizerSpec(name="sgd")
WHOLE, SEPARABLE = "aten.mul.Tensor", "aten.linear.default"


def pool(count: int, cores: float | None, each: float = 1.0) -> tuple[Device, ...]:
    """Devices on which a stage of `chain([1000] * n)` takes 1 s forward and 2 s back."""
    processor = None if cores is None else Processor("p", cores)
    return tuple(
        Device(
            f"d{index}",
            flops_per_second=1000,
            bytes_per_second=1e15,
            seconds_per_call=0,
            seconds_per_task=0,
            processor=processor,
            cores=each,
        )
        for index in range(count)
    )


def stages(
    devices: tuple[Device, ...], micro_batches: int, schedule: ScheduleName = "1f1b", target: str = WHOLE
) -> Simulation:
    count = len(devices)
    costs = Costs(
        workload(chain([1000] * count, [1] * (count - 1), target)), devices, INSTANT, schedule, micro_batches, SGD
    )
    depths = [min(micro_batches, 2 * (count - index) - 1) for index in range(count)]
    return simulate(costs, tuple(range(1, count)), tuple(range(count)), depths, plain(np.zeros(count - 1)))


def test_all_that_compute_go_on_at_the_same_pace() -> None:
    shared = SharedCores(2.0, {0: 1.0, 1: 1.0, 2: 1.0})
    shared.start(0.0, 0, 2.0)
    assert shared.next_end() == (2.0, 0)
    shared.start(0.0, 1, 4.0)
    assert shared.pace == 1.0
    shared.start(1.0, 2, 4.0)  # Two cores for three of them: each goes on at two thirds.
    assert shared.next_end() == (pytest.approx(2.5), 0)
    assert shared.stop(2.5, 0) == pytest.approx(0.0)
    assert shared.pace == 1.0
    assert shared.next_end() == (pytest.approx(4.5), 1)
    assert shared.stop(3.5, 2) == pytest.approx(2.0), "of 4 s it did 1 s by 2.5, and another one since"
    shared.stop(4.5, 1)
    assert shared.next_end() is None


@pytest.mark.parametrize("schedule", ["gpipe", "1f1b"])
@pytest.mark.parametrize("target", [WHOLE, SEPARABLE])
@pytest.mark.parametrize("count", [2, 3, 4])
def test_on_one_core_a_step_takes_all_the_work_there_is(count: int, target: str, schedule: ScheduleName) -> None:
    simulation = stages(pool(count, 1.0), 6, schedule, target)
    # Gradients of weights may be behind at a step's end, by which the steps differ.
    assert max(span.end for span in simulation.spans) == pytest.approx(STEPS * 6 * 3 * count)
    assert simulation.step_seconds == pytest.approx(6 * 3 * count, rel=0.03)


def test_with_cores_for_all_nothing_changes() -> None:
    usual, roomy = stages(pool(4, None), 8), stages(pool(4, 4.0), 8)
    assert roomy == usual


def test_who_rests_between_tasks_takes_less_of_a_core() -> None:
    assert not crowded(pool(4, 2.0, each=0.5))
    assert stages(pool(4, 2.0, each=0.5), 8) == stages(pool(4, None), 8)
    assert [each.cores for each in crowded(pool(4, 1.5, each=0.5))] == [1.5]


def test_two_cores_for_four_stages_are_never_faster_than_the_work_and_hardly_slower() -> None:
    simulation = stages(pool(4, 2.0), 8)
    assert 8 * 3 * 2 <= simulation.step_seconds <= 1.2 * 8 * 3 * 2
    assert 0 <= simulation.bubble < 0.5, "waiting for a core is not idling"
    for name in simulation.busy_per_worker:
        spans = sorted((span.start, span.end) for span in simulation.spans if span.resource == name)
        assert all(first[1] <= second[0] + 1e-9 for first, second in pairwise(spans))
        assert sum(end - start for start, end in spans) == pytest.approx(3 * simulation.busy_per_worker[name])


def test_other_processors_are_not_concerned() -> None:
    first = pool(2, 1.0)
    devices = (*first, replace(pool(1, None)[0], name="d2", processor=Processor("q", 1.0)))
    assert [sorted(each.demands) for each in crowded(devices)] == [[0, 1]]
    assert crowded(devices, among=[0, 2]) == []


def test_the_estimate_knows_of_it_too() -> None:
    dag = workload(chain([1000] * 4, [1] * 3, WHOLE))
    placed = Placed((1, 2, 3), (0, 1, 2, 3))
    seconds = [
        Estimator(Costs(dag, pool(4, cores), INSTANT, "1f1b", 32, SGD))(placed).seconds for cores in (None, 2.0, 1.0)
    ]
    assert seconds[1] == pytest.approx(2 * seconds[0], rel=0.15)
    assert seconds[2] == pytest.approx(4 * seconds[0], rel=0.15)


def test_op_fence_crosses_no_slow_link_for_workers_that_share_the_cores_of_near_ones() -> None:
    slow, fast = Link(5e5, 0.02), Link(1.25e8, 0.001)
    cities = {"a1": "a", "a2": "a", "b1": "b", "b2": "b"}
    network = Network(
        fast, regions={("a", "a"): fast, ("b", "b"): fast, ("a", "b"): slow, ("b", "a"): slow}, region_of=cities
    )
    dag = transformer(8, elements=16384, flops=200_000_000)
    apart = [Device(name, city, 2e10) for name, city in cities.items()]
    together = [replace(device, processor=Processor("p", 2.0)) for device in apart]
    far, near = (plan_job(dag, devices, network, micro_batches=8) for devices in (apart, together))
    assert set(far.placement) == set(cities)
    assert set(near.placement) == {"a1", "a2"}
    assert far.predicted_step_seconds is not None
    assert near.predicted_step_seconds is not None
    assert near.predicted_step_seconds > 1.2 * far.predicted_step_seconds
