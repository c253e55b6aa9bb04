"""Memory of a placement under its schedule, and how many micro-batches in flight, and behind, fit in it."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise

import numpy as np

from dag.workload import Crossings
from scheduler.cost import Costs

_SPARED = 0.1
"""Share of a device's memory that nothing is put into which can do without: figures of memory are estimates."""


@dataclass(frozen=True, slots=True)
class FragmentMemory:
    """Bytes of one fragment: held always, for each micro-batch in flight, and once while one is worked on."""

    state: float
    kept: float
    once: float
    behind: float = 0.0
    """For each micro-batch whose gradients of weights wait while another is worked on; 0 where nobody elsewhere would have
    its gradients earlier."""

    def total(self, in_flight: int, behind: int = 0) -> float:
        """`behind` is that of a plan: so many are owed at a time, the last one of them right after its backward."""
        return self.state + self.kept * in_flight + self.behind * max(behind - 1, 0) + self.once


def fragment_memory(
    costs: Costs, cuts: Sequence[int], devices: Sequence[int], crossings: Crossings
) -> list[FragmentMemory]:
    """Memory of every fragment: parameters, gradients, optimiser slots and buffers; saved values and incoming edges.

    What waits for gradients of weights keeps all that was saved, and the gradients of the values that they are for.
    `devices[i]` hosts fragment i.
    """
    bounds = (0, *cuts, costs.workload.size)
    incoming, borrowed = [0.0] * (len(bounds) - 1), [0.0] * (len(bounds) - 1)
    sizes = costs.wire_bytes(crossings).tolist()
    for target, parameter, size in zip(crossings.target.tolist(), crossings.parameter.tolist(), sizes, strict=True):
        held = borrowed if parameter else incoming
        held[target] += size
    hosts = np.asarray(devices)
    away = hosts[crossings.source] != hosts[crossings.target]
    answering = set(crossings.target[crossings.gradient & ~crossings.parameter & away].tolist())
    return [
        FragmentMemory(
            costs.state_bytes(first, last, borrowed[index]),
            *costs.micro_batch_bytes(first, last, incoming[index]),
            costs.waiting_bytes(first, last, incoming[index]) if index in answering else 0.0,
        )
        for index, (first, last) in enumerate(pairwise(bounds))
    ]


def worker_memory(
    fragments: Sequence[FragmentMemory],
    devices: Sequence[int],
    in_flight: Sequence[int],
    weights_behind: Sequence[int] = (),
) -> dict[int, float]:
    """Bytes by device index. Only one fragment of a device is worked on at a time."""
    memory: dict[int, float] = {}
    once: dict[int, float] = {}
    behind = weights_behind or (0,) * len(devices)
    for needs, device, depth, late in zip(fragments, devices, in_flight, behind, strict=True):
        memory[device] = memory.get(device, 0.0) + needs.total(depth, late) - needs.once
        once[device] = max(once.get(device, 0.0), needs.once)
    return {device: held + once[device] for device, held in memory.items()}


def fit_in_flight(
    costs: Costs, fragments: Sequence[FragmentMemory], devices: Sequence[int], wanted: Sequence[int]
) -> tuple[int, ...]:
    """The wanted depths, lowered where memory asks for it, and never rising along the pipeline.

    A later fragment that runs more forwards ahead than an earlier one lets through would wait for ever.
    """
    depth = list(wanted)
    for index in reversed(range(len(depth) - 1)):
        depth[index] = max(depth[index], depth[index + 1])
    if costs.schedule == "1f1b":
        for device in sorted(set(devices)):
            limit = costs.devices[device].memory_bytes
            if limit is not None:
                _shrink(fragments, [i for i, host in enumerate(devices) if host == device], depth, limit)
    for index in range(1, len(depth)):
        depth[index] = min(depth[index], depth[index - 1])
    return tuple(depth)


def fit_behind(
    costs: Costs, fragments: Sequence[FragmentMemory], devices: Sequence[int], in_flight: Sequence[int]
) -> tuple[int, ...]:
    """For how many micro-batches at a time each fragment may owe gradients of weights (`Plan.weights_behind`).

    One costs no memory. Others wait, as many as are in flight at most: what memory is left beside those in flight, but for
    a tenth of it all, is shared out evenly, so that a device's fragments get one more each in turn.
    """
    waiting = [max(in_flight) if needs.behind else 0 for needs in fragments]
    used = worker_memory(fragments, devices, in_flight)
    for device, held in used.items():
        limit = costs.devices[device].memory_bytes
        if limit is None:
            continue
        mine = [index for index, host in enumerate(devices) if host == device]
        allowed, room = dict.fromkeys(mine, 0), (1 - _SPARED) * limit - held
        growing = [index for index in mine if waiting[index]]
        while growing:
            growing = [i for i in growing if allowed[i] < waiting[i] and fragments[i].behind <= room]
            for index in growing:
                if fragments[index].behind <= room:
                    allowed[index] += 1
                    room -= fragments[index].behind
        for index in mine:
            waiting[index] = allowed[index]
    return tuple(1 + more if needs.behind else 0 for more, needs in zip(waiting, fragments, strict=True))


def _shrink(fragments: Sequence[FragmentMemory], mine: Sequence[int], depth: list[int], limit: int) -> None:
    """Lower the depths of one device's fragments until they fit, the one that saves most first."""
    fixed = sum(fragments[i].state for i in mine) + max(fragments[i].once for i in mine)
    while (over := fixed + sum(depth[i] * fragments[i].kept for i in mine) - limit) > 0:
        deepest = max(mine, key=lambda i: (depth[i] - 1) * fragments[i].kept)
        if depth[deepest] == 1 or not fragments[deepest].kept:
            return
        depth[deepest] = max(1, depth[deepest] - math.ceil(over / fragments[deepest].kept))


def missing_bytes(costs: Costs, memory: dict[int, float]) -> float:
    """Bytes that devices lack, summed."""
    lacking = 0.0
    for device, used in memory.items():
        limit = costs.devices[device].memory_bytes
        if limit is not None:
            lacking += max(0.0, used - limit)
    return lacking
