"""Which pairs of workers meet at a relay because they can't reach each other, at which one, and with which tickets. Sans I/O.

::

    direct ──an end could not connect──> relayed ──still could not──> relayed elsewhere ...
       ^                                    │
       └── both can connect after all, an end joined anew, or no relay is left

Nothing of this outlasts the process: workers say again whom they can't reach.
"""

from __future__ import annotations

import secrets
from collections.abc import Callable, Collection, Iterable, Sequence
from dataclasses import dataclass, field
from itertools import permutations
from urllib.parse import urlsplit

from coordinator.life import events as ev
from coordinator.life.links import MAX_BYTES, Links, Pair, pair_of
from coordinator.life.pool import Member
from fusion.messages import LinkFigures, RelayPass, ServeRelay, TryDirect, UseRelay
from fusion.units import format_rate, format_seconds

OWN = "the coordinator"
"""Offers the coordinator's relay; no worker can have such a name."""
_HEARD_SECONDS = 2.0
"""Whoever was silent for longer may be gone, and then no relay helps."""
_SETTLE_SECONDS = 6.0
"""For both ends to come to the relay and to shake hands."""
_TRY_DIRECTLY_AFTER = 300.0
"""A way that was closed may have been opened: a tunnel is up, a port is forwarded."""


@dataclass(slots=True)
class Detour:
    """One pair's way over a relay; both ends and the relay are known by incarnation, because passes are for those."""

    relay: str
    since: float
    incarnations: dict[str, str]
    keys: dict[str, str]
    tickets: dict[str, tuple[str, str]] = field(repr=False)
    """Who calls -> ticket and its secret."""
    works: bool = False
    tried: list[str] = field(default_factory=list)
    direct_at: float = 0.0
    """When both ends were last asked to try without a relay."""
    direct: set[str] = field(default_factory=set)
    """Who could, since then."""


class Relays:
    """The pairs on a detour. Methods return what must be done, in order."""

    def __init__(self, links: Links, make_secret: Callable[[int], str] = secrets.token_hex) -> None:
        self.own_port = 0
        """Where the coordinator offers a relay; 0: it does not."""
        self._links = links
        self._make_secret = make_secret
        self._detours: dict[Pair, Detour] = {}

    def over(self, first: str, second: str) -> str | None:
        """Who offers the relay between these workers, `OWN` or one by name; None when they reach each other directly."""
        found = self._detours.get(pair_of(first, second))
        return found.relay if found is not None else None

    def pairs(self, names: Collection[str]) -> list[tuple[Pair, str, float]]:
        """Pairs of these workers that are on a detour: over which relay, and since when."""
        wanted = set(names)
        return [(pair, found.relay, found.since) for pair, found in self._detours.items() if wanted.issuperset(pair)]

    def hides(self, name: str) -> bool:
        """Whether the worker's own address is of little use: that it refuses there does not mean that it is gone."""
        return any(name in pair for pair in self._detours)

    # What workers say ---------------------------------------------------------------------------------------------

    def unreached(self, now: float, worker: Member, peer: Member, members: Sequence[Member]) -> list[ev.Instruction]:
        """`worker` can't connect to `peer`: they meet at a relay from now on, or at another one, if there is one."""
        if not (worker.live and peer.live) or now - peer.last_heard > _HEARD_SECONDS:
            return []
        pair = pair_of(worker.name, peer.name)
        known = self._detours.get(pair)
        if known is not None and now - known.since < _SETTLE_SECONDS:
            return []
        tried = [*known.tried, known.relay] if known is not None else []
        relay = self._choose(pair, members, tried)
        if relay is not None:
            return self._send_over(pair, relay, tried, now, members)
        if known is None:
            return []
        # The same one once more: an order may have been lost, or the relay may have been away.
        known.since, known.tried = now, []
        told = self._say(pair, known, members)
        if not known.works:
            told.insert(0, self._none_works(pair, tried))
        return told

    def reached(self, worker: str, peer: str, there: LinkFigures | None = None) -> list[ev.Instruction]:
        """The detour between these works; people hear of it the first time."""
        pair = pair_of(worker, peer)
        found = self._detours.get(pair)
        if found is None or found.works:
            return []
        found.works, found.tried = True, []
        known = "not measured yet"
        if there is not None:
            known = f"measured {format_rate(there.bytes_per_second)}, {format_seconds(there.seconds)}"
        words = (
            f"{pair[0]} and {pair[1]} can't reach each other; their traffic goes over {where(found.relay)} ({known})"
        )
        return [ev.RecordEvent(None, "relayed", words, {"source": pair[0], "target": pair[1], "relay": found.relay})]

    def try_directly(self, now: float, members: Sequence[Member]) -> list[ev.Instruction]:
        """Now and then, have both ends of each detour see whether they can do without."""
        out: list[ev.Instruction] = []
        for pair, found in self._detours.items():
            if now - max(found.since, found.direct_at) < _TRY_DIRECTLY_AFTER:
                continue
            found.direct_at, found.direct = now, set()
            out += [
                ev.Send(member.incarnation, TryDirect(peer=other.address)) for member, other in _both(pair, members)
            ]
        return out

    def reached_directly(self, worker: Member, peer: str, members: Sequence[Member]) -> list[ev.Instruction]:
        """`worker` can connect to `peer` itself; when both can, the detour is over."""
        pair = pair_of(worker.name, peer)
        found = self._detours.get(pair)
        if found is None or found.incarnations.get(worker.name) != worker.incarnation:
            return []
        found.direct.add(worker.name)
        if not found.direct.issuperset(pair):
            return []
        words = f"{pair[0]} and {pair[1]} can reach each other; their traffic goes directly again"
        return [
            *self._end(pair, found, members, gone=()),
            ev.RecordEvent(None, "direct-again", words, {"source": pair[0], "target": pair[1]}),
        ]

    def _end(self, pair: Pair, found: Detour, members: Sequence[Member], gone: Collection[str]) -> list[ev.Instruction]:
        del self._detours[pair]
        self._links.take_another_way(pair, relayed=False)
        return [
            *self._serve(found.relay, members),
            *(
                ev.Send(found.incarnations[name], UseRelay(peer=other, public_key=found.keys[other]))
                for name, other in permutations(pair)
                if name not in gone
            ),
        ]

    def sweep(self, now: float, members: Sequence[Member]) -> list[ev.Instruction]:
        """Workers have come and gone: end the detours of those, and find others for those whose relay they were."""
        live = {member.name: member.incarnation for member in members}
        out: list[ev.Instruction] = []
        for pair, found in list(self._detours.items()):
            gone = {name for name, incarnation in found.incarnations.items() if live.get(name) != incarnation}
            if not gone:
                continue
            relay = self._choose(pair, members, []) if gone.isdisjoint(pair) else None
            if relay is not None:
                out += self._send_over(pair, relay, [], now, members)
                continue
            out += self._end(pair, found, members, gone)
        return out

    # Relays -------------------------------------------------------------------------------------------------------

    def _choose(self, pair: Pair, members: Sequence[Member], tried: Collection[str]) -> str | None:
        """The relay with the shortest way; that of one of the two takes no way of its own."""
        load = {relay: 1 + sum(each.relay == relay for each in self._detours.values()) for relay in _names(members)}

        def rank(relay: str) -> tuple[int, float, str]:
            if relay in pair:
                return (0, 0.0, relay)
            if relay == OWN:
                return (2, 0.0, relay)
            if any(self.over(relay, end) for end in pair):
                return (4, 0.0, relay)  # It is hard to reach itself.
            ways = [self._links.transfer(pair[0], relay, MAX_BYTES), self._links.transfer(relay, pair[1], MAX_BYTES)]
            known = [seconds for seconds in ways if seconds is not None]
            return (1 if len(known) == 2 else 3, sum(known) * load[relay], relay)

        offered = [member.name for member in members if member.relay_port and member.state != "draining"]
        if self.own_port:
            offered.append(OWN)
        return min((relay for relay in offered if relay not in tried), key=rank, default=None)

    def _send_over(
        self, pair: Pair, relay: str, tried: list[str], now: float, members: Sequence[Member]
    ) -> list[ev.Instruction]:
        before = self._detours.get(pair)
        incarnations = {member.name: member.incarnation for member in members if member.name in (*pair, relay)}
        keys = {member.name: member.public_key for member in members if member.name in pair}
        tickets = {caller: (self._make_secret(16), self._make_secret(32)) for caller in pair}
        found = self._detours[pair] = Detour(relay, now, incarnations, keys, tickets, tried=tried)
        self._links.take_another_way(pair, relayed=True)
        out = self._serve(relay, members)  # First, so that it knows the tickets when they come.
        out += self._say(pair, found, members)
        if before is not None and before.relay != relay:
            out += self._serve(before.relay, members)
        return out

    def _serve(self, relay: str, members: Iterable[Member]) -> list[ev.Instruction]:
        tickets = {
            ticket: secret
            for found in self._detours.values()
            if found.relay == relay
            for ticket, secret in found.tickets.values()
        }
        if relay == OWN:
            return [ev.ServeTickets(tickets)]
        return [ev.Send(member.incarnation, ServeRelay(tickets=tickets)) for member in members if member.name == relay]

    def _say(self, pair: Pair, found: Detour, members: Sequence[Member]) -> list[ev.Instruction]:
        """Tell both ends."""
        host, port = "", self.own_port
        for member in members:
            if member.name == found.relay and found.relay != OWN:
                host, port = urlsplit(member.endpoint).hostname or "", member.relay_port

        def passed(caller: str) -> RelayPass:
            ticket, secret = found.tickets[caller]
            return RelayPass(host=host, port=port, ticket=ticket, secret=secret)

        return [
            ev.Send(
                member.incarnation,
                UseRelay(
                    peer=other.name,
                    public_key=other.public_key,
                    call=passed(member.name),
                    answer=passed(other.name),
                ),
            )
            for member, other in _both(pair, members)
        ]

    def _none_works(self, pair: Pair, tried: Sequence[str]) -> ev.Instruction:
        which = ", ".join(dict.fromkeys(map(where, tried)))
        words = (
            f"{pair[0]} and {pair[1]} can't reach each other, nor meet at {which}; is the relay's port open to both? "
            "(fusion coordinator --relay-port sets it)"
        )
        return ev.RecordEvent(None, "relay-failed", words, {"source": pair[0], "target": pair[1]})


def where(relay: str) -> str:
    """In words."""
    return f"the relay at {relay}"


def _names(members: Iterable[Member]) -> list[str]:
    return [OWN, *(member.name for member in members)]


def _both(pair: Pair, members: Iterable[Member]) -> list[tuple[Member, Member]]:
    """Each end with the other, as far as both are there."""
    found = {member.name: member for member in members if member.name in pair}
    if len(found) < 2:
        return []
    first, second = (found[name] for name in pair)
    return [(first, second), (second, first)]
