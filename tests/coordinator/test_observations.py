"""What pages draw: curves of bounded size that lose no spike, timelines by one clock, traffic, crossings, the map."""

from __future__ import annotations

import math

import pytest
from coordinator_cases import FakeWorker, Server, tiny_dag
from hypothesis import given
from hypothesis import strategies as st

from coordinator.shown.crossings import crossings
from coordinator.shown.curves import Curves
from coordinator.shown.pool_map import pool_map
from coordinator.shown.timelines import Timelines
from coordinator.shown.traffic import Traffic
from coordinator.shown.views import ShownPlan
from dag.cut import cut, cut_points
from fusion.messages import FragmentTimes, StepReport, StepTrace
from fusion.plan import CodecChoice, Plan
from fusion.topology import Topology


def metric(step: int, loss: float | None, epoch: int = 0, seconds: float = 1.0) -> dict[str, object]:
    return {"step": step, "loss": loss, "epoch": epoch, "step_seconds": seconds, "sent_bytes": 10}


@given(st.lists(st.none() | st.floats(-1e6, 1e6), max_size=200), st.integers(2, 16))
def test_curves_are_bounded_and_keep_extremes_and_means(losses: list[float | None], most: int) -> None:
    curves = Curves(most)
    for step, loss in enumerate(losses, 1):
        curves.add(metric(step, loss))
    shown = curves.shown()
    assert len(shown["first_step"]) <= most
    known = [loss for loss in losses if loss is not None]
    assert min((low for low in shown["values"]["loss"]["low"] if low is not None), default=None) == min(
        known, default=None
    )
    assert max((high for high in shown["values"]["loss"]["high"] if high is not None), default=None) == max(
        known, default=None
    )
    for first, last, mean in zip(shown["first_step"], shown["last_step"], shown["values"]["loss"]["mean"], strict=True):
        own = [loss for loss in losses[first - 1 : last] if loss is not None]
        assert (mean is None) == (not own)
        assert mean is None or math.isclose(mean, sum(own) / len(own), rel_tol=1e-9, abs_tol=1e-3)
    covered = [
        step
        for first, last in zip(shown["first_step"], shown["last_step"], strict=True)
        for step in range(first, last + 1)
    ]
    assert covered == list(range(1, len(losses) + 1))


def test_curves_do_not_depend_on_when_they_were_asked_for_and_take_no_step_twice() -> None:
    early, late = Curves(8), Curves(8)
    for step in range(1, 100):
        early.add(metric(step, step / 7))
        early.shown()
        early.add(metric(step, -1.0))
    for step in range(1, 100):
        late.add(metric(step, step / 7))
    assert early.shown() == late.shown()


def test_curves_tell_how_fast_each_epoch_was() -> None:
    curves = Curves()
    for step in range(1, 11):
        curves.add(metric(step, 1.0, epoch=step > 4, seconds=1.0 if step <= 4 else 0.5))
    assert curves.shown()["stretches"] == [
        {"epoch": False, "first_step": 1, "steps": 4, "mean_step_seconds": 1.0},
        {"epoch": True, "first_step": 5, "steps": 6, "mean_step_seconds": 0.5},
    ]


def report(step: int, fragment: int, trace: StepTrace | None = None, epoch: int = 0) -> StepReport:
    times = FragmentTimes(fragment=fragment, forward=0.2, backward=0.3, update=0.1)
    return StepReport(job="j", epoch=epoch, step=step, fragments=[times], trace=trace)


def traced(step: int, clock: float, at: float) -> tuple[StepReport, StepReport]:
    """Worker a makes something in a second, and b, whose clock is `clock` seconds ahead, has it half a second later."""
    first = StepTrace(begun=at, told=3.0, tasks=[("forward", 0, 0, 0.0, 1.0)])
    second = StepTrace(
        begun=at + 1.5 + clock,
        told=1.5,
        tasks=[("forward", 1, 0, 0.0, 1.0)],
        arrivals=[("activation", 0, 0, 0.0, "a")],
    )
    return report(step, 0, first), report(step, 1, second)


@pytest.mark.parametrize("clock", [0.0, 7200.0, -0.4])
def test_a_timeline_sets_clocks_against_each_other(clock: float) -> None:
    timelines = Timelines()
    for step in (1, 2):
        first, second = traced(step, clock, at=100.0 + 3 * step)
        timelines.note("b", second, now=103.0 + 3 * step)
        timelines.note("a", first, now=103.0 + 3 * step)
    shown = timelines.shown("j", fragments=2)
    assert [step["step"] for step in shown["steps"]] == [1, 2]
    assert shown["workers"] == ["a", "b"]
    of_first = [span for span in shown["spans"] if span["step"] == 1]
    times = {(span["worker"], span["kind"]): (span["begin"], span["end"]) for span in of_first}
    assert times["a", "forward"] == pytest.approx((0.0, 1.0))
    assert times["b", "activation"] == pytest.approx((1.0, 1.5))
    assert times["b", "forward"] == pytest.approx((1.5, 2.5))
    assert shown["bubble"] == pytest.approx(1 - 0.6 / 3)
    [share] = [share for share in shown["shares"] if share["worker"] == "a"]
    assert share == pytest.approx(
        {"worker": "a", "forward": 0.2, "backward": 0.3, "update": 0.1, "idle": 2.4, "step_seconds": 3.0}
    )


def test_a_timeline_shows_whole_steps_only_and_no_nonsense() -> None:
    timelines = Timelines()
    first, second = traced(1, 0.0, at=100.0)
    timelines.note("a", first, now=103.0)
    assert timelines.shown("j", fragments=2)["spans"] == []
    backwards = StepTrace(begun=1.0, told=0.0, tasks=[("forward", 1, 0, 1.0, 0.0)])
    timelines.note("b", second.model_copy(update={"trace": backwards}), now=103.0)
    assert timelines.shown("j", fragments=2)["spans"] == []
    timelines.note("b", second, now=103.0)
    assert len(timelines.shown("j", fragments=2)["spans"]) == 3
    assert timelines.shown("unheard of", fragments=2)["steps"] == []


def test_traffic_is_a_rate_that_fades_and_a_median_per_step() -> None:
    traffic = Traffic()
    for second in range(60):
        traffic.note("a", {"b": 1000, "a": 5, "c": 0}, now=float(second))
    [(sender, receiver, rate)] = traffic.rates(59.0)
    assert (sender, receiver) == ("a", "b")
    assert rate == pytest.approx(1000, rel=0.15)
    traffic.note("a", {"b": 10**9}, now=59.0)
    assert traffic.bytes_per_step("a", "b") == 1000
    assert next(traffic.rates(89.0))[2] < 1e6
    traffic.forget_quiet(100.0)
    assert list(traffic.rates(100.0)) == []


def test_crossings_count_every_micro_batch_and_what_the_codec_makes_of_it() -> None:
    dag = tiny_dag()
    position = cut_points(dag)[1].position
    edge = next(edge for edge in cut(dag, (position,)).edges if edge.kind == "activation")
    codecs = {edge.index: CodecChoice(forward="bf16", backward="none")}
    plan = Plan(policy="p", cuts=(position,), placement=("a", "b"), in_flight=(1, 1), codecs=codecs)
    there, back = sorted(crossings(dag, plan, micro_batches=3), key=lambda link: str(link["from"]))
    assert (there["from"], there["to"], there["codecs"]) == ("a", "b", ["bf16"])
    assert there["plain_bytes"] == 3 * 4 * 2 * 4
    assert there["wire_bytes"] == there["plain_bytes"] // 2
    assert (back["codecs"], back["wire_bytes"]) == (["none"], back["plain_bytes"])
    together = plan.model_copy(update={"placement": ("a", "a")})
    assert crossings(dag, together, micro_batches=3) == []


def test_the_map_has_a_topologys_regions_and_the_links_between_them() -> None:
    topology = Topology.model_validate(
        {
            "workers": [
                {"name": name, "region": name[:4], "speed": 1e9, "memory": "1GiB"}
                for name in ("oslo1", "oslo2", "lima1")
            ],
            "links": [
                {"between": ["oslo", "oslo"], "bandwidth": "1Gbit/s", "latency": "1ms"},
                {"between": ["oslo", "lima"], "bandwidth": "16Mbit/s", "latency": "90ms"},
            ],
        }
    )
    shown = pool_map(["oslo1", "lima1", "oslo2", "new"], topology, {})
    assert {group["name"]: group["workers"] for group in shown["groups"]} == {
        "oslo": ["oslo1", "oslo2"],
        "lima": ["lima1"],
        "elsewhere": ["new"],
    }
    assert {(each["from"], each["to"]): each["bytes_per_second"] for each in shown["between"]} == {
        ("oslo", "oslo"): 125e6,
        ("oslo", "lima"): 2e6,
        ("lima", "oslo"): 2e6,
    }


def test_the_map_finds_fences_in_what_was_measured() -> None:
    names = ["a1", "a2", "b1", "b2"]
    links = {
        (first, second): (0.0, 1e9 if first[0] == second[0] else 1e5, "probe")
        for first in names
        for second in names
        if first != second
    }
    assert [group["workers"] for group in pool_map(names, None, links)["groups"]] == [["a1", "a2"], ["b1", "b2"]]
    drawn = pool_map(names, None, links, {("a2", "b1"): "the coordinator", ("b1", "gone"): "the coordinator"})
    assert drawn["relayed"] == [{"from": "a2", "to": "b1", "relay": "the coordinator"}]
    over = {(each["from"], each["to"]): each["relay"] for each in drawn["between"]}
    assert over["fence 1", "fence 2"] == over["fence 2", "fence 1"] == "the coordinator"
    assert over["fence 1", "fence 1"] is over["fence 2", "fence 2"] is None
    assert pool_map([], None, {}) == {"groups": [], "between": [], "relayed": []}
    assert [group["kind"] for group in pool_map(names, None, {})["groups"]] == ["pool"]


async def test_what_is_asked_for_after_a_run_is_what_was_recorded(server: Server) -> None:
    async with FakeWorker(server, "a"):
        job = await server.submit(train={"steps": 6})
        await server.until_state(job["id"], "done")
        home = f"/api/v1/jobs/{job['id']}"
        _, recorded = await server.call("GET", f"{home}/metrics")
        _, curves = await server.call("GET", f"{home}/curves")
        assert curves["values"]["loss"]["mean"] == [each["loss"] for each in recorded["metrics"]]
        _, plans = await server.call("GET", f"{home}/plans")
        assert [(each["plan"]["epoch"], each["steps"]) for each in plans["plans"]] == [(0, 6)]
        planned = next(
            event for event in (await server.call("GET", f"{home}/events"))[1]["events"] if event["event"] == "planned"
        )
        shown = (await server.job(job["id"]))["plan"]
        assert shown == plans["plans"][0]["plan"]
        assert shown["id"] == planned["plan"] == ShownPlan.model_validate(shown).id
        _, all_events = await server.call("GET", f"{home}/events")
        messages = {event["event"]: event["message"] for event in all_events["events"]}
        assert messages["started"] == "training starts on 1 worker (1 fragment)"
        _, newest = await server.call("GET", f"{home}/events?newest=2")
        assert newest["events"] == all_events["events"][-2:]
        status, page = await server.call("GET", f"{home}/diagram")
        assert status == 200
        assert b'"workers":["a"]' in page
