"""Which worker holds the snapshots of a fragment: a near one, on another machine, whose links its fragment would not hold up. Sans I/O."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Mapping, Sequence

from coordinator.life.accusations import impartial_first
from coordinator.life.jobs import Job
from coordinator.life.links import Links
from coordinator.life.pool import Member
from fusion.plan import Plan
from fusion.units import format_bytes, plural

_PROBE_BYTES = 2**20
"""Links are compared by the time of a message of so many bytes,"""
_NEAR_SECONDS = 0.05
"""... of which so much is near for all purposes;"""
_FARTHER = 3.0
"""... a worker is farther than another when it takes so many times as long."""
_UNNOTICED = 0.1
"""Traffic that takes this share of a step more than that of another worker is as good."""


def choose(
    job: Job,
    plan: Plan,
    members: Sequence[Member],
    previous: Mapping[int, str] | None = None,
    links: Links | None = None,
) -> tuple[dict[int, str], str]:
    """Fragment -> backup worker, and why some fragments have none, in words.

    A near one before a far one: snapshots should not cross slow links. Of near ones those of another machine come first, as a machine
    that goes takes all its workers along. Then, where what an adopter replays and goes on with would take a good part of a step, a
    host of neighbouring fragments before one that would have to talk to them. Of those that are alike the worker half way round
    the plan's ring, or the next after it that has room: never a neighbour while there are four, so that neighbours may be lost
    together. The `previous` one while it can be, because it has built the fragment already. A worker that leaves takes no backups.
    """
    there = (*plan.workers, *(job.run.standby if job.run is not None else ()))
    live = {member.name: member for member in members if member.state != "draining" and member.name in there}
    ring = [name for name in there if name in live]
    if len(there) < 2:
        return {}, "one worker only"
    slots = job.train.optimizer.slots
    sizes = {summary.index: summary.parameter_bytes for summary in job.fragments}
    room = {name: float(member.room_bytes or math.inf) for name, member in live.items()}
    for fragment, host in enumerate(plan.placement):
        if host in room:
            room[host] -= sizes.get(fragment, 0) * (2 + slots)
    refused = job.run.refused if job.run is not None else {}
    chosen: dict[int, str] = {}
    lacking: dict[int, int] = {}
    alone = True
    for fragment, host in enumerate(plan.placement):
        need = 2 * sizes.get(fragment, 0) * (1 + slots)  # The last snapshot stays until the next one is whole.
        at = (ring.index(host) + len(ring) // 2) % len(ring) if host in ring else 0
        candidates = [name for name in (*ring[at:], *ring[:at]) if name != host]
        alone = alone and not candidates
        if links is not None:
            candidates = _least_traffic_first(job, plan, fragment, candidates, links)
        candidates = _other_machines_first(host, candidates, live)
        if links is not None:
            candidates = _near_first(host, candidates, links)
        candidates = impartial_first(job.accusations, host, candidates)
        before = (previous or {}).get(fragment)
        if before in candidates:
            candidates = [before, *candidates]
        found = next(
            (name for name in candidates if room[name] >= need and name not in refused.get(fragment, ())), None
        )
        if found is None:
            lacking[fragment] = need
        else:
            chosen[fragment] = found
            room[found] -= need
    return chosen, "all other workers leave" if alone else _without(lacking)


def _other_machines_first(host: str, candidates: Sequence[str], live: Mapping[str, Member]) -> list[str]:
    """The candidates in their order, but those that a power cut would take together with the host come later."""
    machine = live[host].device.machine if host in live else ""
    return sorted(candidates, key=lambda name: machine != "" and live[name].device.machine == machine)


def _near_first(host: str, candidates: Sequence[str], links: Links) -> list[str]:
    """The candidates in their order, but those after which a snapshot takes clearly longer come later."""
    seconds = {name: links.transfer(host, name, _PROBE_BYTES) for name in candidates}
    known = [each for each in seconds.values() if each is not None]
    if not known:
        return list(candidates)
    nearest = max(min(known), _NEAR_SECONDS)

    def distance(name: str) -> int:
        # Nobody has measured it: not the first choice, but not one that is known to be bad either.
        found = seconds[name]
        return 1 if found is None else max(0, math.floor(math.log(found / nearest, _FARTHER)))

    return sorted(candidates, key=distance)


def _least_traffic_first(job: Job, plan: Plan, fragment: int, candidates: Sequence[str], links: Links) -> list[str]:
    """The candidates in their order, but those whose links the adopted fragment would hold up come later."""
    found = next((summary for summary in job.fragments if summary.index == fragment), None)
    if found is None or plan.predicted_step_seconds is None:
        return list(candidates)

    def seconds(name: str) -> float:
        counts = Counter[str]()
        for other, count in found.traffic.items():
            if plan.placement[other] not in (name, plan.placement[fragment]):
                counts[plan.placement[other]] += count * job.train.micro_batches
        # Of a link that nobody has measured nothing is known to be bad.
        return sum(links.transfer(name, other, count) or 0.0 for other, count in counts.items())

    each = {name: seconds(name) for name in candidates}
    unnoticed = min(each.values(), default=0.0) + _UNNOTICED * plan.predicted_step_seconds
    return sorted(candidates, key=lambda name: each[name] > unnoticed)


def _without(lacking: dict[int, int]) -> str:
    if not lacking:
        return ""
    which = ", ".join(map(str, lacking))
    snapshots, fragments = (plural(word, len(lacking)) for word in ("snapshot", "fragment"))
    size = format_bytes(sum(lacking.values()))
    return f"no other worker has room for the {snapshots} of {fragments} {which} ({size})"
