"""What the planner is told of the workers that a plan may use, once the links between them are known."""

from __future__ import annotations

import asyncio

from coordinator import events as ev
from coordinator.lifecycle import Lifecycle
from coordinator.planning import Candidate
from fusion.addresses import place_of
from fusion.messages import LinkFigures

LINK_PATIENCE = 3.0
"""Seconds that a job's first plan waits at most for links to be measured."""
_LOOKS = 30


async def candidates(lifecycle: Lifecycle, asked: ev.MakePlan) -> list[Candidate]:
    """Those of the workers asked for that are in the pool; a first plan waits a moment for their links."""
    members = [member for member in map(lifecycle.pool.get, asked.workers) if member is not None]
    if asked.previous is None:
        for _ in range(_LOOKS):
            if not lifecycle.links.awaited(members):
                break
            lifecycle.links.hurry(asked.workers)
            await asyncio.sleep(LINK_PATIENCE / _LOOKS)
        lifecycle.links.relax(asked.workers)
    links: dict[str, dict[str, LinkFigures | str]] = {member.name: {} for member in members}
    for (source, target), figures in lifecycle.links.between(links).items():
        links[source][target] = figures
    return [
        Candidate(
            member.name,
            member.device,
            asked.slower.get(member.name, 1.0),
            place_of(member.endpoint),
            links[member.name],
        )
        for member in members
    ]
