"""What a plan counts on between workers: links that were measured, and estimates for the others. Sans I/O.

A pair that nobody has measured is taken for the median of its places' other pairs (a place is a network, see
`fusion.addresses.place_of`), else of all links between places. Between processes of one machine all links are alike: what they
measure there is how busy the processor was.
"""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Collection, Iterable, Sequence
from dataclasses import replace
from statistics import median

from coordinator.plans.planning import Candidate
from scheduler.devices import LOOPBACK, Link, Network

_ALIKE = 1.5
"""A link that is within this of the median of its places is as good as that."""
_PLACE = "network "


def reachable(candidates: Sequence[Candidate]) -> list[Candidate]:
    """As many of the candidates as can all reach each other, by leaving out who has the most links that don't work.

    Processes of one machine reach each other: a probe between them fails only when the machine is very busy.
    """
    chosen = list(candidates)
    here = {each.name for each in candidates if each.place == ""}
    while True:
        names = {each.name for each in chosen}
        broken = Counter(
            end
            for each in chosen
            for peer, link in each.links.items()
            if isinstance(link, str) and peer in names and not {each.name, peer} <= here
            for end in (each.name, peer)
        )
        if not broken:
            return chosen
        # Of several, the one that joined last.
        chosen.remove(max(reversed(chosen), key=lambda each: broken[each.name]))


def network_of(candidates: Sequence[Candidate], declared: Network, described: Collection[str]) -> Network:
    """The links between these candidates; those between workers that are `described` are as declared."""
    place = {each.name: each.place for each in candidates if each.name not in described}
    found: dict[tuple[str, str], Link] = {}
    for each in candidates:
        for peer, figures in each.links.items():
            if isinstance(figures, str) or (each.name in described and peer in described):
                continue
            if place.get(each.name) == place.get(peer) == "":
                continue
            found[each.name, peer] = Link(figures.bytes_per_second, figures.seconds)
    if not found:
        return declared
    grouped: dict[tuple[str, str], list[Link]] = defaultdict(list)
    for (source, target), link in found.items():
        if source in place and target in place:
            grouped[place[source], place[target]].append(link)
    typical = {pair: _median(links) for pair, links in grouped.items()}
    apart = [link for pair, links in grouped.items() if pair[0] != pair[1] for link in links]
    workers = {
        pair: _settled(link, typical.get((place.get(pair[0], ""), place.get(pair[1], ""))))
        for pair, link in found.items()
    }
    regions = {(_PLACE + source, _PLACE + target): link for (source, target), link in typical.items()}
    here = {(_PLACE, _PLACE): LOOPBACK}
    return Network(
        default=_median(apart or list(found.values())),
        workers={**declared.workers, **workers},
        regions={**here, **regions, **declared.regions},
        region_of={**{name: _PLACE + where for name, where in place.items()}, **declared.region_of},
    )


def _median(links: Iterable[Link]) -> Link:
    links = list(links)
    return Link(median(link.bytes_per_second for link in links), median(link.seconds for link in links))


def _settled(link: Link, typical: Link | None) -> Link:
    """The typical link where this one differs by no more than noise, so that equal links are equal to the planner."""
    if typical is None:
        return link
    rate = max(link.bytes_per_second / typical.bytes_per_second, typical.bytes_per_second / link.bytes_per_second)
    if rate <= _ALIKE:
        link = replace(link, bytes_per_second=typical.bytes_per_second)
    if abs(link.seconds - typical.seconds) <= max(1e-3, (_ALIKE - 1) * typical.seconds):
        link = replace(link, seconds=typical.seconds)
    return link
