"""Times of operators by their class: what convolutions take is counted by their own speed."""

from __future__ import annotations

from dataclasses import replace

import pytest
from scheduler_cases import transformer

from dag.graph import OpDag
from dag.workload import workload
from fusion.spec import OptimizerSpec
from scheduler.cost import Costs
from scheduler.devices import Device, Network


def convolving(dag: OpDag) -> OpDag:
    """The same OP-DAG with its matrix products called convolutions."""
    ops = tuple(
        replace(op, target="aten.conv2d.default") if op.target.startswith("aten.linear") else op for op in dag.ops
    )
    return replace(dag, ops=ops)


def test_convolutions_have_a_speed_of_their_own() -> None:
    plain, dag = transformer(2), convolving(transformer(2))
    work = workload(dag)
    assert 0 < work.convolution_flops[-1] <= work.flops[-1]
    assert 0 < work.backward_convolution_flops[-1] <= work.backward_flops[-1]
    assert workload(plain).convolution_flops[-1] == 0
    device = Device("a", flops_per_second=1e6, bytes_per_second=1e15, seconds_per_call=0.0)
    slow = replace(device, convolution_flops_per_second=0.5e6)

    def forward(of: OpDag, on: Device) -> float:
        costs = Costs(workload(of), (on,), Network(), "1f1b", 1, OptimizerSpec(name="sgd"))
        return float(costs.times(on).forward[-1])

    assert forward(plain, slow) == forward(plain, device) == forward(dag, device)
    more = work.convolution_flops[-1] / 1e6
    assert forward(dag, slow) == pytest.approx(forward(dag, device) + more)


def test_calls_of_convolutions_have_a_fixed_time_of_their_own() -> None:
    plain, dag = transformer(2), convolving(transformer(2))
    device = Device("a", flops_per_second=1e12, seconds_per_call=1e-5)
    convolutions = sum(op.target == "aten.conv2d.default" for op in dag.ops)

    def both(of: OpDag, on: Device) -> float:
        costs = Costs(workload(of), (on,), Network(), "1f1b", 1, OptimizerSpec(name="sgd"))
        return float(costs.times(on).both[-1])

    own = replace(device, seconds_per_convolution=1e-3)
    assert both(plain, own) == both(plain, device) == both(dag, device)
    # One forward and two back.
    assert both(dag, own) == pytest.approx(both(dag, device) + 3 * convolutions * (1e-3 - 1e-5))


def test_a_slowed_device_is_slower_in_everything() -> None:
    device = Device("a", flops_per_second=8e9, convolution_flops_per_second=4e9, seconds_per_convolution=1e-4)
    slowed = device.slowed(4)
    assert (slowed.flops_per_second, slowed.convolution_rate, slowed.traffic_rate) == (2e9, 1e9, 0.25e9)
    assert (slowed.seconds_per_call, slowed.convolution_call, slowed.seconds_per_task) == (
        4 * device.seconds_per_call,
        4e-4,
        4 * device.seconds_per_task,
    )
    # A device that has no figure for convolutions goes on without one.
    assert Device("b").slowed(2).convolution_call == Device("b").slowed(2).seconds_per_call
