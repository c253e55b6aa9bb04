"""What a job's plan sends over each link in a step: as it is, and as its codecs make it."""

from __future__ import annotations

from collections import OrderedDict
from typing import Any

from coordinator.life.jobs import Job
from dag.cut import cut
from dag.graph import OpDag
from fusion.plan import Plan
from scheduler.edge_bytes import sent

_KEPT = 16


def crossings(dag: OpDag, plan: Plan, micro_batches: int) -> list[dict[str, Any]]:
    """For every direction between two workers: its edges, and their bytes in a step."""
    links: dict[tuple[str, str], dict[str, Any]] = {}
    for each in sent(cut(dag, plan.cuts), plan):
        edge = each.edge
        ends = plan.placement[edge.source], plan.placement[edge.target]
        sender, receiver = reversed(ends) if each.gradient else ends
        if sender == receiver:
            continue
        times = 1 if each.once_a_step else micro_batches
        plain, wire = edge.meta.nbytes * times, each.wire_bytes * times
        link = links.setdefault(
            (sender, receiver),
            {"from": sender, "to": receiver, "plain_bytes": 0, "wire_bytes": 0, "codecs": [], "edges": []},
        )
        link["plain_bytes"] += plain
        link["wire_bytes"] += wire
        if each.codec not in link["codecs"]:
            link["codecs"].append(each.codec)
        link["edges"].append(
            {
                "edge": edge.index,
                "kind": "gradient" if each.gradient else edge.kind,
                "op": dag.ops[edge.value].name,
                "shape": list(edge.meta.shape),
                "dtype": edge.meta.dtype,
                "codec": each.codec,
                "plain_bytes": plain,
                "wire_bytes": wire,
            }
        )
    return list(links.values())


class CrossingsCache:
    """Of the plans that were asked about last. Blocks while it cuts."""

    def __init__(self) -> None:
        self._known: OrderedDict[tuple[str, int], list[dict[str, Any]]] = OrderedDict()

    def of(self, dag: OpDag, job: Job, plan: Plan) -> list[dict[str, Any]]:
        key = (job.id, plan.epoch)
        found = self._known.get(key)
        if found is None:
            found = self._known[key] = crossings(dag, plan, job.train.micro_batches)
            while len(self._known) > _KEPT:
                self._known.popitem(last=False)
        return found
