"""What a job's plan sends over each link in a step: as it is, and as its codecs make it."""

from __future__ import annotations

from collections import OrderedDict
from typing import Any

from compress.settings import parse
from coordinator.life.jobs import Job
from dag.cut import Edge, cut
from dag.graph import OpDag
from fusion.plan import CodecChoice, Plan

_KEPT = 16
_PLAIN = CodecChoice()


def crossings(dag: OpDag, plan: Plan, micro_batches: int) -> list[dict[str, Any]]:
    """For every direction between two workers: its edges, and their bytes in a step."""
    links: dict[tuple[str, str], dict[str, Any]] = {}

    def add(edge: Edge, sender: str, receiver: str, kind: str, codec: str, times: int) -> None:
        if sender == receiver:
            return
        options = plan.codecs.get(edge.index, _PLAIN).options
        floating = edge.meta.is_floating
        size = (
            parse(codec, options).expected_payload_bytes(edge.meta.shape, edge.meta.dtype)
            if floating
            else edge.meta.nbytes
        )
        link = links.setdefault(
            (sender, receiver),
            {"from": sender, "to": receiver, "plain_bytes": 0, "wire_bytes": 0, "codecs": [], "edges": []},
        )
        link["plain_bytes"] += edge.meta.nbytes * times
        link["wire_bytes"] += size * times
        if codec not in link["codecs"]:
            link["codecs"].append(codec)
        link["edges"].append(
            {
                "edge": edge.index,
                "kind": kind,
                "op": dag.ops[edge.value].name,
                "shape": list(edge.meta.shape),
                "dtype": edge.meta.dtype,
                "codec": codec,
                "plain_bytes": edge.meta.nbytes * times,
                "wire_bytes": size * times,
            }
        )

    for edge in cut(dag, plan.cuts).edges:
        choice = plan.codecs.get(edge.index, _PLAIN)
        source, target = plan.placement[edge.source], plan.placement[edge.target]
        # A parameter that is lent travels once a step, an activation for every micro-batch.
        add(edge, source, target, edge.kind, choice.forward, 1 if edge.kind == "parameter" else micro_batches)
        if edge.gradient:
            add(edge, target, source, "gradient", choice.backward, micro_batches)
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
