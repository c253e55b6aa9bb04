"""Who stands with whom: the regions of a topology, or fences found from the links that were measured. Sans I/O."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from itertools import combinations_with_replacement, product
from statistics import median
from typing import Any

import numpy as np

from fusion.topology import Topology
from scheduler.policies.fences import fences

Links = Mapping[tuple[str, str], tuple[float, float, str]]
"""(from, to) -> seconds of latency, bytes per second, and how that is known."""

_MESSAGE_BYTES = 1 << 20
"""Fences are drawn for messages of this size."""


def pool_map(
    workers: Sequence[str],
    topology: Topology | None,
    links: Links,
    relayed: Mapping[tuple[str, str], str] | None = None,
) -> dict[str, Any]:
    """Groups of workers, the links between the groups, and the pairs that are `relayed`, with who offers the relay."""
    drawn = _grouped(workers, topology, links)
    home = {worker: group["name"] for group in drawn["groups"] for worker in group["workers"]}
    pairs = {ends: relay for ends, relay in (relayed or {}).items() if home.keys() >= set(ends)}
    for link in drawn["between"]:
        ends = {link["from"], link["to"]}
        over = [relay for pair, relay in pairs.items() if {home[name] for name in pair} == ends]
        link["relay"] = ", ".join(dict.fromkeys(over)) or None
    drawn["relayed"] = [{"from": ends[0], "to": ends[1], "relay": relay} for ends, relay in pairs.items()]
    return drawn


def _grouped(workers: Sequence[str], topology: Topology | None, links: Links) -> dict[str, Any]:
    if topology is not None:
        groups, declared = _regions(workers, topology)
        return _shown(groups, "region", {**declared, **links})
    if len(workers) > 2 and links:
        return _shown(_fences(workers, links), "fence", links)
    return _shown({"pool": list(workers)} if workers else {}, "pool", links)


def _regions(workers: Sequence[str], topology: Topology) -> tuple[dict[str, list[str]], Links]:
    region = {worker.name: worker.region for worker in topology.workers}
    groups: dict[str, list[str]] = {}
    for worker in workers:
        groups.setdefault(region.get(worker, "elsewhere"), []).append(worker)
    known = {name: [worker for worker in members if worker in region] for name, members in groups.items()}
    declared = {}
    # All links between two regions are alike, but for those that are named; a few workers stand for each region.
    for first, second in combinations_with_replacement(known, 2):
        for pair in product(known[first][:4], known[second][:4]):
            if pair[0] != pair[1]:
                bandwidth, latency = topology.link(*pair)
                declared[pair] = declared[pair[::-1]] = (latency, bandwidth, "declared")
    return groups, declared


def _fences(workers: Sequence[str], links: Links) -> dict[str, list[str]]:
    number = {worker: index for index, worker in enumerate(workers)}
    seconds = np.full((len(workers), len(workers)), np.nan)
    for (sender, receiver), (latency, rate, _) in links.items():
        if sender in number and receiver in number and rate > 0:
            seconds[number[sender], number[receiver]] = latency + _MESSAGE_BYTES / rate
    apart = ~np.eye(len(workers), dtype=bool)
    known = seconds[apart & ~np.isnan(seconds)]
    if not known.size:
        return {"pool": list(workers)}
    # What nobody has measured counts as slow as the slowest, so that it ties nobody together.
    seconds = np.where(np.isnan(seconds), known.max(), seconds)
    np.fill_diagonal(seconds, 0.0)
    found = fences(seconds + seconds.T)
    return {f"fence {index + 1}": [workers[member] for member in members] for index, members in enumerate(found)}


def _shown(groups: Mapping[str, Iterable[str]], kind: str, links: Links) -> dict[str, Any]:
    home = {worker: name for name, members in groups.items() for worker in members}
    between: dict[tuple[str, str], list[tuple[float, float, str]]] = {}
    for (sender, receiver), known in links.items():
        if sender in home and receiver in home and known[1] > 0:
            between.setdefault((home[sender], home[receiver]), []).append(known)
    return {
        "groups": [{"name": name, "kind": kind, "workers": list(members)} for name, members in groups.items()],
        "between": [
            {
                "from": sender,
                "to": receiver,
                "seconds": median(each[0] for each in known),
                "bytes_per_second": median(each[1] for each in known),
                "source": known[-1][2],
            }
            for (sender, receiver), known in between.items()
        ],
    }
