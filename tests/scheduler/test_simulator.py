"""The simulator against cases that can be computed by hand."""

from __future__ import annotations

import itertools
from dataclasses import replace

import numpy as np
import pytest
from scheduler_cases import chain, transformer, two_cities

from dag.workload import workload
from executor.ordering import passes
from fusion.plan import ScheduleName
from fusion.spec import OptimizerSpec
from scheduler import Training, plan_job, simulate_plan
from scheduler.cost import CALLS_PER_SPLIT, Costs
from scheduler.devices import Device, Link, Network
from scheduler.messages import Messages, Way, plain
from scheduler.simulation import Simulation
from scheduler.simulator import simulate

INSTANT = Link(1e15, 0.0)
SGD = OptimizerSpec(name="sgd")
WHOLE, SEPARABLE = "aten.mul.Tensor", "aten.linear.default"
"""Ops whose backward is one, and ops that leave the gradients of weights for later: 1 s of the 2."""


def stages(
    count: int,
    micro_batches: int,
    schedule: ScheduleName,
    *,
    link: Link = INSTANT,
    size: float = 0.0,
    in_flight: tuple[int, ...] | None = None,
    hosts: tuple[int, ...] | None = None,
    weights_behind: tuple[int, ...] | None = None,
    clip: bool = False,
    target: str = WHOLE,
) -> Simulation:
    """`count` stages of 1 s forward and 2 s backward each; messages of `size` bytes."""
    dag = chain([1000] * count, [1] * (count - 1), target)
    devices = tuple(
        Device(f"d{index}", flops_per_second=1000, bytes_per_second=1e15, seconds_per_call=0, seconds_per_task=0)
        for index in range(count)
    )
    costs = Costs(workload(dag), devices, Network(link), schedule, micro_batches, SGD, clip=clip)
    sizes = np.full(count - 1, size)
    return simulate(
        costs,
        tuple(range(1, count)),
        hosts or tuple(range(count)),
        in_flight or tuple(count - index for index in range(count)),
        plain(sizes),
        weights_behind=weights_behind,
    )


@pytest.mark.parametrize("schedule", ["gpipe", "1f1b"])
@pytest.mark.parametrize(("count", "micro_batches"), [(1, 1), (1, 4), (2, 1), (2, 4), (4, 8), (5, 3)])
def test_equal_stages_take_m_plus_p_minus_1_rounds(schedule: ScheduleName, count: int, micro_batches: int) -> None:
    simulation = stages(count, micro_batches, schedule)
    assert simulation.step_seconds == pytest.approx((micro_batches + count - 1) * 3)
    assert simulation.bubble == pytest.approx((count - 1) / (micro_batches + count - 1))
    assert all(busy == pytest.approx(3 * micro_batches) for busy in simulation.busy_per_worker.values())


@pytest.mark.parametrize("schedule", ["gpipe", "1f1b"])
@pytest.mark.parametrize(("count", "micro_batches"), [(1, 4), (2, 1), (2, 4), (4, 8), (5, 3)])
def test_nobody_waits_for_gradients_of_weights(schedule: ScheduleName, count: int, micro_batches: int) -> None:
    simulation = stages(count, micro_batches, schedule, target=SEPARABLE, weights_behind=(1,) * count)
    # Filling takes P - 1 forwards, draining as many gradients of inputs, where it took as many whole backwards.
    assert simulation.step_seconds == pytest.approx(micro_batches * 3 + (count - 1) * 2)
    assert all(busy == pytest.approx(3 * micro_batches) for busy in simulation.busy_per_worker.values())


def test_where_no_gradients_of_weights_are_owed_backwards_are_whole() -> None:
    whole = stages(4, 8, "1f1b", target=SEPARABLE, weights_behind=(0,) * 4)
    assert whole.step_seconds == pytest.approx((8 + 4 - 1) * 3)
    assert not any(span.kind == "weights" for span in whole.spans)


def test_weights_computed_apart_take_longer() -> None:
    dag = chain([1000] * 2, [1], SEPARABLE)
    work = workload(dag)
    device = Device("d", flops_per_second=1000, bytes_per_second=1e15, seconds_per_call=0.01, seconds_per_task=0)
    costs = Costs(work, (device, replace(device, name="e")), Network(INSTANT), "1f1b", 4, SGD)
    apart, whole = (
        simulate(costs, (1,), (0, 1), (2, 1), plain(np.zeros(1)), weights_behind=(0, behind)) for behind in (9, 0)
    )
    more = 4 * CALLS_PER_SPLIT * device.seconds_per_call
    assert apart.busy_per_worker["e"] == pytest.approx(whole.busy_per_worker["e"] + more)
    assert apart.busy_per_worker["d"] == whole.busy_per_worker["d"]


def test_weights_that_wait_fill_the_pipeline_s_bubble() -> None:
    depths = (7, 5, 3, 1)
    usual = stages(4, 8, "1f1b", in_flight=depths)
    filled = stages(4, 8, "1f1b", in_flight=depths, target=SEPARABLE)
    assert usual.step_seconds == pytest.approx(8 * 3 + 3 * 3)
    assert filled.step_seconds == pytest.approx(8 * 3)
    # With as many in flight as stages: ZB-H1's bubble, (P - 1)(F + B - W) = 3 s (Qi et al. 2024, table 2).
    assert stages(4, 8, "1f1b", target=SEPARABLE).step_seconds == pytest.approx(8 * 3 + 3)
    assert {span.kind for span in filled.spans if span.resource == "d0"} == {"forward", "backward", "update"}
    weights = [span for span in filled.spans if span.kind == "weights" and span.step == 2]
    assert len({(span.fragment, span.micro_batch) for span in weights}) == 3 * 8
    assert len(weights) > 3 * 8, "some make way for what arrives"
    assert sum(span.end - span.start for span in weights) == pytest.approx(3 * 8)
    assert max(filled.memory_per_worker.values()) > max(usual.memory_per_worker.values())


@pytest.mark.parametrize("clip", [False, True])
def test_one_micro_batch_pays_every_latency_and_transfer(clip: bool) -> None:
    simulation = stages(3, 1, "1f1b", link=Link(10.0, 0.5), size=20.0, clip=clip)
    if not clip:
        assert simulation.step_seconds == pytest.approx(9 + 4 * (0.5 + 2.0))
        assert simulation.bytes_per_link["d0", "d1"] == simulation.bytes_per_link["d1", "d0"] == 20.0
    else:
        assert simulation.bytes_per_link["d0", "d2"] == 256.0


def test_encoding_and_decoding_take_threads_of_their_own() -> None:
    dag = chain([1000] * 2, [1], WHOLE)
    devices = tuple(
        Device(f"d{i}", flops_per_second=1000, bytes_per_second=1e15, seconds_per_call=0, seconds_per_task=0)
        for i in range(2)
    )
    for micro_batches, wanted in ((1, 6 + 2 * 1.5), (8, 8 * 3 + 3 + 2 * 1.5)):
        costs = Costs(workload(dag), devices, Network(INSTANT), "1f1b", micro_batches, SGD)
        way = Way(np.zeros(1), np.full(1, 0.5), np.full(1, 1.0))
        simulation = simulate(costs, (1,), (0, 1), (min(4, micro_batches), 1), Messages(way, way))
        # One message waits for its codec; with more of them only the first activation and the last gradient do.
        assert simulation.step_seconds == pytest.approx(wanted)
        encoded = [span for span in simulation.spans if span.kind == "encode" and span.step == 1]
        assert {span.resource for span in encoded} == {"d0 encoder", "d1 encoder"}
        assert len(encoded) == 2 * micro_batches
        assert simulation.busy_per_worker == pytest.approx({"d0": 3 * micro_batches, "d1": 3 * micro_batches})


def test_a_slow_codec_paces_the_pipeline_like_a_slow_link() -> None:
    dag = chain([1000] * 2, [1], WHOLE)
    devices = tuple(
        Device(f"d{i}", flops_per_second=1000, bytes_per_second=1e15, seconds_per_call=0, seconds_per_task=0)
        for i in range(2)
    )
    costs = Costs(workload(dag), devices, Network(INSTANT), "gpipe", 4, SGD)
    slow, instant = Way(np.zeros(1), np.full(1, 5.0), np.zeros(1)), Way(*np.zeros((3, 1)))
    assert simulate(costs, (1,), (0, 1), (4, 4), Messages(slow, instant)).step_seconds == pytest.approx(
        1 + 4 * 5 + 1 + 4 * 2 + 2
    )


def test_gpipe_over_a_slow_link_is_paced_by_the_link() -> None:
    # 4 messages of 5 s each way, and nothing but the first forward and the last backward stands outside them.
    simulation = stages(2, 4, "gpipe", link=Link(1.0, 0.0), size=5.0)
    forward = 1 + 4 * 5 + 1
    backward = 2 + 4 * 5 + 2
    assert simulation.step_seconds == pytest.approx(forward + backward)


def test_directions_of_a_pair_don_t_share_a_rate() -> None:
    spans = stages(2, 4, "1f1b", link=Link(1.0, 0.0), size=5.0, in_flight=(4, 1)).spans
    out = [span for span in spans if span.resource == "d0 → d1" and span.step == 2]
    back = [span for span in spans if span.resource == "d1 → d0" and span.step == 2]
    assert all(first.end <= second.start + 1e-9 for first, second in itertools.pairwise(out))
    assert any(a.start < b.end and b.start < a.end for a in out for b in back)


def test_more_in_flight_hides_latency() -> None:
    slow = stages(2, 8, "1f1b", link=Link(1e12, 3.0), in_flight=(2, 1))
    hidden = stages(2, 8, "1f1b", link=Link(1e12, 3.0), in_flight=(5, 1))
    assert slow.step_seconds > 1.4 * hidden.step_seconds
    assert hidden.step_seconds == pytest.approx(8 * 3 + 3 + 2 * 3)


def test_a_worker_runs_one_task_at_a_time_and_hosts_several_fragments() -> None:
    simulation = stages(4, 4, "1f1b", hosts=(0, 1, 1, 0))
    assert set(simulation.busy_per_worker) == {"d0", "d1"}
    for worker in ("d0", "d1"):
        spans = sorted((s for s in simulation.spans if s.resource == worker), key=lambda s: s.start)
        assert all(a.end <= b.start + 1e-9 for a, b in itertools.pairwise(spans))
    assert ("d1", "d1") not in simulation.bytes_per_link


def test_spans_follow_the_executor_s_order() -> None:
    spans = [s for s in stages(2, 4, "1f1b").spans if s.resource == "d0" and s.step == 1 and s.kind != "update"]
    assert [(s.kind, s.micro_batch) for s in spans] == [(kind.value, index) for kind, index in passes("1f1b", 4, 2)]


def test_tied_parameters_travel_once_per_step_and_their_gradients_per_micro_batch() -> None:
    dag = transformer(2, tied=True)
    devices, network = two_cities()
    plan = plan_job(dag, devices[:2], network, policy="equal-ops", micro_batches=4)
    simulation = simulate_plan(dag, plan, devices, network, Training(micro_batches=4))
    parameters = [span for span in simulation.spans if span.kind == "parameter"]
    assert [span.step for span in parameters] == [1, 2, 3]
    work = workload(dag)
    crossings = work.crossings(plan.cuts)
    sizes = work.value_bytes[crossings.value]
    moving, returning = ~crossings.parameter, crossings.gradient
    assert simulation.bytes_per_link["oslo-1", "lima-1"] == pytest.approx(
        4 * sizes[moving].sum() + sizes[crossings.parameter].sum()
    )
    assert simulation.bytes_per_link["lima-1", "oslo-1"] == pytest.approx(4 * sizes[returning].sum())
