"""The comparison of policies and codecs, and its drawings."""

from __future__ import annotations

import json
import sys

import pytest
from scheduler_cases import transformer

from fusion.errors import PlanError
from fusion.spec import CompressionSpec
from fusion.topology import Topology
from scheduler import Link, Training, chrome_trace, compare, from_topology, homogeneous, html, plan_job, simulate_plan
from scheduler.compare import codec_name
from scheduler.policies.fences import transfer_seconds
from scheduler.taking_part import plan_for

TOPOLOGY = Topology.model_validate(
    {
        "workers": [
            {"name": f"{city}-{number}", "region": city, "speed": 1e10, "memory": "1GiB"}
            for number in (1, 2)
            for city in ("oslo", "lima")
        ],
        "links": [
            {"between": ["oslo", "oslo"], "bandwidth": "1Gbit/s", "latency": "1ms"},
            {"between": ["lima", "lima"], "bandwidth": "1Gbit/s", "latency": "1ms"},
            {"between": ["oslo", "lima"], "bandwidth": "8Mbit/s", "latency": "20ms"},
            {"between": ["oslo-1", "lima-1"], "bandwidth": "80Mbit/s", "latency": "10ms"},
        ],
    }
)
DAG = transformer(4, elements=16384)


def test_links_of_a_topology_by_worker_win_over_regions() -> None:
    devices, network = from_topology(TOPOLOGY)
    assert [device.name for device in devices] == ["oslo-1", "lima-1", "oslo-2", "lima-2"]
    for first in devices:
        for second in devices:
            link = network.link(first.name, second.name)
            assert (link.bytes_per_second, link.seconds) == TOPOLOGY.link(first.name, second.name)


def test_transfer_times_of_all_pairs_are_those_of_their_links() -> None:
    workers = [worker.model_dump() for worker in TOPOLOGY.workers]
    workers[0]["access"] = 5e5
    workers += [{"name": "rome-1", "region": "rome", "speed": 1e10, "memory": 2**30, "access": 1e6}]
    links = [link.model_dump() for link in TOPOLOGY.links]
    links += [{"between": ["rome", city], "bandwidth": "50Mbit/s", "latency": "15ms"} for city in ("oslo", "lima")]
    devices, network = from_topology(Topology.model_validate({"workers": workers, "links": links}))
    found = transfer_seconds(devices, network, 1e6)
    for row, first in enumerate(devices):
        for column, second in enumerate(devices):
            ways = ((first.name, second.name), (second.name, first.name))
            expected = sum(network.link(*way).transfer(1e6) for way in ways) if first != second else 0.0
            assert found[row, column] == pytest.approx(expected)
    assert len(set(found.round(9).flat)) > 5


def test_access_counts_on_a_link_of_regions_that_have_a_worker_of_their_name() -> None:
    workers = [
        {"name": "oslo", "region": "oslo", "speed": 1, "memory": "1GiB", "access": "1Mbit/s"},
        {"name": "lima", "region": "lima", "speed": 1, "memory": "1GiB"},
        {"name": "rome", "region": "lima", "speed": 1, "memory": "1GiB"},
    ]
    links = [
        {"between": ["oslo", "lima"], "bandwidth": "16Mbit/s", "latency": "90ms"},
        {"between": ["lima", "lima"], "bandwidth": "1Gbit/s", "latency": "1ms"},
        {"between": ["rome", "oslo"], "bandwidth": "8Mbit/s", "latency": "80ms"},
    ]
    topology = Topology.model_validate({"workers": workers, "links": links})
    devices, network = from_topology(topology)
    assert network.link("oslo", "lima") == network.link("lima", "oslo") == Link(125e3, 0.09)
    assert network.link("oslo", "rome") == Link(1e6, 0.08)
    found = transfer_seconds(devices, network, 1e6)
    for row, first in enumerate(devices):
        for column, second in enumerate(devices):
            link = network.link(first.name, second.name)
            assert (link.bytes_per_second, link.seconds) == topology.link(first.name, second.name)
            assert found[row, column] == pytest.approx(0 if first is second else 2 * link.transfer(1e6))


@pytest.mark.filterwarnings("error")
@pytest.mark.parametrize("other_speed", ["1e-6", "1e24"])
@pytest.mark.parametrize("speed", ["1e-6", "1e24"])
@pytest.mark.parametrize(
    ("rate", "latency", "memory_bandwidth"),
    [("1bit/s", "0s", "1bit/s"), ("1bit/s", "1h", "1000000GB/s"), ("1000000GB/s", "0s", None)],
)
def test_plans_at_the_bounds_of_a_topology_are_counted(
    speed: str, other_speed: str, rate: str, latency: str, memory_bandwidth: str | None
) -> None:
    rest = {"memory": "1000TiB", "memory_bandwidth": memory_bandwidth}
    workers = [
        {"name": "a", "region": "a", "speed": speed, **rest},
        {"name": "b", "region": "b", "speed": other_speed, "count": 2, **rest},
    ]
    links = [
        {"between": ["a", "b"], "bandwidth": rate, "latency": latency},
        {"between": ["b", "b"], "bandwidth": "1Mbit/s", "latency": "1ms"},
    ]
    topology = Topology.model_validate({"workers": workers, "links": links})
    for row in compare(DAG, topology, Training(micro_batches=2)):
        assert row["reason"] is None
        assert 0 < row["step_seconds"] < float("inf")


def test_speed_up_is_over_the_faster_plain_baseline() -> None:
    rows = compare(
        DAG, TOPOLOGY, Training(micro_batches=4), policies=("op-fence", "equal-ops"), codecs=("none", "int8")
    )
    seconds = {(row["policy"], row["codec"]): row["step_seconds"] for row in rows}
    for row in rows:
        assert row["speedup"] == pytest.approx(seconds["equal-ops", "none"] / row["step_seconds"])
    assert [row["speedup"] for row in compare(DAG, TOPOLOGY, policies=("op-fence",), codecs=("none",))] == [None]


def test_of_a_long_pipeline_one_step_is_played(monkeypatch: pytest.MonkeyPatch) -> None:
    # The package gives the module's name to the function.
    monkeypatch.setattr(sys.modules["scheduler.compare"], "MOST_PLAYED", 8)
    four, eight = (
        compare(DAG, TOPOLOGY, Training(micro_batches=count, fragments=2), policies=("equal-ops",), codecs=("none",))[0]
        for count in (4, 8)
    )
    assert (four["simulated_steps"], eight["simulated_steps"]) == (3, 1)
    assert eight["step_seconds"] > four["step_seconds"]


def test_every_policy_and_codec_has_a_row_that_is_plain_json() -> None:
    rows = compare(DAG, TOPOLOGY, Training(micro_batches=4, clip=True), codecs=("none", "int8"))
    assert [(row["policy"], row["codec"]) for row in rows] == [
        (policy, codec) for policy in ("op-fence", "equal-ops", "equal-compute", "random") for codec in ("none", "int8")
    ]
    assert json.loads(json.dumps(rows)) == rows
    for row in rows:
        assert row["reason"] is None
        assert row["step_seconds"] > 0
        assert 0 <= row["bubble"] < 1
        assert set(row["memory_per_worker"]) == set(row["placement"])
        assert row["wire_ratio"] >= 1
    dense = {row["policy"]: row["step_seconds"] for row in rows if row["codec"] == "none"}
    assert dense["op-fence"] <= 1.01 * min(dense.values())


def test_a_job_s_own_codecs_have_a_row_for_each_policy_where_no_other_row_is_theirs() -> None:
    own = CompressionSpec(codec="int8", forward="int4", backward="int3:stochastic=1", error_feedback=True)
    policies = ("op-fence", "equal-ops")
    rows = compare(DAG, TOPOLOGY, Training(micro_batches=4), policies=policies, codecs=("none", "int8"), own=own)
    names = ["none", "int8", "int4/int3:stochastic=1"]
    assert [(row["policy"], row["codec"]) for row in rows] == [(policy, name) for policy in policies for name in names]
    used = {
        (each["forward"], each["backward"])
        for row in rows
        if row["codec"] == names[-1]
        for each in row["codecs_per_link"].values()
    }
    assert used == {("int4", "int3:stochastic=1")}
    plain = CompressionSpec(codec="int8", error_feedback=True)
    assert len(compare(DAG, TOPOLOGY, policies=policies, codecs=("none", "int8"), own=plain)) == 4
    assert codec_name(CompressionSpec(codec="int3")) == "int3"
    assert codec_name(CompressionSpec(codec="auto", backward="bf16")) == "auto/bf16"


def test_all_rows_use_as_many_workers_as_asked_for_and_the_same_ones() -> None:
    rows = compare(DAG, TOPOLOGY, Training(micro_batches=4, workers=2), codecs=("none",))
    assert {frozenset(row["placement"]) for row in rows} == {frozenset({"oslo-1", "oslo-2"})}


def test_what_does_not_fit_has_a_reason() -> None:
    small = TOPOLOGY.model_copy(
        update={"workers": tuple(worker.model_copy(update={"memory": 1000}) for worker in TOPOLOGY.workers)}
    )
    (row,) = compare(DAG, small, policies=("op-fence",), codecs=("none",))
    assert row["step_seconds"] is None
    assert "missing" in row["reason"]


def test_a_plan_for_other_workers_is_refused() -> None:
    plan = plan_job(DAG, homogeneous("ab"), micro_batches=2, use_all=True)
    with pytest.raises(PlanError, match="names worker a"):
        simulate_plan(DAG, plan, homogeneous("xy"))


@pytest.mark.parametrize("clip", [False, True])
@pytest.mark.parametrize("policy", ["op-fence", "equal-compute"])
def test_the_prediction_of_a_plan_is_its_simulation(policy: str, clip: bool) -> None:
    devices, network = from_topology(TOPOLOGY)
    training = Training(micro_batches=4, clip=clip)
    plan = plan_for(DAG, devices, network, training, policy, CompressionSpec())
    simulation = simulate_plan(DAG, plan, devices, network, training)
    assert plan.predicted_step_seconds == pytest.approx(simulation.step_seconds, rel=1e-6)


def test_drawings_hold_every_span_and_load_nothing() -> None:
    devices, network = from_topology(TOPOLOGY)
    plan = plan_job(DAG, devices, network, micro_batches=4, use_all=True)
    simulation = simulate_plan(DAG, plan, devices, network, Training(micro_batches=4))
    events = json.loads(chrome_trace(simulation))["traceEvents"]
    assert sum(event["ph"] == "X" for event in events) == len(simulation.spans)
    assert all(event["dur"] >= 0 for event in events if event["ph"] == "X")
    page = html(simulation, "a <title> </script>")
    data = json.loads(page.split('id="data">')[1].split("</script>")[0])
    assert len(data["spans"]) == len(simulation.spans)
    assert set(data["rows"][: data["workers"]]) == set(simulation.busy_per_worker)
    assert data["ends"][-1] <= data["end"]
    assert "a &lt;title&gt; &lt;/script&gt;" in page
    assert "http" not in page
