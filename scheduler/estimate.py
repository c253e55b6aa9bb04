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
from scheduler.memory import FragmentMemory, fit_in_flight, fragment_memory, missing_bytes, worker_memory
from scheduler.messages import Messages, plain

Floats = NDArray[np.float64]
SECONDS_PER_MESSAGE = 3e-4
HANDLED_PER_SECOND = 2e9
"""What a core spends on a message and on its bytes."""


CODEC = -1
"""In place of a device: where values go to be encoded and come from decoded."""


@dataclass(frozen=True, slots=True)
class Placed:
    """Cut positions, and for each fragment the index of its device."""

    cuts: tuple[int, ...]
    devices: tuple[int, ...]


Encoding = Callable[[Placed, Crossings], Messages]
"""(placement, its edges) -> what the codecs that it would get make of its messages."""


@dataclass(frozen=True, slots=True)
class Estimate:
    """Score of a placement. Sorts by memory that is missing, then by time."""

    missing_bytes: float
    seconds: float
    in_flight: tuple[int, ...]
    memory: dict[int, float]
    """Bytes by device index."""
    handling: float
    """Seconds per step and worker for packing and sending messages. They overlap with compute, so they are no part of
    `seconds`, but of two cuts that hide their traffic alike, the one with less of it is better."""

    @property
    def score(self) -> tuple[float, float]:
        return (self.missing_bytes, self.seconds + self.handling)


@dataclass(slots=True)
class _Edges:
    """Transfers of one placement: by fragment, and as load on directed links and on the threads at their ends."""

    arriving: list[list[tuple[int, float]]]
    """For each fragment: (source fragment, seconds of the transfer) of its incoming activations."""
    awaited: list[list[tuple[int, float]]]
    """For each fragment: (target fragment, seconds) of the gradients that come back to it."""
    forward: dict[tuple[int, int], float]
    """Seconds for which forward messages of one micro-batch keep a link busy; a device's encoder counts as its link to
    `CODEC`, its decoder as the link from there."""
    backward: dict[tuple[int, int], float]
    parameters: float
    """The slowest transfer of a parameter at the start of a step."""
    handling: float = 0.0
    """Seconds of work that one micro-batch's messages take on all workers together."""


class Estimator:
    """Prices placements for one job on one pool."""

    def __init__(self, costs: Costs, encoding: Encoding | None = None) -> None:
        self.costs = costs
        self.encoding = encoding or self._dense
        self._known: dict[Placed, Estimate] = {}

    def _dense(self, placed: Placed, crossings: Crossings) -> Messages:
        return plain(self.costs.wire_bytes(crossings))

    def __call__(self, placed: Placed) -> Estimate:
        found = self._known.get(placed)
        if found is None:
            found = self._known[placed] = self._price(placed)
        return found

    def _price(self, placed: Placed) -> Estimate:
        costs, devices = self.costs, [self.costs.devices[index] for index in placed.devices]
        spans = list(pairwise((0, *placed.cuts, costs.workload.size)))
        forward = [costs.forward_seconds(device, *span) for device, span in zip(devices, spans, strict=True)]
        backward = [costs.backward_seconds(device, *span) for device, span in zip(devices, spans, strict=True)]
        crossings = costs.workload.crossings(placed.cuts)
        edges = self._edges(placed, crossings)
        memory = fragment_memory(costs, placed.cuts, placed.devices, crossings)
        # What the fragments before wait for is shorter than what is computed, and that gets longer for it.
        awaited = backward.copy()
        for index, (device, span, needs) in enumerate(zip(devices, spans, memory, strict=True)):
            if needs.behind:
                awaited[index] -= costs.weights_seconds(device, *span)
                backward[index] += costs.splitting_seconds(device, *span)

        count = len(spans)
        started, ended, returned = [0.0] * count, [0.0] * count, [0.0] * count
        for index in range(count):
            started[index] = max((ended[source] + wait for source, wait in edges.arriving[index]), default=0.0)
            ended[index] = started[index] + forward[index]
        for index in reversed(range(count)):
            ready = max((returned[target] + wait for target, wait in edges.awaited[index]), default=0.0)
            returned[index] = max(ended[index], ready) + awaited[index]
        trips = [returned[index] - started[index] for index in range(count)]

        ahead, back, update = (
            _by_device(placed.devices, column)
            for column in (
                forward,
                backward,
                [costs.update_seconds(device, *span) for device, span in zip(devices, spans, strict=True)],
            )
        )
        if costs.schedule == "gpipe":
            period = max((costs.longest(ahead), *edges.forward.values()))
            period += max((costs.longest(back), *edges.backward.values()))
            in_flight = self._fit(memory, placed, [costs.micro_batches] * count)
        else:
            busiest = costs.longest({device: ahead[device] + back[device] for device in ahead})
            links = [
                edges.forward.get(pair, 0.0) + edges.backward.get(pair, 0.0)
                for pair in {**edges.forward, **edges.backward}
            ]
            period = max((busiest, *links))
            in_flight = self._fit(
                memory, placed, [self._wanted(trip, period, count - 1 - index) for index, trip in enumerate(trips)]
            )
            period = max((period, *(trip / depth for trip, depth in zip(trips, in_flight, strict=True))))
        used = worker_memory(memory, placed.devices, in_flight)
        seconds = max(returned) + (costs.micro_batches - 1) * period + costs.longest(update)
        seconds += max(0.0, edges.parameters - started[-1])
        handling = costs.micro_batches * edges.handling / len(used)
        return Estimate(missing_bytes(costs, used), seconds, in_flight, used, handling)

    def _edges(self, placed: Placed, crossings: Crossings) -> _Edges:
        network, names = self.costs.network, [self.costs.devices[index].name for index in placed.devices]
        encoded = self.encoding(placed, crossings)
        found = _Edges([[] for _ in names], [[] for _ in names], {}, {}, 0.0)
        # Lists, as this is where a search spends its time, and single items of arrays are slow.
        columns = (crossings.source, crossings.target, crossings.parameter, crossings.gradient)
        edges = zip(*(column.tolist() for column in columns), strict=True)
        for (source, target, parameter, gradient), out, back in zip(
            edges, encoded.forward.edges(), encoded.backward.edges(), strict=True
        ):
            first, second = placed.devices[source], placed.devices[target]
            if parameter:
                there = network.link(names[source], names[target])
                found.parameters = max(found.parameters, there.transfer(out[0]))
            else:
                found.arriving[target].append((source, self._moved(found, found.forward, (first, second), out)))
            if gradient:
                found.awaited[source].append((target, self._moved(found, found.backward, (second, first), back)))
        return found

    def _moved(
        self, found: _Edges, load: dict[tuple[int, int], float], ends: tuple[int, int], way: tuple[float, float, float]
    ) -> float:
        """Seconds until one message (`Way.edges`) is there; what it keeps busy between two devices goes into `load`."""
        (source, target), (size, encode, decode) = ends, way
        devices = self.costs.devices
        link = self.costs.network.link(devices[source].name, devices[target].name)
        if source == target:
            return link.transfer(size)
        found.handling += SECONDS_PER_MESSAGE + size / HANDLED_PER_SECOND
        _add(load, (source, target), size / link.bytes_per_second)
        _add(load, (source, CODEC), encode)
        _add(load, (CODEC, target), decode)
        return link.transfer(size) + encode + decode

    def _wanted(self, trip: float, period: float, later: int) -> int:
        """Micro-batches that keep a stage with `later` stages after it busy while the first one travels to the end and back.

        At least Asteroid's 2 P - 1: a stage and its transfers alternate strictly, so each transfer counts as a stage.
        """
        needed = math.ceil(trip / period - 1e-6) if period > 0 else 1
        return max(1, min(self.costs.micro_batches, max(needed, 2 * later + 1)))

    def _fit(self, memory: Sequence[FragmentMemory], placed: Placed, wanted: Sequence[int]) -> tuple[int, ...]:
        return fit_in_flight(self.costs, memory, placed.devices, wanted)


def busiest_seconds(costs: Costs, placed: Placed) -> float:
    """Compute of one micro-batch, forward and back, on the device or the shared cores that have most of it."""
    load: dict[int, float] = {}
    for device, (first, last) in zip(placed.devices, pairwise((0, *placed.cuts, costs.workload.size)), strict=True):
        both = costs.times(costs.devices[device]).both
        load[device] = load.get(device, 0.0) + float(both[last] - both[first])
    return costs.longest(load)


def _add(table: dict[tuple[int, int], float], key: tuple[int, int], amount: float) -> None:
    table[key] = table.get(key, 0.0) + amount


def _by_device(devices: Sequence[int], column: Sequence[float]) -> dict[int, float]:
    found: dict[int, float] = {}
    for device, amount in zip(devices, column, strict=True):
        found[device] = found.get(device, 0.0) + amount
    return found
