"""What a topology asks a worker in local mode to act: its links, and how much slower than the fastest worker it is."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from threading import TIMEOUT_MAX

from fusion.topology import Topology
from worker.transport.slow_links import SlowLink


@dataclass(frozen=True)
class Surroundings:
    """The default is what there is: nothing is slowed down."""

    links: Mapping[str, SlowLink] = field(default_factory=dict)
    """To each peer, this direction."""
    slowdown: float = 1.0
    """How many times longer than here a task takes."""

    def rest(self, busy: float, elapsed: float) -> float:
        """Seconds to rest after a task that took `elapsed` seconds, `busy` of them computing.

        What it waited for a core counts as rest, so workers that share cores are slowed down to the same speed.
        """
        return min(max(0.0, self.slowdown * busy - elapsed), TIMEOUT_MAX) if self.slowdown > 1 else 0.0


def surroundings(topology: Topology, name: str) -> Surroundings:
    """Those of the worker of that name; one that the topology does not name is not slowed down."""
    if not topology.names(name):
        return Surroundings()
    others = [worker.name for worker in topology.workers if worker.name != name]
    return Surroundings({other: SlowLink(*topology.link(name, other)) for other in others}, topology.slowdown(name))
