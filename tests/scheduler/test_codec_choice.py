"""Which edges get which codec."""

from __future__ import annotations

import pytest
from pydantic import ValidationError
from scheduler_cases import transformer, two_cities

from compress.settings import TopK, TopKReused, parse
from dag.cut import cut
from dag.workload import workload
from fusion.errors import PlanError
from fusion.plan import CodecChoice, Plan
from fusion.spec import CompressionSpec
from scheduler import Device, Link, Network, homogeneous, plan_job
from scheduler.compare import codecs_per_link, wire_ratio
from scheduler.compression import choose_codecs, expected_factors
from scheduler.harm import MEASURED, MOST_HARM, ladder

DAG = transformer(6, elements=65536)


def plan(codec: str, ratio: float = 100.0, backward: str | None = None, **settings: object) -> Plan:
    devices, network = two_cities()
    spec = CompressionSpec.model_validate({"codec": codec, "ratio": ratio, "backward": backward})
    return plan_job(DAG, devices, network, micro_batches=8, compression=spec, policy="equal-ops", **settings)  # type: ignore[arg-type]


def test_none_names_no_edge() -> None:
    assert plan("none").codecs == {}


@pytest.mark.parametrize("codec", ["bf16", "int8"])
def test_uniform_codecs_cover_every_floating_activation(codec: str) -> None:
    made = plan(codec)
    edges = cut(DAG, made.cuts).edges
    wanted = {edge.index for edge in edges if edge.kind == "activation" and edge.meta.is_floating}
    assert made.codecs == dict.fromkeys(wanted, CodecChoice(forward=codec, backward=codec))


def test_a_direction_may_have_a_codec_of_its_own() -> None:
    devices, network = two_cities()
    spec = CompressionSpec(codec="int8", backward="int3:stochastic=1", error_feedback=True)
    made = plan_job(DAG, devices, network, micro_batches=8, compression=spec, policy="equal-ops")
    assert set(made.codecs) == set(plan("int8").codecs)
    for choice in made.codecs.values():
        assert (choice.forward, choice.backward) == ("int8", "int3:stochastic=1")
        assert choice.error_feedback


def test_an_option_that_the_codec_does_not_have_is_refused() -> None:
    with pytest.raises(ValidationError, match="codec int8 has no option 'ratio'"):
        CompressionSpec(forward="int8:ratio=3")
    devices, network = two_cities()
    unchecked = CompressionSpec().model_copy(update={"forward": "int8:ratio=3"})
    with pytest.raises(PlanError, match="codec int8 has no option 'ratio'"):
        plan_job(DAG, devices, network, micro_batches=8, compression=unchecked, policy="equal-ops")


def test_uniform_codecs_don_t_depend_on_the_placement() -> None:
    made = plan("int8")
    on_one = plan_job(
        DAG,
        homogeneous("a"),
        micro_batches=8,
        cuts=made.cuts,
        compression=CompressionSpec(codec="int8"),
        policy="equal-ops",
    )
    assert on_one.id == made.id


def test_topk_carries_its_ratio_and_ratio_one_is_dense() -> None:
    assert all(choice.options == {"ratio": 50.0} for choice in plan("topk", 50).codecs.values())
    assert plan("topk", 1).codecs == {}


@pytest.mark.parametrize(
    ("spec", "forward", "backward"),
    [
        ({"codec": "topk", "backward": "topk"}, 10, 10),
        ({"codec": "topk", "forward": "topk", "backward": "topk"}, 10, 10),
        ({"codec": "topk", "forward": "topk:ratio=4", "backward": "topk"}, 4, 10),
        ({"codec": "topk-sampled", "forward": "topk-sampled", "backward": "topk-reused"}, 10, 10),
        ({"codec": "none", "forward": "topk", "backward": "topk:value_bits=8"}, 10, 10),
        ({"codec": "int8", "backward": "topk"}, None, 10),
        ({"codec": "adaint", "forward": "topk", "backward": "int8"}, 10, None),
    ],
)
def test_a_topk_that_is_named_for_a_direction_has_the_ratio_of_the_spec(
    spec: dict[str, str], forward: float | None, backward: float | None
) -> None:
    devices, network = two_cities()
    made = plan_job(
        DAG,
        devices,
        network,
        micro_batches=8,
        compression=CompressionSpec.model_validate({**spec, "ratio": 10}),
        policy="equal-ops",
    )
    assert made.codecs
    for choice in made.codecs.values():
        parsed = [parse(name, choice.options) for name in (choice.forward, choice.backward)]
        assert [each.ratio if isinstance(each, TopK) else None for each in parsed] == [forward, backward]


def test_a_topk_that_is_named_for_both_directions_follows_the_links_with_adatopk() -> None:
    devices, network = two_cities()
    of_the_rule = plan("adatopk", 10).codecs
    named = CompressionSpec(codec="adatopk", ratio=10, forward="topk-sampled", backward="topk")
    made = plan_job(DAG, devices, network, micro_batches=8, compression=named, policy="equal-ops")
    assert {edge: choice.options for edge, choice in made.codecs.items()} == {
        edge: choice.options for edge, choice in of_the_rule.items()
    }
    assert {(choice.forward, choice.backward) for choice in made.codecs.values()} == {("topk-sampled", "topk")}


def test_parameters_of_tied_weights_travel_as_they_are() -> None:
    dag = transformer(4, tied=True)
    devices, network = two_cities()
    made = plan_job(
        dag, devices, network, micro_batches=4, policy="equal-ops", compression=CompressionSpec(codec="int8")
    )
    edges = cut(dag, made.cuts).edges
    assert any(edge.kind == "parameter" for edge in edges)
    assert not any(edges[index].kind == "parameter" for index in made.codecs)


def test_gradients_may_reuse_the_places_of_the_activations() -> None:
    for spec in (
        CompressionSpec(codec="topk", ratio=50, backward="topk-reused"),
        CompressionSpec(forward="topk-sampled:ratio=50", backward="topk-reused:value_bits=8"),
    ):
        devices, network = two_cities()
        made = plan_job(DAG, devices, network, micro_batches=8, compression=spec, policy="equal-ops")
        own = plan("topk", 50, "topk", cuts=made.cuts)
        for index, choice in made.codecs.items():
            found = parse(choice.backward, choice.options)
            assert isinstance(found, TopKReused)
            assert found.ratio == 50.0
            assert own.codecs[index].options == {"ratio": 50.0}
        assert wire_ratio(DAG, made) > 1.1 * wire_ratio(DAG, own)
        without_reuse = CompressionSpec(codec="topk", ratio=50, backward="topk")
        (factors,), (without,) = expected_factors(spec), expected_factors(without_reuse)
        assert factors[1] < without[1]


@pytest.mark.parametrize("codec", ["topk", "topk-sampled", "adatopk"])
def test_gradients_come_back_at_the_places_of_the_activations_unless_told_otherwise(codec: str) -> None:
    choices = plan(codec, 50).codecs.values()
    assert choices
    assert {choice.backward for choice in choices} == {"topk-reused"}
    as_in_the_paper = plan(codec, 50, "topk").codecs.values()
    assert {choice.backward for choice in as_in_the_paper} == {"topk"}


@pytest.mark.parametrize("codec", ["topk", "auto"])
def test_a_rule_s_gradients_have_no_places_where_the_spec_names_another_codec_of_activations(codec: str) -> None:
    devices, _ = two_cities()
    spec = CompressionSpec.model_validate({"codec": codec, "ratio": 50, "forward": "int8"})
    made = plan_job(
        DAG, devices, Network(Link(1e4, 0.0)), micro_batches=8, compression=spec, cuts=(11,), policy="equal-ops"
    )
    (choice,) = made.codecs.values()
    assert (choice.forward, choice.backward) == ("int8", "topk" if codec == "topk" else "int3:stochastic=1")


def test_where_nothing_is_kept_there_is_nothing_to_reuse() -> None:
    """On a link that `adatopk` leaves alone, both directions travel as they are."""
    devices, network = bad_link()
    made = plan_job(
        DAG, devices, network, micro_batches=8, policy="equal-ops", cuts=(11, 21),
        compression=CompressionSpec(codec="adatopk", ratio=20.0, backward="topk-reused"),
    )  # fmt: skip
    links = codecs_per_link(DAG, made)
    assert list(links) == ["b -> c"]
    assert (links["b -> c"]["forward"], links["b -> c"]["backward"]) == ("topk", "topk-reused")


def test_adatopk_compresses_in_proportion_to_the_link_s_time() -> None:
    devices = homogeneous("abc")
    slow, fast = Link(1e6, 0.0), Link(1e8, 0.0)
    network = Network(fast, {("b", "c"): slow, ("c", "b"): slow})
    made = plan_job(
        DAG, devices, network, micro_batches=8, policy="equal-ops", cuts=(11, 21),
        compression=CompressionSpec(codec="adatopk", ratio=20.0),
    )  # fmt: skip
    edges = cut(DAG, made.cuts).edges
    ratios = {edge.source: made.codecs[edge.index].options["ratio"] for edge in edges if edge.index in made.codecs}
    assert ratios == {1: pytest.approx(60.0)}, "3 r on the slowest link; 3 r / 100 < 1 on the fast one means no codec"


def bad_link() -> tuple[tuple[Device, ...], Network]:
    """Three devices in a row; the second link is a hundred times slower than the first."""
    slow, fast = Link(1e6, 0.0), Link(1e8, 0.0)
    return homogeneous("abc"), Network(fast, {("b", "c"): slow, ("c", "b"): slow})


def test_a_link_s_time_is_that_of_all_its_messages_on_its_slower_way() -> None:
    devices, network = bad_link()
    back = Network(network.default, {("b", "a"): Link(1e6, 0.0), ("b", "c"): Link(1e8, 0.0)})
    made = plan_job(
        DAG, devices, back, micro_batches=8, policy="equal-ops", cuts=(11, 21),
        compression=CompressionSpec(codec="adatopk", ratio=20.0, backward="topk"),
    )  # fmt: skip
    links = codecs_per_link(DAG, made)
    assert list(links) == ["a -> b"], "its gradients are what is slow"
    # At 1 value in 60 a value and its place take about 3 bytes and a bit.
    assert links["a -> b"]["nominal_ratio"] == pytest.approx(60.0)
    assert 60 < links["a -> b"]["wire_ratio"] < 80


@pytest.mark.parametrize(
    ("forward", "backward", "asked"),
    [
        ("topk:ratio=5", "topk-reused", 5.0),
        ("topk:ratio=10,value_bits=8", "topk:ratio=3,value_bits=16", 10.0),
        ("int8", "topk:ratio=3", 3.0),
        ("topk", "int8", 100.0),
        ("int8", "int4", None),
    ],
)
def test_the_ratio_that_was_asked_for_is_that_of_the_codec_s_name(
    forward: str, backward: str, asked: float | None
) -> None:
    devices, network = bad_link()
    made = plan_job(
        DAG, devices, network, policy="equal-ops", compression=CompressionSpec(forward=forward, backward=backward)
    )
    assert {link["nominal_ratio"] for link in codecs_per_link(DAG, made).values()} == {asked}


def test_adaint_follows_the_same_rule_in_its_width() -> None:
    devices, network = bad_link()
    found = {}
    for ratio in (2.0, 7.0, 8.0, 300.0):
        made = plan_job(
            DAG, devices, network, micro_batches=8, policy="equal-ops", cuts=(11, 21),
            compression=CompressionSpec(codec="adaint", ratio=ratio),
        )  # fmt: skip
        found[ratio] = {
            link: (codecs["forward"], codecs["backward"]) for link, codecs in codecs_per_link(DAG, made).items()
        }
    assert found[2.0] == {"b -> c": ("int8", "int8")}
    assert found[7.0] == {"b -> c": ("int4", "int3:stochastic=1")}
    assert found[8.0] == {"b -> c": ("int4", "int3:stochastic=1")}
    assert found[300.0] == {"a -> b": ("int8", "int8"), "b -> c": ("int4", "int3:stochastic=1")}


def test_auto_leaves_fast_links_alone_and_takes_the_mildest_codec_that_hides() -> None:
    devices, _ = two_cities()
    spec = CompressionSpec(codec="auto")

    def over(rate: float) -> Plan:
        return plan_job(
            DAG,
            devices[:2],
            Network(Link(rate, 1e-4)),
            micro_batches=8,
            compression=spec,
            policy="equal-ops",
            cuts=(21,),
        )

    assert over(1e10).codecs == {}
    milder, harder = over(5e5), over(1e5)
    assert {choice.forward for choice in milder.codecs.values()} <= {"int8", "int4"}
    assert wire_ratio(DAG, harder) > wire_ratio(DAG, milder) > 1


@pytest.mark.parametrize("rule", ["auto", "adaint"])
def test_the_more_links_need_a_codec_the_milder_it_has_to_be(rule: str) -> None:
    """What each of them costs adds up, and together it has to stay within one percent."""
    fast, slow = Link(1e10, 1e-4), Link(5e4, 1e-4)
    slower = Link(1e4, 1e-4)

    def backward(*pairs: str) -> set[str]:
        # Gradients have the slower way, so that fewer bits for them would help.
        slow_ones = {
            ends: link for pair in pairs for ends, link in (((pair[0], pair[1]), slow), ((pair[1], pair[0]), slower))
        }
        made = plan_job(
            transformer(12, elements=65536), homogeneous("abcdef"), Network(fast, slow_ones), micro_batches=8,
            policy="equal-ops", cuts=(11, 21, 31, 41, 51), compression=CompressionSpec(codec=rule, ratio=300.0),
        )  # fmt: skip
        return {choice.backward for choice in made.codecs.values()}

    assert backward("ab") == {"int3:stochastic=1"}
    assert backward("ab", "bc", "cd") == {"int4:stochastic=1"}
    assert backward("ab", "bc", "cd", "de", "ef") == {"int8"}


def harm_of(made: Plan) -> float:
    known = {(row.forward, row.backward): row.harm for row in MEASURED}
    return sum(known[choice.forward, choice.backward] for choice in made.codecs.values())


def test_harm_counts_by_the_tensors_that_are_compressed() -> None:
    """A boundary within a block, where two tensors cross, bears less than one between blocks."""
    slow = Network(Link(5e5, 1e-4))

    def made(cut: int) -> Plan:
        return plan_job(
            DAG,
            homogeneous("ab"),
            slow,
            micro_batches=8,
            policy="equal-ops",
            compression=CompressionSpec(codec="auto"),
            cuts=(cut,),
        )

    between, within = made(21), made(17)
    assert [len(found.codecs) for found in (between, within)] == [1, 2]
    assert {choice.forward for choice in between.codecs.values()} == {"int4"}
    assert {choice.forward for choice in within.codecs.values()} == {"int8"}
    assert max(harm_of(between), harm_of(within)) <= MOST_HARM


def test_where_harm_adds_up_to_too_much_the_slowest_link_keeps_the_codec_that_it_needs() -> None:
    """The others get milder ones: a step takes as long as its slowest link."""
    rates = {"ab": 2e5, "bc": 1.1e5, "cd": 2e5, "de": 2e5, "ef": 2e5}
    links = {
        ends: Link(rate, 1e-4) for pair, rate in rates.items() for ends in ((pair[0], pair[1]), (pair[1], pair[0]))
    }
    dag = transformer(12, elements=65536)
    made = plan_job(
        dag,
        homogeneous("abcdef"),
        Network(Link(1e10, 1e-4), links),
        micro_batches=8,
        policy="equal-ops",
        compression=CompressionSpec(codec="auto"),
        cuts=(11, 21, 31, 41, 51),
    )
    forward = {link: codecs["forward"] for link, codecs in codecs_per_link(dag, made).items()}
    assert forward == {"a -> b": "int8", "b -> c": "int4", "c -> d": "int8", "d -> e": "int8", "e -> f": "int8"}
    assert harm_of(made) <= MOST_HARM


def test_auto_does_not_burden_an_encoder_more_than_the_link_that_it_relieves() -> None:
    devices = tuple(Device(name, flops_per_second=1e15, seconds_per_call=1e-9) for name in "ab")
    made = plan_job(
        DAG,
        devices,
        Network(Link(1e10, 0.0)),
        micro_batches=8,
        policy="equal-ops",
        compression=CompressionSpec(codec="auto"),
    )
    assert len(set(made.placement)) == 2
    assert made.codecs == {}, "nothing hides behind so little compute, and any codec takes longer than the link"


def test_the_ladder_of_harm_is_ordered_and_known_to_the_codecs() -> None:
    assert [row.harm for row in MEASURED] == sorted(row.harm for row in MEASURED)
    assert MEASURED[0].harm == 0
    assert [(row.forward, row.backward) for row in ladder(MOST_HARM)] == [
        ("none", "none"),
        ("int8", "int8"),
        ("int8", "int4:stochastic=1"),
        ("int4", "int3:stochastic=1"),
    ]
    for row in MEASURED:
        assert parse(row.forward, dict(row.options)).expected_payload_bytes((64,), "float32") > 0
        assert parse(row.backward, dict(row.options)).expected_payload_bytes((64,), "float32") > 0


@pytest.mark.parametrize(("placement", "expected"), [("aaab", "none"), ("abab", "int8")])
def test_what_goes_the_same_way_over_a_link_counts_together(placement: str, expected: str) -> None:
    """A pipeline that comes back sends activations and other fragments' gradients over one wire."""
    work = workload(DAG)
    found = choose_codecs(
        CompressionSpec(codec="auto"),
        work,
        work.crossings((11, 21, 31)),
        tuple(placement),
        Network(Link(1e6, 0.0)),
        # A tensor takes 0.26 s, another one would be too much.
        busy_seconds=0.3,
    )
    assert [found.get(edge, CodecChoice()).forward for edge in range(3)] == [expected] * 3
