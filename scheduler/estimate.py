"""What a placement costs, in closed form: step time, micro-batches in flight, memory.

T = T_path + (M - 1) * T_slowest (FusionLLM 1.5): the way of one micro-batch through all stages and links and back, and
M - 1 times the busiest device or link. The simulator gives the exact figure; this one is cheap enough to search with.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import pairwise

import numpy as np
from numpy.typing import NDArray

from dag.workload import Crossings
from scheduler.cost import Costs

Floats = NDArray[np.float64]
WireBytes = Callable[[Crossings, Sequence[int]], tuple[Floats, Floats]]
"""(edges, device index of each fragment) -> bytes of each edge's message forward, and of its gradient back."""


@dataclass(frozen=True, slots=True)
class Placed:
    """Cut positions, and for each fragment the index of its device."""

    cuts: tuple[int, ...]
    devices: tuple[int, ...]


@dataclass(frozen=True, slots=True)
class Estimate:
    """Score of a placement. Sorts by memory that is missing, then by time."""

    missing_bytes: float
    seconds: float
    in_flight: tuple[int, ...]
    memory: dict[int, float]
    """Bytes by device index."""

    @property
    def score(self) -> tuple[float, float]:
        return (self.missing_bytes, self.seconds)


class Estimator:
    """Prices placements for one job on one pool."""

    def __init__(self, costs: Costs, wire_bytes: WireBytes | None = None) -> None:
        self.costs = costs
        self._wire_bytes = wire_bytes or self._dense
        self._known: dict[Placed, Estimate] = {}

    def _dense(self, crossings: Crossings, devices: Sequence[int]) -> tuple[Floats, Floats]:
        raw = self.costs.wire_bytes(crossings)
        return raw, raw

    def __call__(self, placed: Placed) -> Estimate:
        found = self._known.get(placed)
        if found is None:
            found = self._known[placed] = self._price(placed)
        return found

    def _price(self, placed: Placed) -> Estimate:
        costs, devices = self.costs, [self.costs.devices[index] for index in placed.devices]
        bounds = (0, *placed.cuts, costs.workload.size)
        spans = list(pairwise(bounds))
        forward = [costs.forward_seconds(device, *span) for device, span in zip(devices, spans, strict=True)]
        backward = [costs.backward_seconds(device, *span) for device, span in zip(devices, spans, strict=True)]
        crossings = costs.workload.crossings(placed.cuts)
        out_bytes, back_bytes = self._wire_bytes(crossings, placed.devices)

        count = len(spans)
        started, ended, returned = [0.0] * count, [0.0] * count, [0.0] * count
        arriving: list[list[tuple[int, float]]] = [[] for _ in range(count)]
        awaited: list[list[tuple[int, float]]] = [[] for _ in range(count)]
        link_forward: dict[tuple[int, int], float] = {}
        link_backward: dict[tuple[int, int], float] = {}
        late = 0.0
        for edge in range(len(crossings)):
            source, target = int(crossings.source[edge]), int(crossings.target[edge])
            first, second = placed.devices[source], placed.devices[target]
            out = costs.network.link(devices[source].name, devices[target].name)
            back = costs.network.link(devices[target].name, devices[source].name)
            if crossings.parameter[edge]:
                late = max(late, out.transfer(out_bytes[edge]))
            else:
                arriving[target].append((source, out.transfer(out_bytes[edge])))
                if first != second:
                    busy = link_forward.get((first, second), 0.0)
                    link_forward[first, second] = busy + out_bytes[edge] / out.bytes_per_second
            if crossings.gradient[edge]:
                awaited[source].append((target, back.transfer(back_bytes[edge])))
                if first != second:
                    busy = link_backward.get((second, first), 0.0)
                    link_backward[second, first] = busy + back_bytes[edge] / back.bytes_per_second

        for index in range(count):
            started[index] = max((ended[source] + wait for source, wait in arriving[index]), default=0.0)
            ended[index] = started[index] + forward[index]
        for index in reversed(range(count)):
            ready = max((returned[target] + wait for target, wait in awaited[index]), default=0.0)
            returned[index] = max(ended[index], ready) + backward[index]
        path = max(returned)

        device_forward: dict[int, float] = {}
        device_backward: dict[int, float] = {}
        update: dict[int, float] = {}
        for index, device in enumerate(placed.devices):
            device_forward[device] = device_forward.get(device, 0.0) + forward[index]
            device_backward[device] = device_backward.get(device, 0.0) + backward[index]
            update[device] = update.get(device, 0.0) + costs.update_seconds(devices[index], *spans[index])

        repeats = costs.micro_batches - 1
        trips = [returned[index] - started[index] for index in range(count)]
        if costs.schedule == "gpipe":
            period = max((*device_forward.values(), *link_forward.values()))
            period += max((*device_backward.values(), *link_backward.values()))
            wanted = [costs.micro_batches] * count
        else:
            busiest = max(device_forward[device] + device_backward[device] for device in device_forward)
            links = dict.fromkeys((*link_forward, *link_backward), 0.0)
            for pair in links:
                links[pair] = link_forward.get(pair, 0.0) + link_backward.get(pair, 0.0)
            period = max((busiest, *links.values()))
            wanted = [self._wanted(trip, period) for trip in trips]
        in_flight, memory, missing = self._fit(placed, spans, crossings, wanted)
        if costs.schedule == "1f1b":
            period = max((period, *(trip / depth for trip, depth in zip(trips, in_flight, strict=True))))
        seconds = path + repeats * period + max(update.values()) + max(0.0, late - ended[-1])
        return Estimate(missing, seconds, tuple(in_flight), memory)

    def _wanted(self, trip: float, period: float) -> int:
        """Micro-batches that keep a stage busy while the first one travels to the end and back."""
        if period <= 0:
            return 1
        return max(1, min(self.costs.micro_batches, math.ceil(trip / period - 1e-6)))

    def _fit(
        self,
        placed: Placed,
        spans: Sequence[tuple[int, int]],
        crossings: Crossings,
        wanted: Sequence[int],
    ) -> tuple[list[int], dict[int, float], float]:
        """In-flight depths that fit in memory and never rise along the pipeline; memory by device; bytes missing.

        A later fragment that wanted more forwards than an earlier one lets through would wait for ever.
        """
        count = len(spans)
        incoming, borrowed = [0.0] * count, [0.0] * count
        for edge in range(len(crossings)):
            held = borrowed if crossings.parameter[edge] else incoming
            held[int(crossings.target[edge])] += float(self.costs.workload.value_bytes[crossings.value[edge]])
        state = [self.costs.state_bytes(*span, borrowed[index]) for index, span in enumerate(spans)]
        kept, once = zip(
            *(self.costs.micro_batch_bytes(*span, incoming[index]) for index, span in enumerate(spans)), strict=True
        )
        depth = list(wanted)
        for index in reversed(range(count - 1)):
            depth[index] = max(depth[index], depth[index + 1])

        members: dict[int, list[int]] = {}
        for index, device in enumerate(placed.devices):
            members.setdefault(device, []).append(index)

        def needs(device: int) -> float:
            mine = members[device]
            return float(sum(state[i] + depth[i] * kept[i] for i in mine) + max(once[i] for i in mine))

        shrinkable = self.costs.schedule == "1f1b"
        for device in sorted(members):
            limit = self.costs.devices[device].memory_bytes
            while limit is not None and shrinkable and needs(device) > limit:
                deepest = max(members[device], key=lambda i: (depth[i] - 1) * kept[i])
                if depth[deepest] == 1:
                    break
                over = needs(device) - limit
                depth[deepest] = max(1, depth[deepest] - max(1, math.ceil(over / max(kept[deepest], 1.0))))
        for index in range(1, count):
            depth[index] = min(depth[index], depth[index - 1])
        memory = {device: needs(device) for device in members}
        missing = sum(
            max(0.0, used - limit)
            for device, used in memory.items()
            if (limit := self.costs.devices[device].memory_bytes) is not None
        )
        return depth, memory, missing
