"""Which pair measures its link when, what is known of links, and what plans and running jobs make of it."""

from __future__ import annotations

import asyncio
from collections import Counter
from collections.abc import Iterable
from dataclasses import replace

import pytest
from coordinator_cases import job_spec, tiny_dag, training
from recovery_cases import Play

from coordinator.life import events as ev
from coordinator.life import links as module
from coordinator.life.links import Changed, Failed, Links
from coordinator.life.pool import Member
from coordinator.plans.candidates import candidates
from coordinator.plans.link_estimates import network_of, reachable
from coordinator.plans.planning import Candidate
from coordinator.plans.scheduling import SchedulerPlanner
from fusion.addresses import place_of
from fusion.messages import (
    ArrivalRate,
    Arrivals,
    Device,
    ExpectProbe,
    LinkFigures,
    LinkMeasured,
    ProbeLink,
)
from fusion.topology import Topology
from scheduler.devices import LOOPBACK, Network

FAST, SLOW = LinkFigures(seconds=0.001, bytes_per_second=1e8), LinkFigures(seconds=0.03, bytes_per_second=1e6)


def member(name: str, place: int = 0, **changes: object) -> Member:
    found = Member(
        name=name,
        incarnation=f"i-{name}",
        device=Device(),
        endpoint=f"tcp://10.0.{place}.1:7",
        public_key="k" * 40,
        probes=True,
        state="idle",
    )
    return found.model_copy(update=changes)


def done(links: Links, now: float, pairs: Iterable[tuple[Member, Member]], figures: LinkFigures = FAST) -> None:
    for asks, answers in pairs:
        links.measured(now, asks.name, LinkMeasured(peer=answers.name, there=figures, back=figures))


# The schedule -----------------------------------------------------------------------------------------------------


def play_schedule(links: Links, pool: list[Member], seconds: float, begin: float = 10.0) -> Counter[frozenset[str]]:
    """Each probe takes a second; returns how often each pair was measured, and checks that no worker is in two at once."""
    probed: Counter[frozenset[str]] = Counter()
    now, under_way = begin, list[tuple[float, tuple[Member, Member]]]()
    while now < begin + seconds:
        done(links, now, [pair for until, pair in under_way if until <= now])
        under_way = [each for each in under_way if each[0] > now]
        under_way += [(now + 1.0, pair) for pair in links.due(now, pool)]
        names = [end.name for _, pair in under_way for end in pair]
        assert len(names) == len(set(names))
        assert len(under_way) <= module.MOST_AT_ONCE
        probed.update(frozenset(end.name for end in pair) for until, pair in under_way if until == now + 1.0)
        now += 0.5
    return probed


def test_in_a_small_pool_every_pair_is_measured_once() -> None:
    pool = [member(f"w{index}") for index in range(8)]
    probed = play_schedule(Links(), pool, 60)
    assert len(probed) == 28
    assert set(probed.values()) == {1}


def test_in_a_large_pool_each_worker_measures_a_few_links() -> None:
    pool = [member(f"w{index}", index // 20) for index in range(100)]
    probed = play_schedule(Links(), pool, 150)
    per_worker = Counter(name for pair in probed for name in pair)
    assert set(per_worker) == {each.name for each in pool}
    assert max(per_worker.values()) <= module.MOST_PEERS
    assert set(probed.values()) == {1}
    place = {each.name: place_of(each.endpoint) for each in pool}
    across = [pair for pair in probed if len({place[name] for name in pair}) == 2]
    assert 0.2 < len(across) / len(probed) < 0.9
    assert {place[name] for pair in across for name in pair} == set(place.values())


def test_links_to_those_that_are_gone_keep_nobody_from_measuring_others() -> None:
    links = Links()
    for generation in range(4):
        # In every other place there is another process now, under another name.
        pool = [member(f"w{index}" if index % 2 else f"v{generation}-{index}") for index in range(20)]
        probed = play_schedule(links, pool, 60, begin=10.0 + 100.0 * generation)
        assert {name for pair in probed for name in pair} == {each.name for each in pool}


def test_of_links_to_those_that_are_gone_nothing_is_kept() -> None:
    play = Play("ab")
    links = play.lifecycle.links
    for number in range(20):
        play.join(f"c{number}")
        for ends in (("a", f"c{number}"), ("b", f"c{number}")):
            links._under_way[ends] = play.now + 1.0
            links.measured(play.now, ends[0], LinkMeasured(peer=ends[1], there=SLOW, back=SLOW))
        play.vanish(f"c{number}")
    links._under_way["a", "b"] = play.now + 1.0
    links.measured(play.now, "a", LinkMeasured(peer="b", there=SLOW, back=SLOW))
    play.join("d")
    for table in (links._known, links._relied_on, links._trials):
        assert {name for pair in table for name in pair} == {"a", "b"}


def test_who_has_just_joined_or_can_not_probe_is_left_alone() -> None:
    links, pool = (
        Links(),
        [member("a"), member("b", joined_at=9.5), member("c", probes=False), member("d", state="lost")],
    )
    assert links.due(10.0, pool) == []
    assert [(first.name, second.name) for first, second in links.due(10.5, pool)] == [("a", "b")]


def test_a_plan_that_waits_comes_first_and_does_not_wait_for_who_is_alone() -> None:
    links, pool = Links(), [member(name, joined_at=9.9) for name in "ab"]
    assert not links.awaited([member("a", probes=False), member("b")])
    assert not links.awaited([member(name, endpoint="tcp://127.0.0.1:7") for name in "ab"])
    assert links.awaited(pool)
    links.hurry("ab")
    busy = [each.model_copy(update={"state": "busy"}) for each in pool]
    found = links.due(10.0, busy)
    assert len(found) == 1
    assert links.awaited(pool)
    done(links, 10.2, found)
    assert not links.awaited(pool)


def test_who_works_together_is_not_probed_unless_a_plan_waits() -> None:
    links, pool = Links(), [member("a", state="busy"), member("b", state="busy")]
    assert links.due(20.0, pool) == []
    links.hurry("ab")
    links.relax("ab")
    assert links.due(21.0, pool) == []
    assert len(links.due(22.0, [*pool, member("c")])) == 1


def test_links_are_measured_again_when_they_are_old_and_nobody_works() -> None:
    links, pool = Links(), [member("a"), member("b")]
    done(links, 10.0, links.due(10.0, pool))
    later = 10.0 + module.FRESH
    assert links.due(later - 1, pool) == []
    assert links.due(later, [member("a"), member("b", state="busy")]) == []
    assert len(links.due(later + 1, pool)) == 1


# What is known ----------------------------------------------------------------------------------------------------


def test_a_probe_gives_both_directions() -> None:
    links, pool = Links(), [member("a"), member("b")]
    links.due(10.0, pool)
    links.measured(11.0, "a", LinkMeasured(peer="b", there=FAST, back=SLOW))
    assert links.between("ab") == {("a", "b"): FAST, ("b", "a"): SLOW}
    rows = {ends: (known.source, known.at) for ends, known in links.matrix("abc", 12.0)}
    assert rows == {("a", "b"): ("probe", 11.0), ("b", "a"): ("probe", 11.0)}
    # Not asked for, or said twice.
    links.measured(12.0, "a", LinkMeasured(peer="c", there=FAST, back=FAST))
    links.measured(12.0, "a", LinkMeasured(peer="b", there=SLOW, back=SLOW))
    assert links.between("abc") == {("a", "b"): FAST, ("b", "a"): SLOW}
    links.forget("b")
    assert links.between("ab") == {}


def test_a_link_that_fails_is_shown_and_tried_again_and_given_up_when_it_fails_again() -> None:
    links, pool = Links(), [member("a"), member("b")]
    links.due(10.0, pool)
    links.measured(11.0, "a", LinkMeasured(peer="b", error="no answer"))
    assert [known.error for _, known in links.matrix("ab", 11.0)] == ["no answer"] * 2
    assert links.between("ab") == {}
    assert links.news() == []
    assert links.due(12.0, pool) == []
    assert len(links.due(14.0, pool)) == 1
    # This time nobody says anything.
    assert links.due(40.0, pool) == []
    assert set(links.between("ab")) == {("a", "b"), ("b", "a")}
    (failed,) = links.news()
    assert isinstance(failed, Failed)
    assert "nothing was heard" in failed.words
    done(links, 61.0, links.due(60.0, pool))
    assert links.between("ab") == {("a", "b"): FAST, ("b", "a"): FAST}
    assert all(known.error == "" for _, known in links.matrix("ab", 61.0))


def rate(bytes_per_second: float, at_least: bool = False) -> ArrivalRate:
    return ArrivalRate(bytes_per_second=bytes_per_second, at_least=at_least)


def test_transfers_keep_the_bandwidth_fresh() -> None:
    links, pool = Links(), [member("a"), member("b")]
    done(links, 10.0, links.due(10.0, pool), SLOW)
    links.news()
    links.arrived(20.0, "b", Arrivals(rates={"a": rate(1.5e6), "x": rate(1.0)}), {"a"})
    ((ends, known), _) = links.matrix("ab", 21.0)
    assert (ends, known.source, known.at) == (("a", "b"), "transfers", 20.0)
    assert (known.seconds, known.bytes_per_second) == (0.03, 1.5e6)
    assert links.news() == []
    # A lower bound raises, and never lowers.
    links.arrived(21.0, "b", Arrivals(rates={"a": rate(1e6, at_least=True)}), {"a"})
    assert links.between("ab")["a", "b"] == LinkFigures(seconds=0.03, bytes_per_second=1.5e6)
    links.arrived(22.0, "b", Arrivals(rates={"a": rate(1.8e6, at_least=True)}), {"a"})
    assert links.between("ab")["a", "b"] == LinkFigures(seconds=0.03, bytes_per_second=1.8e6)
    # By how much, the two find out as soon as they are idle.
    assert len(links.due(23.0, pool)) == 1


def test_a_lower_bound_says_nothing_of_a_link_that_nobody_has_measured() -> None:
    links = Links()
    links.arrived(20.0, "b", Arrivals(rates={"a": rate(1e7, at_least=True)}), {"a"})
    assert links.between("ab") == {}
    assert links.news() == []
    links.arrived(21.0, "b", Arrivals(rates={"a": rate(2 * module.ASSUMED, at_least=True)}), {"a"})
    assert links.between("ab")["a", "b"].bytes_per_second == 2 * module.ASSUMED


def test_a_link_that_works_again_in_a_job_is_not_failed_any_more() -> None:
    links, pool = Links(), [member("a"), member("b")]
    links.due(10.0, pool)
    links.measured(11.0, "a", LinkMeasured(peer="b", error="no answer"))
    links.arrived(12.0, "b", Arrivals(rates={"a": rate(1e6)}), {"a"})
    assert [known.error for ends, known in links.matrix("ab", 12.0) if ends == ("a", "b")] == [""]


def test_a_change_by_two_times_is_news_once_and_a_smaller_one_is_not() -> None:
    links, pool = Links(), [member("a"), member("b")]
    done(links, 10.0, links.due(10.0, pool), LinkFigures(seconds=0.0, bytes_per_second=1e7))
    links.news()
    for found in (0.6e7, 1.9e7):
        links.arrived(20.0, "b", Arrivals(rates={"a": rate(found)}), {"a"})
        assert links.news() == []
    links.arrived(20.0, "b", Arrivals(rates={"a": rate(4e6)}), {"a"})
    assert links.news() == [Changed("a", "b", 1e7, 4e6)]
    links.arrived(21.0, "b", Arrivals(rates={"a": rate(4.1e6)}), {"a"})
    assert links.news() == []
    assert "carries 32 Mbit/s, 2.5 times less than was known" in Changed("a", "b", 1e7, 4e6).words
    assert links.between("ab")["a", "b"] == LinkFigures(seconds=0.0, bytes_per_second=4.1e6)


def test_a_first_figure_is_not_compared_with_what_nobody_had_measured() -> None:
    links, pool = Links(), [member("a"), member("b")]
    links.arrived(20.0, "b", Arrivals(rates={"a": rate(1e6)}), {"a"})
    (first,) = links.news()
    assert first.words == "the link a -> b has been measured: it carries 8 Mbit/s"
    links.arrived(21.0, "b", Arrivals(rates={"a": rate(4e6)}), {"a"})
    (second,) = links.news()
    assert second.words == "the link a -> b carries 32 Mbit/s, 4.0 times more than was known"
    # The first figure was no news, but it was known.
    fast = Links()
    done(fast, 10.0, fast.due(10.0, pool), LinkFigures(seconds=0.0, bytes_per_second=4e8))
    fast.arrived(20.0, "b", Arrivals(rates={"a": rate(1e6)}), {"a"})
    assert [news.words for news in fast.news()] == ["the link a -> b carries 8 Mbit/s, 400 times less than was known"]


def test_a_change_that_costs_nothing_is_no_news() -> None:
    fast, other = Links(), [member("a"), member("b")]
    done(fast, 10.0, fast.due(10.0, other), LinkFigures(seconds=0.0, bytes_per_second=4e8))
    fast.arrived(20.0, "b", Arrivals(rates={"a": rate(1e8)}), {"a"})
    assert fast.news() == []


def topology() -> Topology:
    return Topology.model_validate(
        {
            "workers": [{"name": name, "region": "x", "speed": 1e9, "memory": "1GiB"} for name in "ab"],
            "links": [{"between": ["x", "x"], "bandwidth": "8Mbit/s", "latency": "20ms"}],
        }
    )


def test_what_is_declared_is_not_measured_and_wins() -> None:
    links, pool = Links(topology()), [member(name) for name in "abc"]
    probed = play_schedule(links, pool, 10)
    assert set(probed) == {frozenset("ac"), frozenset("bc")}
    links.arrived(30.0, "b", Arrivals(rates={"a": rate(1.0)}), {"a"})
    rows = dict(links.matrix("abc", 30.0))
    declared = rows["a", "b"]
    assert (declared.source, declared.seconds, declared.bytes_per_second) == ("declared", 0.02, 1e6)
    assert rows["a", "c"].source == "probe"
    assert ("a", "b") not in links.between("abc")


# What plans make of it --------------------------------------------------------------------------------------------


def candidate(name: str, place: str, **links: LinkFigures | str) -> Candidate:
    return Candidate(name, Device(flops_per_second=1e3), place=place, links=links)


def test_measured_links_are_planned_with_and_the_others_estimated_by_place() -> None:
    pool = [
        candidate("a", "p", b=FAST, c=SLOW),
        candidate("b", "p", a=LinkFigures(seconds=0.0012, bytes_per_second=1.2e8)),
        candidate("c", "q", a=SLOW),
        candidate("d", "q"),
    ]
    network = network_of(pool, Network(), ())
    # Within noise of each other they are the same.
    assert network.link("a", "b") == network.link("b", "a")
    assert network.link("a", "b").bytes_per_second == pytest.approx(1.1e8)
    assert network.link("a", "c").bytes_per_second == 1e6
    assert network.link("b", "d") == network.link("a", "c")
    assert network.link("c", "d").bytes_per_second == 1e6
    assert network_of([candidate("a", "p")], Network(), ()) == Network()


def test_links_on_one_machine_are_alike_whatever_they_measured() -> None:
    pool = [candidate("a", "", b=SLOW, c=SLOW), candidate("b", ""), candidate("c", "q", a=SLOW)]
    network = network_of(pool, Network(), ())
    assert network.link("a", "b") == LOOPBACK
    assert network.link("c", "a").bytes_per_second == 1e6


def test_plans_use_workers_that_can_all_reach_each_other() -> None:
    pool = [candidate("a", "p", b="no answer"), candidate("b", "p", a="no answer", c="no answer"), candidate("c", "p")]
    assert [each.name for each in reachable(pool)] == ["a", "c"]
    assert [each.name for each in reachable(pool[:2])] == ["a"]
    here = [replace(each, place="") for each in pool]
    assert [each.name for each in reachable(here)] == ["a", "b", "c"], "on one machine it was busy"
    spec = job_spec(plan={"workers": 2})
    assert SchedulerPlanner()(tiny_dag(), pool[:2], spec, training(spec), None).workers == ("a",)


def test_of_more_workers_than_asked_for_those_with_good_links_take_part() -> None:
    slow = {"b1": SLOW}
    pool = [
        candidate("a1", "p", a2=FAST, **slow),
        candidate("b1", "q", a1=SLOW, a2=SLOW),
        candidate("a2", "p", a1=FAST, **slow),
    ]
    pool = [replace(each, device=Device(flops_per_second=1e10)) for each in pool]
    spec = job_spec(plan={"workers": 2})
    assert set(SchedulerPlanner()(tiny_dag(), pool, spec, training(spec), None).workers) == {"a1", "a2"}
    unmeasured = [replace(each, links={}) for each in pool]
    assert set(SchedulerPlanner()(tiny_dag(), unmeasured, spec, training(spec), None).workers) == {"a1", "b1"}


# In a running pool ------------------------------------------------------------------------------------------------


def probing(play: Play, *names: str) -> None:
    for index, name in enumerate(names):
        each = play.member(name)
        each.probes, each.endpoint, each.joined_at = True, f"tcp://10.0.0.{index}:1", 0.0


def test_the_coordinator_announces_a_probe_to_who_answers_it() -> None:
    play = Play("ab")
    probing(play, "a", "b")
    play.lifecycle.links.hurry("ab")
    play.tick(1.0)
    expect, probe = play.sent(ExpectProbe), play.sent(ProbeLink)
    assert (list(expect), list(probe)) == (["b"], ["a"])
    assert (expect["b"].peer.worker, probe["a"].peer.worker) == ("a", "b")
    assert (probe["a"].max_bytes, probe["a"].seconds) == (2**20, 2.0)


async def test_a_first_plan_waits_for_the_links_between_its_workers() -> None:
    play = Play("ab")
    probing(play, "a", "b")
    asked = ev.MakePlan("job", 1, ("a", "b"), None, {"b": 3.0})
    waiting = asyncio.create_task(candidates(play.lifecycle, asked))
    await asyncio.sleep(0)
    play.tick(1.0)
    ((name, probe),) = play.sent(ProbeLink).items()
    assert not waiting.done()
    play.say(name, LinkMeasured(peer=probe.peer.worker, there=FAST, back=SLOW))
    first, second = await waiting
    assert (first.name, second.name, first.place, second.slower) == ("a", "b", "10.0.0.0/24", 3.0)
    assert (first.links, second.links) == ({"b": FAST}, {"a": SLOW})
    # Another placement of a job that runs does not wait.
    play.lifecycle.links.forget("a")
    again = replace(asked, previous=play.plan)
    assert [each.links for each in await asyncio.wait_for(candidates(play.lifecycle, again), 1.0)] == [{}, {}]


async def test_a_first_plan_waits_longer_for_workers_that_are_brought_together(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("coordinator.plans.candidates.LINK_PATIENCE", 0.1)
    monkeypatch.setattr("coordinator.plans.candidates.RELAY_PATIENCE", 60.0)
    play = Play("ab")
    play.lifecycle.relays.own_port = 8762
    probing(play, "a", "b")
    play.lifecycle.links.hurry("ab")
    play.tick(1.0)
    asked = ev.MakePlan("job", 1, ("a", "b"), None, {})
    play.say("a", LinkMeasured(peer="b", error="can't reach b", reached=False))
    waiting = asyncio.create_task(candidates(play.lifecycle, asked))
    with pytest.raises(TimeoutError):
        await asyncio.wait_for(asyncio.shield(waiting), 0.4)
    play.tick(1.0)
    ((name, probe),) = play.sent(ProbeLink).items()
    play.say(name, LinkMeasured(peer=probe.peer.worker, there=FAST, back=SLOW))
    assert [each.links for each in await asyncio.wait_for(waiting, 10)] == [{"b": FAST}, {"a": SLOW}]


def test_a_running_job_reconsiders_its_placement_when_a_link_has_changed() -> None:
    play = Play("ab", backup_every=500)
    probing(play, "a", "b")
    play.train(1, 4)
    play.say("b", Arrivals(rates={"a": rate(1e6)}))
    assert any("the link a -> b has been measured: it carries 8 Mbit/s" in story for story in play.stories())
    play.tick(1.0)
    assert play.asked_plan().job == "job"


# What else goes by the links --------------------------------------------------------------------------------------


def test_how_long_a_message_takes_and_the_longest_delay():
    links = Links(topology())
    assert links.transfer("a", "b", 1_000_000) == pytest.approx(1.02)
    assert links.transfer("a", "home", 1_000_000) is None
    assert links.longest_delay([]) == 0.02
    links = Links()
    a, b = member("a", 0), member("b", 1)
    done(links, 20.0, links.due(10.0, [a, b]), SLOW)
    assert links.transfer("a", "b", 1_000_000) == pytest.approx(1.03)
    assert links.longest_delay([a, b]) == 0.03
    here = [each.model_copy(update={"endpoint": "tcp://127.0.0.1:7"}) for each in (a, b)]
    assert links.longest_delay(here) == 0.0
