"""What the planner is told of the workers that a plan may use, once the links between them are known."""

from __future__ import annotations

import asyncio

from coordinator.life import events as ev
from coordinator.life.lifecycle import Lifecycle
from coordinator.plans.planning import Candidate
from fusion.addresses import place_of
from fusion.messages import LinkFigures

LINK_PATIENCE = 3.0
"""Seconds that a job's first plan waits at most for links to be measured."""
RELAY_PATIENCE = 10.0
"""The same while workers are found not to reach each other, and are brought together over a relay."""
_LOOK_SECONDS = 0.1


async def candidates(lifecycle: Lifecycle, asked: ev.MakePlan) -> list[Candidate]:
    """Those of the workers asked for that are in the pool; a first plan waits a moment for their links."""
    members = [member for member in map(lifecycle.pool.get, asked.workers) if member is not None]
    if asked.previous is None:
        waited = 0.0
        while lifecycle.links.awaited(members):
            if waited >= (RELAY_PATIENCE if lifecycle.links.unanswered(asked.workers) else LINK_PATIENCE):
                break
            lifecycle.links.hurry(asked.workers)
            await asyncio.sleep(_LOOK_SECONDS)
            waited += _LOOK_SECONDS
        lifecycle.links.relax(asked.workers)
    links: dict[str, dict[str, LinkFigures | str]] = {member.name: {} for member in members}
    for (source, target), figures in lifecycle.links.between(links).items():
        links[source][target] = figures
    return [
        Candidate(
            member.name,
            member.device.model_copy(update={"memory_bytes": member.room_bytes}),
            asked.slower.get(member.name, 1.0),
            place_of(member.endpoint),
            links[member.name],
        )
        for member in members
    ]
