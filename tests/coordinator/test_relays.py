"""Which workers meet at which relay, with which tickets, and what ends it."""

from __future__ import annotations

import itertools

import pytest

from coordinator.life import events as ev
from coordinator.life.books import Books
from coordinator.life.link_watch import LinkWatch
from coordinator.life.links import Links
from coordinator.life.pool import Member
from coordinator.life.relays import OWN, Relays
from fusion.messages import (
    Device,
    LinkFigures,
    LinkMeasured,
    ProbeLink,
    Reached,
    RelayPass,
    ServeRelay,
    TryDirect,
    Unreached,
    UseRelay,
)

FIGURES = LinkFigures(seconds=0.022, bytes_per_second=18e6 / 8)


class World:
    """A pool at some time; what comes out is kept until it is looked at."""

    def __init__(self, *workers: str, own: bool = True, relays: str = "") -> None:
        self.now = 100.0
        self.books = Books()
        self.books.relays.own_port = 8762 if own else 0
        self.watch = LinkWatch(self.books)
        for name in workers:
            self.join(name, 9000 if name in relays else 0)

    @property
    def relays(self) -> Relays:
        return self.books.relays

    @property
    def links(self) -> Links:
        return self.books.links

    def join(self, name: str, relay_port: int = 0, incarnation: str = "") -> None:
        number = ord(name[-1])
        self.books.pool.put(
            Member(
                name=name,
                incarnation=incarnation or f"i-{name}",
                device=Device(),
                endpoint=f"tcp://10.0.{number}.1:7",
                public_key=name * 40,
                probes=True,
                relay_port=relay_port,
                state="idle",
                last_heard=self.now,
            )
        )

    def say(self, worker: str, message: Unreached | Reached | LinkMeasured) -> None:
        member = self.books.pool.get(worker)
        assert member is not None
        self.watch.heard(member, message, self.now)

    def pass_time(self, seconds: float) -> None:
        self.now += seconds
        for member in self.books.pool:
            member.last_heard = self.now
        self.watch.tick(self.now)

    def tried(self) -> dict[str, TryDirect]:
        """Who is asked to do without a relay."""
        return {
            each.incarnation.removeprefix("i-"): each.message
            for each in self.books.taken()
            if isinstance(each, ev.Send) and isinstance(each.message, TryDirect)
        }

    def told(self) -> dict[str, list[UseRelay | ServeRelay]]:
        """Worker -> what it is told of relays, and the coordinator's own relay as `OWN`; the stories go to `stories`."""
        found: dict[str, list[UseRelay | ServeRelay]] = {}
        self.stories: list[str] = []
        for each in self.books.taken():
            if isinstance(each, ev.ServeTickets):
                found.setdefault(OWN, []).append(ServeRelay(tickets=each.tickets))
            elif isinstance(each, ev.Send) and isinstance(each.message, UseRelay | ServeRelay):
                found.setdefault(each.incarnation.removeprefix("i-"), []).append(each.message)
            elif isinstance(each, ev.RecordEvent):
                self.stories.append(each.message)
        return found


def passes(order: object) -> tuple[RelayPass, RelayPass]:
    assert isinstance(order, UseRelay)
    assert order.call is not None
    assert order.answer is not None
    return order.call, order.answer


def test_both_get_a_pass_for_each_direction_and_the_relay_hears_of_the_tickets_first() -> None:
    world = World("a", "b", "c")
    world.say("a", Unreached(peer="b"))
    first = next(each for each in world.books._out)
    assert isinstance(first, ev.ServeTickets)
    told = world.told()
    assert set(told) == {"a", "b", OWN}
    (call_a, answer_a), (call_b, answer_b) = passes(told["a"][0]), passes(told["b"][0])
    assert (call_a, answer_a) == (answer_b, call_b)
    assert (call_a.host, call_a.port) == ("", 8762)
    assert told[OWN] == [ServeRelay(tickets={each.ticket: each.secret for each in (call_a, call_b)})]
    assert world.relays.over("b", "a") == OWN
    assert world.relays.over("a", "c") is None
    assert world.relays.hides("a")
    assert not world.relays.hides("c")
    assert world.stories == []  # Not before it works.


def test_people_hear_of_it_once_with_what_was_measured() -> None:
    world = World("a", "b")
    world.say("a", Unreached(peer="b"))
    world.pass_time(0.1)
    world.say("a", LinkMeasured(peer="b", there=FIGURES, back=FIGURES))
    world.say("b", Reached(peer="a"))
    world.told()
    assert world.stories == [
        "a and b can't reach each other; their traffic goes over the relay at the coordinator (measured 18 Mbit/s, 22 ms)"
    ]


def test_the_link_is_measured_anew_over_the_relay_and_priced_so() -> None:
    world = World("a", "b")
    world.pass_time(10)
    (probe,) = [
        each for each in world.books.taken() if isinstance(each, ev.Send) and isinstance(each.message, ProbeLink)
    ]
    assert probe.incarnation == "i-a"
    assert not world.links.unanswered("ab")
    world.pass_time(3)
    assert world.links.unanswered("ab")
    world.say("a", LinkMeasured(peer="b", error="can't reach b", reached=False))
    assert world.links.between("ab") == {}
    assert world.links.unanswered("ab")
    world.pass_time(0.1)
    again = [each for each in world.books.taken() if isinstance(each, ev.Send) and isinstance(each.message, ProbeLink)]
    assert [each.incarnation for each in again] == ["i-a"]
    world.say("a", LinkMeasured(peer="b", there=FIGURES, back=FIGURES))
    assert world.links.between("ab") == {("a", "b"): FIGURES, ("b", "a"): FIGURES}
    assert not world.links.unanswered("ab")


def test_without_a_relay_a_link_that_fails_is_a_link_that_fails() -> None:
    world = World("a", "b", own=False)
    for _ in range(2):
        world.pass_time(60)
        world.say("a", LinkMeasured(peer="b", error="can't reach b", reached=False))
        world.say("b", Unreached(peer="a"))
    assert world.told() == {}
    assert len(world.stories) == 1
    assert "failed its probe again (can't reach b)" in world.stories[0]
    assert set(world.links.between("ab").values()) == {"can't reach b"}


def test_who_may_be_gone_gets_no_relay() -> None:
    world = World("a", "b")
    world.now += 3
    world.say("a", Unreached(peer="b"))
    world.say("a", Unreached(peer="nobody"))
    world.say("a", Unreached(peer="a"))
    assert world.told() == {}


@pytest.mark.parametrize(
    ("offered", "measured", "chosen"),
    [
        ("", "", OWN),
        ("a", "", "a"),  # No way of its own.
        ("c", "", OWN),  # Nobody knows how far it is.
        ("c", "c", "c"),
        ("cd", "cd", "d"),  # The nearer one.
    ],
)
def test_the_shortest_way_is_chosen(offered: str, measured: str, chosen: str) -> None:
    world = World("a", "b", "c", "d", relays=offered)
    for relay, end in itertools.product(measured, "ab"):
        seconds = 0.01 if relay == "d" else 0.02
        known = LinkFigures(seconds=seconds, bytes_per_second=1e7)
        world.links._under_way[min(relay, end), max(relay, end)] = world.now + 10
        world.say(end, LinkMeasured(peer=relay, there=known, back=known))
    world.say("a", Unreached(peer="b"))
    assert world.relays.over("a", "b") == chosen


def test_one_that_does_not_work_is_followed_by_the_next_and_at_the_end_people_hear_of_it() -> None:
    world = World("a", "b", "c", relays="c")
    world.say("a", Unreached(peer="b"))
    world.told()
    world.say("b", Unreached(peer="a"))
    assert world.told() == {}  # Both have just been told.
    world.pass_time(7)
    world.say("b", Unreached(peer="a"))
    told = world.told()
    assert passes(told["a"][0])[0].host == "10.0.99.1"
    assert isinstance(told["c"][0], ServeRelay)
    assert len(told["c"][0].tickets) == 2
    assert told[OWN] == [ServeRelay(tickets={})]
    world.pass_time(7)
    world.say("a", Unreached(peer="b"))
    again = world.told()
    assert passes(again["a"][0]) == passes(told["a"][0])
    assert world.stories == [
        "a and b can't reach each other, nor meet at the relay at the coordinator, the relay at c; is the relay's port "
        "open to both? (fusion coordinator --relay-port sets it)"
    ]


def test_a_relay_that_is_gone_is_replaced_at_once_and_its_tickets_end() -> None:
    world = World("a", "b", "c", relays="c", own=False)
    world.say("a", Unreached(peer="b"))
    before = passes(world.told()["a"][0])
    world.relays.own_port = 8762
    gone = world.books.pool.get("c")
    assert gone is not None
    gone.state = "lost"
    world.pass_time(0.1)
    after = passes(world.told()["a"][0])
    assert {each.ticket for each in after}.isdisjoint(each.ticket for each in before)
    assert world.relays.over("a", "b") == OWN


def test_who_joins_anew_is_reached_directly_and_who_is_left_keeps_nothing_open() -> None:
    world = World("a", "b")
    world.say("a", Unreached(peer="b"))
    world.told()
    world.join("b", incarnation="i-b-again")
    world.pass_time(0.1)
    told = world.told()
    assert told == {"a": [UseRelay(peer="b", public_key="b" * 40)], OWN: [ServeRelay(tickets={})]}
    assert world.relays.over("a", "b") is None


def test_a_detour_ends_when_both_ends_can_do_without() -> None:
    world = World("a", "b")
    world.say("a", Unreached(peer="b"))
    world.told()
    world.pass_time(299)
    assert not world.tried()
    world.pass_time(2)
    tried = world.tried()
    assert {worker: order.peer.worker for worker, order in tried.items()} == {"a": "b", "b": "a"}
    world.say("a", Reached(peer="b", directly=True))
    assert world.told() == {}
    world.say("b", Reached(peer="a", directly=True))
    direct = {"a": [UseRelay(peer="b", public_key="b" * 40)], "b": [UseRelay(peer="a", public_key="a" * 40)]}
    assert world.told() == {**direct, OWN: [ServeRelay(tickets={})]}
    assert world.stories == ["a and b can reach each other; their traffic goes directly again"]
    assert world.relays.over("a", "b") is None
    assert not world.links.unanswered("ab")


def test_what_one_end_can_do_or_could_do_before_ends_nothing() -> None:
    world = World("a", "b")
    world.say("a", Unreached(peer="b"))
    for end in "ab":
        world.pass_time(301)
        assert len(world.tried()) == 2
        world.say(end, Reached(peer="ab".replace(end, ""), directly=True))
    world.join("b", incarnation="i-b-again")
    world.say("b", Reached(peer="a", directly=True))
    world.told()
    assert world.relays.over("a", "b") == OWN


def test_the_last_relay_leaves_and_both_are_told() -> None:
    world = World("a", "b", "c", relays="c", own=False)
    world.say("a", Unreached(peer="b"))
    world.told()
    gone = world.books.pool.get("c")
    assert gone is not None
    gone.state = "left"
    world.pass_time(0.1)
    assert world.told() == {
        "a": [UseRelay(peer="b", public_key="b" * 40)],
        "b": [UseRelay(peer="a", public_key="a" * 40)],
    }


def test_secrets_do_not_show_when_something_is_printed() -> None:
    world = World("a", "b", "c", relays="c", own=False)
    world.say("a", Unreached(peer="b"))
    out = list(world.books._out)
    told = world.told()
    secret = passes(told["a"][0])[0].secret
    assert secret not in repr(out)
    assert secret not in repr(world.relays._detours)
