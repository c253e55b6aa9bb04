"""Another placement for a running job: what the scheduler says, with no more moves than it takes."""

from __future__ import annotations

from collections import Counter
from dataclasses import replace
from typing import Any

import pytest
from coordinator_cases import job_record, job_spec, tiny_dag, training

from coordinator.plans.planning import Candidate, Pricing, alike, anew, summarize, with_fewer_moves
from coordinator.plans.scheduling import SchedulerPlanner, scheduler_planner
from dag.cut import cut
from dag.workload import workload
from fusion.messages import Device
from fusion.plan import CodecChoice, Plan
from fusion.topology import Topology


def plan(*placement: str, seconds: float | None = None) -> Plan:
    count = len(placement)
    return Plan(
        policy="x",
        cuts=tuple(range(1, count)),
        placement=placement,
        in_flight=(1,) * count,
        predicted_step_seconds=seconds,
    )


def busiest(other: Plan) -> float:
    """All fragments and workers are alike."""
    return float(max(len(other.fragments_of(worker)) for worker in other.workers))


def test_workers_that_are_alike_don_t_change_places() -> None:
    before, after = plan("a", "b", "c"), plan("b", "a", "b", seconds=2.0)
    assert with_fewer_moves(before, after, {"a", "b"}, busiest).placement == ("a", "b", "a")


def test_what_gains_something_moves() -> None:
    before, after = plan("a", "a", "a", "b"), plan("b", "b", "a", "a", seconds=2.0)
    chosen = with_fewer_moves(before, after, {"a", "b"}, busiest)
    assert (chosen.placement, chosen.predicted_step_seconds) == (("a", "a", "b", "b"), 2.0)


def test_nothing_stays_with_a_worker_that_is_gone() -> None:
    before, after = plan("a", "b"), plan("a", "a", seconds=2.0)
    assert with_fewer_moves(before, after, {"a"}, busiest).placement == ("a", "a")


def test_the_scheduler_prices_a_plan_for_workers_as_slow_as_they_are_now() -> None:
    planner = scheduler_planner()
    assert isinstance(planner, Pricing)
    dag, spec = tiny_dag(), job_spec()
    train = training(spec)
    device = Device(flops_per_second=1e3)
    here = plan("a")
    fast = planner.price(dag, [Candidate("a", device)], spec, train, here)
    slow = planner.price(dag, [Candidate("a", device, 2.0)], spec, train, here)
    assert fast is not None
    assert slow is not None
    assert slow > 1.5 * fast
    assert planner.price(dag, [Candidate("b", device)], spec, train, here) is None
    small = Device(flops_per_second=1e3, memory_bytes=1)
    assert planner.price(dag, [Candidate("a", small)], spec, train, here) is None


def test_in_local_mode_speeds_of_a_topology_are_shares_of_what_is_measured() -> None:
    worker = {"region": "here", "memory": "4GiB"}
    topology = Topology.model_validate(
        {
            "workers": [{"name": "a", "speed": 4e15, **worker}, {"name": "b", "speed": 1e15, **worker}],
            "links": [{"between": ["here", "here"], "bandwidth": "1Gbit/s", "latency": 0}],
        }
    )
    # Both measure the same processor, each with its own error.
    pool = [Candidate("a", Device(flops_per_second=1e3)), Candidate("b", Device(flops_per_second=1.1e3))]
    dag, spec = tiny_dag(), job_spec()
    train = training(spec)
    local, elsewhere = scheduler_planner(topology, relative_speeds=True), scheduler_planner(topology)
    assert isinstance(local, Pricing)
    assert isinstance(elsewhere, Pricing)
    prices = {name: local.price(dag, pool, spec, train, plan(name)) for name in ("a", "b")}
    assert prices["b"] == pytest.approx(4 * prices["a"])
    measured = scheduler_planner().price(dag, pool, spec, train, plan("b"))
    assert prices["a"] == pytest.approx(measured)
    assert elsewhere.price(dag, pool, spec, train, plan("a")) < prices["a"]
    # One that is slowed down, here four times, rests after each task, and pays for it with each forward and backward.
    pool = [replace(each, device=each.device.model_copy(update={"seconds_after_rest": 0.5})) for each in pool]
    assert local.price(dag, pool, spec, train, plan("a")) == pytest.approx(prices["a"])
    assert local.price(dag, pool, spec, train, plan("b")) == pytest.approx(
        prices["b"] + 2 * train.micro_batches * 4 * 0.5
    )


# What workers measured --------------------------------------------------------------------------------------------


def rates(speed: float, **more: Any) -> Device:
    return Device(description="x", flops_per_second=speed, bytes_per_second=speed / 8, **more)


def test_like_machines_have_the_same_rates_up_to_noise() -> None:
    pool = [
        Candidate("a", rates(1.0e11, training_share=0.6, seconds_per_call=2e-5), place="p"),
        Candidate(
            "b",
            rates(
                1.2e11,
                training_share=0.4,
                seconds_per_call=4e-5,
                convolution_flops_per_second=1e11,
                convolution_share=0.5,
                seconds_per_convolution=6e-5,
                seconds_after_rest=1e-3,
            ),
            place="q",
        ),
        Candidate("c", rates(3.0e11), place="q"),
        Candidate("d", rates(1.1e11, threads=2), place="q"),
        Candidate("e", Device(flops_per_second=1.1e11, declared=True), place="q"),
    ]
    a, b, c, d, e = (each.device for each in alike(pool))
    assert a == b
    assert (a.flops_per_second, a.bytes_per_second, a.seconds_per_call) == (1.2e11, 1.5e10, pytest.approx(3e-5))
    assert a.training_share * a.flops_per_second == pytest.approx((0.6e11 + 0.48e11) / 2)
    # `a` did not get to convolutions and rests.
    assert a.seconds_after_rest == 1e-3
    assert (a.convolution_flops_per_second, a.convolution_share, a.seconds_per_convolution) == (1e11, 0.5, 6e-5)
    assert [c, d, e] == [each.device for each in pool[2:]]


def test_workers_of_one_machine_have_the_same_rates_whatever_they_measured() -> None:
    a, b = (each.device for each in alike([Candidate("a", rates(1e11)), Candidate("b", rates(0.3e11))]))
    assert a == b


def test_a_declared_speed_is_that_of_training_and_a_measured_one_that_of_large_products() -> None:
    planner, dag, spec = SchedulerPlanner(), tiny_dag(), job_spec()
    train = training(spec)

    def price(**said: Any) -> float:
        found = planner.price(dag, [Candidate("a", Device(**said))], spec, train, plan("a"))
        assert found is not None
        return found

    declared = price(flops_per_second=2e3, declared=True)
    measured = price(flops_per_second=4e3, training_share=0.5, bytes_per_second=250)
    assert measured == pytest.approx(declared)
    assert price(flops_per_second=4e3, training_share=0.5, bytes_per_second=100) > 1.5 * measured
    assert price(flops_per_second=4e3, training_share=0.5, bytes_per_second=250, seconds_per_call=1.0) > measured + 1


def test_a_plan_with_other_cuts_is_priced_for_a_running_job() -> None:
    spec = job_spec()
    job = job_record(spec)
    job.plan = plan("a")
    alone = [Candidate("a", Device(flops_per_second=1e3))]
    assert anew(scheduler_planner(), lambda _: tiny_dag(), job, alone)
    no_room = [Candidate("a", Device(flops_per_second=1e3, memory_bytes=1))]
    assert anew(scheduler_planner(), lambda _: tiny_dag(), job, no_room) is None


def test_a_summary_says_what_each_pair_of_fragments_exchanges() -> None:
    dag = tiny_dag()
    cuts = tuple(point.position for point in workload(dag).cut_points)[:2]
    for codec, size in (("none", lambda edge: edge.meta.nbytes), ("bf16", lambda edge: edge.meta.nbytes // 2)):
        made = plan("a", "b", "c").model_copy(update={"cuts": cuts})
        edges = cut(dag, cuts).edges
        made = made.model_copy(
            update={"codecs": {edge.index: CodecChoice(forward=codec, backward=codec) for edge in edges}}
        )
        traffic = [summary.traffic for summary in summarize(dag, made)]
        expected = [Counter[int]() for _ in traffic]
        for edge in edges:
            both_ways = size(edge) * (1 + edge.gradient)
            expected[edge.source][edge.target] += both_ways
            expected[edge.target][edge.source] += both_ways
        assert traffic == [dict(each) for each in expected]
        assert set(traffic[1]) == {0, 2}


def test_a_summary_counts_parameters() -> None:
    dag = tiny_dag()
    (summary,) = summarize(dag, plan("a"))
    assert summary.parameters == sum(dag.ops[parameter.op].meta.elements for parameter in dag.parameters)


def on(processor: str, **more: Any) -> Device:
    return Device(flops_per_second=1e3, processor=processor, cores=1, threads=1, **more)


def test_workers_on_the_same_cores_get_their_share_of_them() -> None:
    planner = SchedulerPlanner()
    dag, spec = tiny_dag(), job_spec()
    here = plan("a", "b")

    def seconds(first: Device, second: Device) -> float:
        found = planner.price(dag, [Candidate("a", first), Candidate("b", second)], spec, training(spec), here)
        assert found is not None
        return found

    apart, unknown, together = seconds(on("p"), on("q")), seconds(on(""), on("")), seconds(on("p"), on("p"))
    assert apart == unknown
    assert together > apart
    assert seconds(on("p", kind="cuda"), on("p", kind="cuda")) > apart, "one GPU, two workers"


def test_where_nobody_shares_machines_do_not_tell_workers_apart() -> None:
    devices = SchedulerPlanner()._devices([Candidate("a", on("p")), Candidate("b", on("q")), Candidate("c", on("q"))])
    assert [device.processor.name if device.processor else None for device in devices] == [None, "q", "q"]
    assert devices[1].seconds_per_task > devices[0].seconds_per_task, "caches are cold after others' tasks"
