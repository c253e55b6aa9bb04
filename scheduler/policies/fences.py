"""Fences: groups of devices tied by fast links, found by Louvain, and orders in which a pipeline may visit them."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise, permutations

import networkx as nx
import numpy as np
from numpy.typing import NDArray

from scheduler.devices import Device, Network

MOST_PERMUTED = 6
"""Up to so many fences, every order of them is tried; beyond, the nearest unvisited fence comes next."""
STRONGEST = 16
"""In a large pool, Louvain sees so many of each device's strongest links."""

Floats = NDArray[np.float64]


def transfer_seconds(devices: Sequence[Device], network: Network, message_bytes: float) -> Floats:
    """Seconds that a message takes there and an equal one back, for every two devices; 0 on the diagonal."""
    count = len(devices)
    if network.uniform:
        there = 2 * network.default.transfer(message_bytes)
        return np.full((count, count), there) * (1 - np.eye(count))
    one_way = _one_way(devices, network, message_bytes)
    both: Floats = one_way + one_way.T
    np.fill_diagonal(both, 0.0)
    return both


def _one_way(devices: Sequence[Device], network: Network, message_bytes: float) -> Floats:
    """`network.link(...).transfer(message_bytes)` of all pairs at once: a thousand devices have a million of them."""
    names = [device.name for device in devices]
    regions = list(dict.fromkeys(network.region_of.get(name, "") for name in names))
    found = [[network.regions.get((first, second)) for second in regions] for first in regions]
    default = network.default
    number = {region: index for index, region in enumerate(regions)}
    at = np.array([number[network.region_of.get(name, "")] for name in names])
    pairs = np.ix_(at, at)
    rate = np.array([[(link or default).bytes_per_second for link in row] for row in found])[pairs]
    delay = np.array([[(link or default).seconds for link in row] for row in found])[pairs]
    if network.access:
        access = np.array([network.access.get(name, np.inf) for name in names])
        given = np.array([[link is not None for link in row] for row in found])[pairs]
        rate = np.where(given, np.minimum(rate, np.minimum.outer(access, access)), rate)
    index = {name: position for position, name in enumerate(names)}
    for (first, second), link in network.workers.items():
        if first in index and second in index:
            rate[index[first], index[second]] = link.bytes_per_second
            delay[index[first], index[second]] = link.seconds
    seconds: Floats = delay + message_bytes / rate
    return seconds


def fences(seconds: Floats) -> list[list[int]]:
    """Louvain communities of the graph whose weights are messages per second; each ascending, in order of first member."""
    count = len(seconds)
    apart = seconds[~np.eye(count, dtype=bool)]
    if count < 3 or apart.max() - apart.min() <= 1e-9 * apart.max():
        return [list(range(count))]
    graph: nx.Graph[int] = nx.Graph()
    graph.add_nodes_from(range(count))
    rate = 1 / np.maximum(seconds, 1e-9)
    np.fill_diagonal(rate, 0.0)
    for first in range(count):
        order = range(count) if count <= 64 else np.argpartition(-rate[first], STRONGEST)[:STRONGEST]
        graph.add_weighted_edges_from(
            (first, int(second), float(rate[first, second])) for second in order if second != first
        )
    found = nx.community.louvain_communities(graph, weight="weight", seed=0)
    return sorted(sorted(int(member) for member in community) for community in found)


def orders(
    devices: Sequence[Device], seconds: Floats, groups: Sequence[Sequence[int]], most: int
) -> list[tuple[int, ...]]:
    """Promising orders of the devices, fence by fence, at most `most`; the cheapest ways between fences come first."""
    between = _between(seconds, groups)
    # Early stages keep the most activations, so memory first is one way; fast first and as joined are the others.
    inner = [
        [
            sorted(group, key=lambda index: (-_memory(devices[index]), -devices[index].flops_per_second))
            for group in groups
        ],
        [sorted(group, key=lambda index: -devices[index].flops_per_second) for group in groups],
        [list(group) for group in groups],
    ]
    found: dict[tuple[int, ...], None] = {}
    for way in _ways(between):
        for arranged in inner:
            found.setdefault(tuple(index for group in way for index in arranged[group]))
            if len(found) >= most:
                return list(found)
    return list(found)


def _memory(device: Device) -> float:
    return float("inf") if device.memory_bytes is None else float(device.memory_bytes)


def _between(seconds: Floats, groups: Sequence[Sequence[int]]) -> Floats:
    """Mean seconds between the members of each two groups."""
    member = np.zeros((len(groups), len(seconds)))
    for row, group in enumerate(groups):
        member[row, list(group)] = 1 / len(group)
    found: Floats = member @ seconds @ member.T
    return found


def _ways(between: Floats) -> list[tuple[int, ...]]:
    """Orders of the groups, cheapest first."""

    def length(way: tuple[int, ...]) -> float:
        return float(sum(between[first, second] for first, second in pairwise(way)))

    count = len(between)
    if count <= MOST_PERMUTED:
        return sorted(permutations(range(count)), key=length)
    ways = []
    for start in range(count):
        way, left = [start], set(range(count)) - {start}
        while left:
            nearest = min(left, key=lambda group: (between[way[-1], group], group))
            way.append(nearest)
            left.remove(nearest)
        ways.append(tuple(way))
    return sorted(ways, key=length)
