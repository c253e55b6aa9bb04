"""What is known of the links between workers, and which pair measures its link next. Sans I/O.

A topology file says what a link is (`declared`). Otherwise pairs of workers probe theirs when they are idle, or when a plan
is to be made for them: both directions at once, no worker in two probes at a time, and in a large pool only some pairs of
each worker. What large messages of a job show later (`transfers`) keeps the bandwidth fresh.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Collection, Iterable, Sequence
from dataclasses import dataclass, field, replace
from itertools import combinations, permutations
from typing import Literal

from coordinator.life.pool import Member
from fusion.addresses import place_of
from fusion.messages import Arrivals, LinkFigures, LinkMeasured
from fusion.topology import Topology
from fusion.units import format_rate

Source = Literal["declared", "probe", "transfers"]
Pair = tuple[str, str]

MAX_BYTES = 2**20
MAX_SECONDS = 2.0
"""Bounds of one probe."""
PROBE_AFTER = 1.0
"""Seconds after joining: a pool that gets a job at once measures its links by the job's transfers."""
SMALL_POOL = 12
"""Up to so many workers every pair is measured."""
MOST_PEERS = 8
"""Pairs per worker that are measured in a larger pool."""
MOST_AT_ONCE = 8
FRESH = 600.0
"""Seconds after which idle workers measure a link again."""
ASSUMED = 5e8
"""Bytes per second of a link that nobody has measured."""
_GIVE_UP = 15.0
"""A probe that nobody has reported on for so long has failed."""
_LATE = 0.3
_FIRST_RETRY = 2.0
_LOOK_SECONDS = 0.5
_CHANGED = 2.0
_MATTERS = 0.01
"""Seconds per MiB by which a link must have changed: faster links than this are not what a step waits for."""
_SURE = 2
"""A probe must have failed so often before plans do without the link."""


@dataclass(frozen=True, slots=True)
class Known:
    """One direction of a link, as it was measured or declared last."""

    source: Source
    at: float
    seconds: float | None = None
    bytes_per_second: float | None = None
    error: str = ""
    """Why the last probe failed; empty when the link works."""


@dataclass(frozen=True, slots=True)
class Changed:
    """A link carries much more or less than it was counted on to do."""

    source: str
    target: str
    before: float | None
    """As it was known; None when nobody had measured it, and plans went by what links mostly carry."""
    after: float

    @property
    def words(self) -> str:
        if self.before is None:
            return f"the link {self.source} -> {self.target} has been measured: it carries {format_rate(self.after)}"
        how = "less" if self.after < self.before else "more"
        factor = max(self.before / self.after, self.after / self.before)
        times = f"{factor:.1f}" if factor < 10 else f"{factor:,.0f}"
        return f"the link {self.source} -> {self.target} carries {format_rate(self.after)}, {times} times {how} than was known"


@dataclass(frozen=True, slots=True)
class Failed:
    """Two workers can't reach each other."""

    source: str
    target: str
    why: str

    @property
    def words(self) -> str:
        return (
            f"the link {self.source} - {self.target} failed its probe again ({self.why}); "
            "new plans use only one of them until it answers"
        )


@dataclass(slots=True)
class _Trial:
    """The probes of one pair, whichever worker began them."""

    failures: int = 0
    next_at: float = 0.0


@dataclass(slots=True)
class Links:
    """The matrix of links by worker name, and the probes that are under way."""

    declared: Topology | None = None
    _known: dict[Pair, Known] = field(default_factory=dict)
    _relied_on: dict[Pair, float] = field(default_factory=dict)
    _trials: dict[Pair, _Trial] = field(default_factory=dict)
    _under_way: dict[Pair, float] = field(default_factory=dict)
    _hurried: set[str] = field(default_factory=set)
    _detoured: set[Pair] = field(default_factory=set)
    _look_at: float = 0.0
    _now: float = 0.0
    _news: list[Changed | Failed] = field(default_factory=list)

    def news(self) -> list[Changed | Failed]:
        """What a person, or a job that runs, should hear of; each once."""
        taken, self._news = self._news, []
        return taken

    # Which pair is next -------------------------------------------------------------------------------------------

    def due(self, now: float, members: Sequence[Member]) -> list[tuple[Member, Member]]:
        """Pairs that are to measure their link now, (who asks, who answers); they count as under way from here on."""
        self._now = now
        if now < self._look_at:
            return []
        self._look_at = now + _LOOK_SECONDS
        able = {m.name: m for m in members if m.probes and m.state in ("idle", "busy")}
        for pair, until in list(self._under_way.items()):
            if not able.keys() >= set(pair):
                del self._under_way[pair]
            elif now >= until:
                self._failed(pair, now, f"nothing was heard of the probe for {_GIVE_UP:.0f} s")
        taken = {name for pair in self._under_way for name in pair}
        found: list[tuple[Member, Member]] = []
        for pair in sorted(self._wanted(now, able), key=lambda pair: self._priority(pair)):
            if len(self._under_way) >= MOST_AT_ONCE:
                break
            if taken.isdisjoint(pair):
                taken.update(pair)
                self._under_way[pair] = now + _GIVE_UP
                found.append((able[pair[0]], able[pair[1]]))
        return found

    def hurry(self, names: Collection[str]) -> None:
        """A plan is to be made for these workers: measure the links between them first."""
        self._hurried.update(names)
        self._look_at = 0.0

    def relax(self, names: Collection[str]) -> None:
        """The plan for these workers does not wait any longer."""
        self._hurried.difference_update(names)

    def awaited(self, members: Sequence[Member]) -> bool:
        """Whether a probe would still tell something of the links between these workers; those of one machine do without."""
        able = {m.name: m for m in members if m.probes and m.live}
        if len(able) > SMALL_POOL:
            return not able.keys() <= {name for pair in self._trials for name in pair}
        local = {name for name, member in able.items() if place_of(member.endpoint) == ""}
        return any(
            self._trials.get(pair) is None and not set(pair) <= local
            for pair in self._sample(able)
            if not self._is_declared(pair)
        )

    def unanswered(self, names: Collection[str]) -> bool:
        """Whether some of these seem not to reach each other, and it is not known yet how they do."""
        wanted = set(names)
        late = [pair for pair, until in self._under_way.items() if self._now - until + _GIVE_UP > MAX_SECONDS + _LATE]
        unknown = [pair for pair in self._detoured if self._trials.get(pair) is None]
        return any(wanted.issuperset(pair) for pair in (*late, *unknown))

    def _wanted(self, now: float, able: dict[str, Member]) -> Iterable[Pair]:
        for pair in self._sample(able):
            if pair in self._under_way or self._is_declared(pair):
                continue
            trial, ends = self._trials.get(pair), [able[name] for name in pair]
            settled = all(now - end.joined_at >= PROBE_AFTER for end in ends)
            if trial is None:
                # Two that work together measure their link by what they send each other.
                due = (settled and any(end.state == "idle" for end in ends)) or self._hurried.issuperset(pair)
            else:
                due = now >= trial.next_at and all(end.state == "idle" for end in ends)
            if due:
                yield pair

    def _priority(self, pair: Pair) -> tuple[bool, float]:
        trial = self._trials.get(pair)
        return (not self._hurried.issuperset(pair), trial.next_at if trial is not None else 0.0)

    def _sample(self, able: dict[str, Member]) -> Iterable[Pair]:
        """All pairs of a small pool; in a large one neighbours on a ring through the places, and some across it."""
        if len(able) <= SMALL_POOL:
            return [pair_of(first, second) for first, second in combinations(able, 2)]
        ring = sorted(able, key=lambda name: (place_of(able[name].endpoint), name))
        count = len(ring)
        # A link to a worker that has gone takes nobody's place.
        found = {pair: None for pair in self._trials if pair[0] in able and pair[1] in able}
        peers = Counter(name for pair in found for name in pair)
        for step in dict.fromkeys((1, count // 2, count // 3, count // 5)):
            for index, name in enumerate(ring):
                pair = pair_of(name, ring[(index + step) % count])
                if pair not in found and all(peers[end] < MOST_PEERS for end in pair):
                    found[pair] = None
                    for end in pair:
                        peers[end] += 1
        return found

    # What workers say ---------------------------------------------------------------------------------------------

    def measured(self, now: float, worker: str, message: LinkMeasured) -> None:
        """A worker reports on the probe of its link to a peer."""
        pair = pair_of(worker, message.peer)
        if self._under_way.pop(pair, None) is None:
            return  # It took too long, or one of them has gone.
        self._look_at = 0.0
        if message.there is None or message.back is None:
            self._failed(pair, now, message.error or "the probe failed")
            return
        self._trials[pair] = _Trial(next_at=now + FRESH)
        for ends, figures in (((worker, message.peer), message.there), ((message.peer, worker), message.back)):
            self._compare(ends, figures.bytes_per_second)
            self._known[ends] = Known("probe", now, figures.seconds, figures.bytes_per_second)

    def arrived(self, now: float, worker: str, message: Arrivals, peers: Collection[str]) -> None:
        """A worker says at which rates large messages of these peers have come in."""
        for peer, rate in message.rates.items():
            ends, found = (peer, worker), rate.bytes_per_second
            known = self._known.get(ends)
            if peer not in peers or self._is_declared(ends):
                continue
            before = known.bytes_per_second if known is not None else None
            # A lower bound raises what is known or assumed, and never lowers it.
            if rate.at_least and (before or ASSUMED) >= found:
                if known is not None:
                    self._known[ends] = replace(known, at=now, error="")
                continue
            self._compare(ends, found)
            seconds = known.seconds if known is not None else None
            self._known[ends] = Known("transfers", now, seconds, found)
            trial = self._trials.get(pair_of(*ends))
            if trial is not None:
                # How much more it carries than it did, a probe finds out when the two are idle.
                trial.failures, trial.next_at = 0, now if rate.at_least else max(trial.next_at, now + FRESH)

    def take_another_way(self, pair: Pair, *, relayed: bool) -> None:
        """What was known of a link counts no more: it goes over a relay from now on, or no longer does."""
        (self._detoured.add if relayed else self._detoured.discard)(pair)
        self._trials.pop(pair, None)
        self._under_way.pop(pair, None)
        for ends in permutations(pair):
            self._known.pop((ends[0], ends[1]), None)
        self._look_at = 0.0

    def forget(self, name: str) -> None:
        """The worker has gone, or is another process now."""
        self._hurried.discard(name)
        for table in (self._known, self._relied_on, self._trials, self._under_way):
            for pair in [pair for pair in table if name in pair]:
                del table[pair]

    def keep(self, names: Collection[str]) -> None:
        """Only these workers are here; who comes back under another's name is measured anew."""
        self._hurried.intersection_update(names)
        for table in (self._known, self._relied_on, self._trials, self._under_way):
            for pair in [pair for pair in table if pair[0] not in names or pair[1] not in names]:
                del table[pair]

    def _failed(self, pair: Pair, now: float, why: str) -> None:
        self._under_way.pop(pair, None)
        trial = self._trials.setdefault(pair, _Trial())
        trial.failures += 1
        trial.next_at = now + min(_FIRST_RETRY * 4.0 ** min(trial.failures - 1, 9), FRESH)
        if trial.failures == _SURE:
            self._news.append(Failed(*pair, why))
        for ends in permutations(pair):
            before = self._known.get((ends[0], ends[1])) or Known("probe", now)
            self._known[ends[0], ends[1]] = replace(before, source="probe", at=now, error=why)

    def _compare(self, ends: Pair, found: float) -> None:
        """Notice when a link that has just been measured is not what plans have relied on."""
        before = self._relied_on.get(ends, ASSUMED)
        if max(before / found, found / before) >= _CHANGED and abs(MAX_BYTES / before - MAX_BYTES / found) >= _MATTERS:
            known = self._known.get(ends)
            measured = known.bytes_per_second if known is not None else None
            self._news.append(Changed(*ends, self._relied_on.get(ends, measured), found))
            self._relied_on[ends] = found

    # What is known ------------------------------------------------------------------------------------------------

    def between(self, names: Collection[str]) -> dict[Pair, LinkFigures | str]:
        """What was measured between these workers and is not declared; words where a link does not work."""
        found: dict[Pair, LinkFigures | str] = {}
        for ends, known in self._known.items():
            if ends[0] not in names or ends[1] not in names or self._is_declared(ends):
                continue
            trial = self._trials.get(pair_of(*ends))
            if known.error and trial is not None and trial.failures >= _SURE:
                found[ends] = known.error
            elif known.bytes_per_second is not None:
                found[ends] = LinkFigures(seconds=known.seconds or 0.0, bytes_per_second=known.bytes_per_second)
        return found

    def matrix(self, names: Sequence[str], now: float) -> list[tuple[Pair, Known]]:
        """Every link between these workers of which something is known."""
        wanted, rows = set(names), []
        if self.declared is not None:
            for ends in permutations([name for name in names if self.declared.names(name)], 2):
                rate, seconds = self.declared.link(*ends)
                rows.append((ends, Known("declared", now, seconds, rate)))
        for ends, known in self._known.items():
            if wanted.issuperset(ends) and not self._is_declared(ends):
                rows.append((ends, known))
        return rows

    def transfer(self, source: str, target: str, count: int) -> float | None:
        """Seconds that `count` bytes take from one worker to another, as far as that is known."""
        if self._is_declared((source, target)):
            assert self.declared is not None
            rate, seconds = self.declared.link(source, target)
            return seconds + count / rate
        known = self._known.get((source, target))
        if known is None or known.bytes_per_second is None:
            return None
        return (known.seconds or 0.0) + count / known.bytes_per_second

    def longest_delay(self, members: Sequence[Member]) -> float:
        """Seconds that the shortest message takes at worst between these workers, as measured or declared.

        Between processes of one machine it is the processor that was busy, which says nothing of the next moment.
        """
        away = {member.name for member in members if place_of(member.endpoint) != ""}
        measured = [known.seconds or 0.0 for ends, known in self._known.items() if not away.isdisjoint(ends)]
        declared = [link.latency for link in self.declared.links] if self.declared is not None else []
        return max((*measured, *declared), default=0.0)

    def _is_declared(self, ends: Sequence[str]) -> bool:
        return self.declared is not None and all(self.declared.names(name) for name in ends)


def pair_of(first: str, second: str) -> Pair:
    return (first, second) if first <= second else (second, first)
